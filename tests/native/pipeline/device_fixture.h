// What tests of saves from devices share: tensors on the host and on the fake driver's devices, streams that produce
// their values late, and the check that a file holds the values of the snapshot.
#pragma once

#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "cuda/fake_cuda.h"
#include "cuda/kernels.h"
#include "pipeline/pipeline_fixture.h"
#include "pipeline/producer_mark.h"

namespace snapstone::pipeline {

using testing::ArmedFaults;
using testing::fake_counter;

struct Where {
  std::int32_t device;
  std::uint64_t nbytes;
};

// The memory is torch's: what is freed is given out again at once.
class DeviceTensors {
 public:
  DeviceTensors(std::mt19937_64& random, const std::vector<Where>& tensors, std::map<std::int32_t, void*> streams)
      : where_(tensors), streams_(std::move(streams)) {
    Sizes sizes;
    for (const Where& where : where_) sizes.push_back(where.nbytes);
    values_ = Tensors::random(random, sizes);
    for (const Where& where : where_) {
      const bool device = where.device != kOnHost && where.nbytes > 0;
      addresses_.push_back(
          device ? SNAPSTONE_FAKE(fakecuda_alloc)(where.device, where.nbytes, streams_.at(where.device)) : 0);
      if (device && addresses_.back() == 0) throw std::runtime_error("the fake device is full");
    }
  }
  ~DeviceTensors() {
    for (const std::uint64_t address : addresses_) {
      if (address != 0) SNAPSTONE_FAKE(fakecuda_free)(address);
    }
  }
  DeviceTensors(const DeviceTensors&) = delete;
  DeviceTensors& operator=(const DeviceTensors&) = delete;

  const Tensors& values() const { return values_; }
  Tensors& values() { return values_; }
  std::shared_ptr<const format::Layout> layout() const { return values_.layout(); }

  // Values land on devices when their streams come to it, each after a while.
  void produce(std::uint64_t late_us = 0) {
    for (const auto& [device, stream] : streams_) {
      if (late_us > 0) SNAPSTONE_FAKE(fakecuda_enqueue_delay)(device, stream, late_us);
    }
    for (std::size_t i = 0; i < where_.size(); ++i) {
      if (addresses_[i] == 0) continue;
      SNAPSTONE_FAKE(fakecuda_enqueue_write)
      (where_[i].device, streams_.at(where_[i].device), addresses_[i], values_.bytes[i].data(), where_[i].nbytes);
    }
  }
  // The trainer goes on: other values, right behind what its streams have.
  void overwrite(int byte = 0xEE) {
    for (std::size_t i = 0; i < where_.size(); ++i) {
      if (addresses_[i] == 0) continue;
      SNAPSTONE_FAKE(fakecuda_enqueue_fill)
      (where_[i].device, streams_.at(where_[i].device), addresses_[i], byte, where_[i].nbytes);
    }
  }
  // Tensors on the host are read where the test keeps them.
  SaveSources sources() const {
    SaveSources sources;
    for (std::size_t i = 0; i < where_.size(); ++i) {
      const bool device = where_[i].device != kOnHost;
      sources.devices.push_back(where_[i].device);
      sources.contiguous.push_back(device ? reinterpret_cast<const std::uint8_t*>(addresses_[i])
                                          : values_.bytes[i].data());
    }
    return sources;
  }
  std::shared_ptr<ProducerMark> mark() const {
    std::map<std::int32_t, std::uintptr_t> streams;
    for (const auto& [device, stream] : streams_) streams[device] = reinterpret_cast<std::uintptr_t>(stream);
    return std::make_shared<ProducerMark>(streams);
  }
  const std::map<std::int32_t, void*>& streams() const { return streams_; }

 private:
  std::vector<Where> where_;
  std::map<std::int32_t, void*> streams_;
  Tensors values_;
  std::vector<std::uint64_t> addresses_;
};

class DeviceTest : public PipelineTest {
 protected:
  explicit DeviceTest(std::uint64_t slots = 48) : PipelineTest(slots) {}

  void SetUp() override {
    ASSERT_NE(cuda::Driver::get(), nullptr) << cuda::Driver::absence();
    SNAPSTONE_FAKE(fakecuda_reset)();
    SNAPSTONE_FAKE(fakecuda_seed)(testing::seed());
    for (const std::int32_t device : {0, 1}) {
      void*& stream = streams().emplace(device, nullptr).first->second;
      if (stream == nullptr) stream = SNAPSTONE_FAKE(fakecuda_stream)(device);
    }
    options_.device.drain_patience = kPatience;
    for (const std::int32_t device : {0, 1}) cuda::Kernels::of(cuda::Device::of(device));
  }
  void TearDown() override {
    PipelineTest::TearDown();
    SNAPSTONE_FAKE(fakecuda_drain)();
    EXPECT_EQ(testing::fake_violations(), "") << "seed " << fake_counter("seed");
  }

  // Of the trainer, one per device.
  static std::map<std::int32_t, void*>& streams() {
    static auto& instance = *new std::map<std::int32_t, void*>;
    return instance;
  }
  DeviceTensors tensors(const std::vector<Where>& where) { return DeviceTensors(random_, where, streams()); }
  // Large and small tensors, on the host and on two devices, next to each other in packed chunks.
  std::vector<Where> mixed(std::uint64_t large_nbytes = 7 * kTestChunkBytes + 12345) const {
    return {{0, 1000},
            {kOnHost, 4},
            {0, large_nbytes},
            {1, 77},
            {1, 3 * kTestChunkBytes},
            {kOnHost, 40},
            {0, 0},
            {0, kTestChunkBytes - 1},
            {0, 30000},
            {0, 31000},
            {1, 50000},
            {1, 3},
            {kOnHost, 5000},
            {0, 640},
            {0, 64},
            {1, 128},
            {kOnHost, 250000},
            {0, kTestChunkBytes},
            {1, 2 * 4096}};
  }
  static std::vector<Where> on_one(std::uint64_t large_nbytes = 7 * kTestChunkBytes + 12345) {
    return {{0, 1000}, {0, large_nbytes}, {0, 77}, {0, 3 * kTestChunkBytes}, {0, 60000}, {0, 60001}, {0, 3}};
  }

  std::shared_ptr<SaveJob> device_job(const DeviceTensors& tensors, const std::string& name, SaveOptions options,
                                      SaveBase base = {}) {
    os::File file = os::create_file(directory_.fd(), directory_.path(), name, io::rung_is_direct(options.rung));
    if (options.compress) options.item_bytes.assign(tensors.values().bytes.size(), 2);
    return std::make_shared<SaveJob>(tensors.layout(), tensors.sources(), std::move(file), ring_, std::move(options),
                                     std::move(base));
  }
  std::shared_ptr<SaveJob> device_job(const DeviceTensors& tensors, const std::string& name) {
    return device_job(tensors, name, options_);
  }
  // The streams of the trainer wait for the snapshot.
  static void fence(SaveJob& job) {
    ASSERT_TRUE(job.wait_snapshot(kPatience)) << "the snapshot hangs";
    for (const auto& [device, handle] : streams()) {
      cuda::Stream stream = cuda::Stream::borrowed(cuda::Device::of(device), static_cast<cuda::StreamHandle>(handle));
      job.fence(stream);
    }
  }
  // As a trainer would: values that come late, a save of them, a fence, and other values right behind it.
  void save_behind_fence(DeviceTensors& tensors, const std::shared_ptr<SaveJob>& job) {
    tensors.produce(random_() % 2000);
    job->enqueue(*tensors.mark());
    start(job);
    fence(*job);
    tensors.overwrite();
    finish(*job);
    EXPECT_TRUE(job->staged());
    EXPECT_TRUE(job->device_drained());
  }
  void expect_saved(const SaveJob& job, const std::string& name, const DeviceTensors& tensors) const {
    const Saved saved{name, tensors.layout(), job.chunk_table()};
    expect_file_holds(saved, tensors.values());
  }

  SaveOptions options_;
};

}  // namespace snapstone::pipeline
