// LandingBatch: a few chunks on their way from the host to targets on one device.
//
// With kernels:      chunks -> scratch on the device -> digests -> host compares -> scratch to targets
// Without:           chunks, verified by the host -> targets
//
// Everything up to the digests is enqueued in a stream of the batch's own, so that it neither waits for the caller's
// streams nor for other batches; what writes targets is enqueued in the stream that the caller gives. A batch is used
// again and again.
//
// Guarantee: no byte reaches a target before all chunks of the batch have the digests that they should.
// Ownership: slots are shared with whoever reads more chunks out of them, and let go when the device has read them.
// Threads:   one.
// Failure:   CudaError, and what the caller's Mismatch throws; then give_up() comes next.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "codec/digest.h"
#include "cuda/copies.h"
#include "cuda/kernel_parameters.h"
#include "cuda/kernels.h"
#include "mem/slot_ring.h"
#include "pipeline/device_workspace.h"
#include "pipeline/job.h"
#include "pipeline/load_plan.h"
#include "pipeline/placement.h"

namespace snapstone::pipeline {

using SharedSlot = std::shared_ptr<mem::Slot>;

// A chunk in host memory, of which `device` has targets.
struct Arrived {
  const ReadChunk* chunk = nullptr;
  const std::uint8_t* raw = nullptr;
  SharedSlot slot;          // that holds `raw`; none: `raw` is good for this call only
  bool unverified = false;  // the digest is still to be compared; only where batches have kernels
};

class LandingBatch {
 public:
  using Mismatch = std::function<void(const ReadChunk&, const codec::Digest& actual)>;

  // `capacity`: bytes of chunks in one batch. `kernels` may be null; can_verify() says whether they are used.
  LandingBatch(const LoadPlan& plan, std::int32_t ordinal, const cuda::Kernels* kernels, std::uint64_t capacity,
               LaneBooks& books);
  ~LandingBatch();
  LandingBatch(const LandingBatch&) = delete;
  LandingBatch& operator=(const LandingBatch&) = delete;

  bool can_verify() const noexcept { return kernels_ != nullptr; }
  bool free() const noexcept { return state_ == State::kFree; }
  bool filling() const noexcept { return state_ == State::kFilling; }
  // The device is to do something before memory of the host, or a verdict, is there.
  bool owes_host() const noexcept { return state_ == State::kVerifying || needs_targets_drained(); }

  // Free or filling: takes a chunk in. False when it does not fit beside those that are there.
  bool add(const Arrived& arrived);
  // Filling: enqueues what comes first. Returns how many bytes are on their way to targets by that.
  std::uint64_t submit(cuda::Stream& targets);

  struct Progress {
    bool moved = false;
    std::uint64_t placed_bytes = 0;  // enqueued to targets
  };
  // Goes on where the device has.
  Progress advance(cuda::Stream& targets, const Mismatch& mismatch);

  // Gives memory back whose last use may still be enqueued, all before `landed`; null if !writes_targets().
  void end(const cuda::Event* landed);
  bool writes_targets() const noexcept { return state_ == State::kPlacing; }
  // After a failure. `landed`: an event after all writes to targets, or null; `targets_drained`: they have ended. Waits
  // at most until `deadline_ns` for the batch's own stream; memory that may still be in use then is given up for good.
  void give_up(const cuda::Event* landed, bool targets_drained, std::int64_t deadline_ns) noexcept;
  bool needs_targets_drained() const noexcept { return state_ == State::kPlacing && !can_verify(); }

 private:
  enum class State { kFree, kFilling, kVerifying, kPlacing };

  struct Landing {
    const ReadChunk* chunk;
    SharedSlot slot;
    bool unverified;
    std::uint64_t placed_bytes;
  };
  // What the device is to do, with its own addresses and those of the host.
  struct Work {
    std::vector<cuda::Copy> to_scratch;
    std::vector<cuda::Copy> runs;
    std::vector<cuda::Copy2d> rows;
    // For kernels: the table behind the scratch, in this order, and behind it room for as many digests.
    std::vector<cuda::DigestItem> digests;
    std::vector<cuda::GatherItem> gathers;
    std::vector<cuda::BoxItem> boxes;

    std::uint64_t gathers_at() const { return digests.size() * sizeof(cuda::DigestItem); }
    std::uint64_t boxes_at() const { return gathers_at() + gathers.size() * sizeof(cuda::GatherItem); }
    std::uint64_t results_at() const;
    std::uint64_t table_bytes() const;
    void clear();
  };

  bool add_to_scratch(const Arrived& arrived);
  bool add_to_targets(const Arrived& arrived);
  void keep(const Arrived& arrived, std::uint64_t placed_bytes);
  void add_kernel_work(const Placement& placement, std::uint64_t scratch);
  std::uint8_t* bounce();
  void submit_to_scratch();
  void submit_to_targets(cuda::Stream& targets);
  void compare(const Mismatch& mismatch) const;
  void place_from_scratch(cuda::Stream& targets);
  std::uint64_t placed_bytes() const;
  void note_copied();
  void let_go_of_slots() noexcept;
  void reset() noexcept;
  bool follows(const cuda::Event* landed) noexcept;

  std::uint8_t* host_table() const { return workspace_->host_table() + capacity_; }
  cuda::DevicePointer device_table() const { return workspace_->device_table() + capacity_; }

  const LoadPlan& plan_;
  const std::uint64_t capacity_;
  LaneBooks& books_;
  std::unique_ptr<DeviceWorkspace> workspace_;
  const cuda::Kernels* kernels_;
  cuda::Event copied_;
  cuda::Event verified_;
  cuda::Event placed_;
  State state_ = State::kFree;
  std::vector<Landing> landings_;
  Work work_;
  std::uint64_t used_ = 0;     // of the capacity
  std::int64_t begin_ns_ = 0;  // of the first copy
  bool copied_noted_ = false;
};

// Whether everything enqueued in the stream so far has ended by the deadline.
bool drained(cuda::Stream& stream, std::int64_t deadline_ns) noexcept;

}  // namespace snapstone::pipeline
