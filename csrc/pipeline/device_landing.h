// DeviceLanding: one lane's chunks on their way to targets on one device, batch by batch.
//
// Several batches are on their way at once, each in a stream of its own (landing_batch.h). One stream more writes the
// targets, after what the caller's streams had to do with them (TargetFence).
//
// Ownership: streams and memory are the landing's from the first chunk to end(); slots as in landing_batch.h.
// Threads:   one, a lane.
// Limits:    options.batches batches of options.batch_bytes, fewer where the device has no memory. Without memory or
//            kernels nothing is verified here, and host memory is in use until targets are written.
// Failure:   CudaError, and what the Mismatch throws. Destroying it without end() waits for what is in flight, for
//            options.patience at most, and gives up for good what may be in use after that.
#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "cuda/kernels.h"
#include "cuda/stream.h"
#include "pipeline/landing_batch.h"
#include "pipeline/target_fence.h"

namespace snapstone::pipeline {

struct LandingOptions {
  std::uint64_t batch_bytes = 4 << 20;  // a link is as good as full with copies of this size
  std::size_t batches = 4;              // per lane and device
  bool kernels = true;                  // use them where there are some
  std::chrono::milliseconds patience{10'000};
};

class DeviceLanding {
 public:
  // All arguments outlive the landing.
  DeviceLanding(const LoadPlan& plan, std::int32_t ordinal, const LandingOptions& options, TargetFence& fence,
                LaneBooks& books, LandingBatch::Mismatch mismatch);
  ~DeviceLanding();
  DeviceLanding(const DeviceLanding&) = delete;
  DeviceLanding& operator=(const DeviceLanding&) = delete;

  std::int32_t ordinal() const noexcept { return ordinal_; }
  // Whether digests can be left to the device.
  bool can_verify();
  // False: there is no room before advance() makes some.
  bool add(const Arrived& arrived);
  // Sends off what was added; unless `at_once`, only if the device has nothing else to do for this lane.
  void flush(bool at_once);
  // Goes on where the device has; true if something changed.
  bool advance();
  // Bytes sent to targets since the last call.
  std::uint64_t take_placed() noexcept { return std::exchange(placed_bytes_, 0); }
  // What was added is not yet all verified and on its way, or memory of the host is still in use.
  bool busy() const noexcept;
  // Not busy: everything is on its way to the targets, and the fence knows where it ends.
  void end();

 private:
  LandingBatch* batch_with_room();
  void open();
  bool make_batch();
  bool writes() const noexcept;
  std::optional<cuda::Event> last_write() noexcept;
  void give_up() noexcept;

  const LoadPlan& plan_;
  const std::int32_t ordinal_;
  const LandingOptions& options_;
  TargetFence& fence_;
  LaneBooks& books_;
  const LandingBatch::Mismatch mismatch_;
  const cuda::Kernels* kernels_ = nullptr;
  std::optional<cuda::Stream> targets_;
  std::vector<std::unique_ptr<LandingBatch>> batches_;
  std::size_t batches_max_;
  std::uint64_t placed_bytes_ = 0;
};

}  // namespace snapstone::pipeline
