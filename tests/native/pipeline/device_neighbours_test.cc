// Saves from devices of other kinds than most have: allocations that touch each other, three devices. Each in a process
// of its own, since a process tries its driver once.
#include "pipeline/device_fixture.h"

namespace snapstone::pipeline {
namespace {

class DeviceNeighbours : public DeviceTest {
 protected:
  void use_ring_of(std::uint64_t slots) {
    ring_ = std::make_shared<mem::SlotRing>(kTestChunkBytes);
    ring_->reserve(slots);
  }
  void save_and_compare(const std::vector<Where>& where, const std::string& name) {
    DeviceTensors state = tensors(where);
    const auto job = device_job(state, name);
    save_behind_fence(state, job);
    expect_saved(*job, name, state);
  }
};

// In a process whose device has no room between allocations, as the driver's may have none.
TEST_F(DeviceNeighbours, DISABLED_no_copy_reaches_from_one_tensor_into_another) {
  for (const double overflow_fraction : {0.0, 0.5}) {
    for (const std::uint64_t slots : {8, 64}) {
      use_ring_of(slots);
      ring_->register_with(cuda::Device::of(0));
      options_.device.overflow_fraction = overflow_fraction;
      const std::string name = std::to_string(slots) + (overflow_fraction > 0 ? "-overflow" : "");
      save_and_compare(std::vector<Where>(12, {0, 2 * kTestChunkBytes}), name);
    }
  }
}

TEST(DevicesOfOtherKinds, no_copy_reaches_from_one_tensor_into_another) {
  const testing::ChildResult child =
      testing::run_child("DeviceNeighbours.DISABLED_no_copy_reaches_from_one_tensor_into_another", "FAKECUDA_GAP=0");
  EXPECT_EQ(child.status, 0) << child.output;
}

// A chunk that two devices share is nothing to the third, whose last chunk is read long after it.
TEST_F(DeviceNeighbours, DISABLED_a_device_without_a_part_in_a_shared_chunk_is_waited_for) {
  streams()[2] = SNAPSTONE_FAKE(fakecuda_stream)(2);
  use_ring_of(4);
  for (int round = 0; round < 5; ++round) {
    save_and_compare({{0, 1000}, {1, 2000}, {2, 30 * kTestChunkBytes}}, std::to_string(round));
  }
  streams().erase(2);
}

TEST(DevicesOfOtherKinds, a_device_without_a_part_in_a_shared_chunk_is_waited_for) {
  const testing::ChildResult child = testing::run_child(
      "DeviceNeighbours.DISABLED_a_device_without_a_part_in_a_shared_chunk_is_waited_for", "FAKECUDA_DEVICES=3");
  EXPECT_EQ(child.status, 0) << child.output;
}

}  // namespace
}  // namespace snapstone::pipeline
