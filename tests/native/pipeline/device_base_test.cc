// Saves from devices that are compared with an earlier one, with digests first and without: what the base has is not
// written, with digests first not even copied, and the table is the one that a save from the host gives.
#include <numeric>

#include "pipeline/device_fixture.h"

namespace snapstone::pipeline {
namespace {

class DeviceBase : public DeviceTest, public ::testing::WithParamInterface<bool> {
 protected:
  static SaveBase base_of(const Saved& saved) {
    SaveBase base{saved.table, std::vector<std::uint32_t>(saved.table.size(), SaveBase::kNoRecord), {}};
    for (format::ChunkRecord& record : base.records) record.file = 1;
    base.record_of_chunk.resize(saved.table.size());
    std::iota(base.record_of_chunk.begin(), base.record_of_chunk.end(), 0u);
    return base;
  }
  bool kernels() const { return cuda::Kernels::of(cuda::Device::of(0)) != nullptr; }
};
INSTANTIATE_TEST_SUITE_P(TwoPhases, DeviceBase, ::testing::Bool(),
                         [](const auto& info) { return info.param ? "digests_first" : "all_at_once"; });

TEST_P(DeviceBase, only_changed_chunks_are_written) {
  options_.device.two_phase = GetParam();
  for (int round = 0; round < 12; ++round) {
    ring_ = std::make_shared<mem::SlotRing>(kTestChunkBytes);
    ring_->reserve(round % 4 == 0 ? 3 : 6 + random_() % 40);
    options_.compress = round % 3 == 2;
    options_.device.overflow_fraction = round % 2 == 0 ? 0.5 : 0;
    DeviceTensors state = tensors(mixed(30 * kTestChunkBytes + 99));
    const std::string name = std::to_string(round);
    const Saved base = save(state.values(), name + "base");
    for (std::uint64_t count = random_() % 12; count > 0; --count) {
      Bytes& bytes = state.values().bytes[random_() % state.values().bytes.size()];
      if (!bytes.empty()) bytes[random_() % bytes.size()] ^= 0x20;
    }
    const auto job = device_job(state, name, options_, base_of(base));
    save_behind_fence(state, job);
    SaveOptions on_host = options_;
    if (on_host.compress) on_host.item_bytes.assign(state.values().bytes.size(), 2);
    os::File file = os::create_file(directory_.fd(), directory_.path(), name + "host", false);
    const auto host_job = std::make_shared<SaveJob>(state.layout(), state.values().sources(), std::move(file), ring_,
                                                    on_host, base_of(base));
    run(host_job);
    EXPECT_TRUE(file_bytes(name) == file_bytes(name + "host")) << name;
    ASSERT_EQ(job->chunk_table().size(), host_job->chunk_table().size());
    EXPECT_EQ(std::memcmp(job->chunk_table().data(), host_job->chunk_table().data(),
                          job->chunk_table().size() * sizeof(format::ChunkRecord)),
              0)
        << name;
    EXPECT_EQ(job->bytes_done(), state.layout()->payload_bytes);
  }
}

TEST_P(DeviceBase, an_unchanged_state_writes_nothing) {
  options_.device.two_phase = GetParam();
  DeviceTensors state = tensors({{0, 50 * kTestChunkBytes}, {1, 3 * kTestChunkBytes}, {0, 100}, {0, 50}});
  const Saved base = save(state.values(), "base");
  const auto job = device_job(state, "a", options_, base_of(base));
  save_behind_fence(state, job);
  EXPECT_EQ(job->file_bytes(), 0u);
  const std::uint64_t payload = state.layout()->payload_bytes;
  if (GetParam() && kernels()) {
    EXPECT_LT(job->device_stats().copied_bytes, kTestChunkBytes) << "what is the base's was copied";
  } else {
    EXPECT_GE(job->device_stats().copied_bytes, payload);
  }
}

}  // namespace
}  // namespace snapstone::pipeline
