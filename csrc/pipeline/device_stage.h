// DeviceStage: the chunks of a save that have bytes in device memory, on their way into slots.
//
// enqueue() runs on the thread that asked for the save: as far as slots last, it enqueues everything that reads the
// tensors, and returns. Lanes enqueue the rest as slots come free, ask events whether copies have ended (no callback,
// no synchronisation), and only then get the slot, with the digest where the device computed it.
//
// Why nobody waits for ever. Chunks are enqueued in their order, behind one cursor, and claimed by lanes in their
// order, and a lane claims a chunk only when that has a slot: its own if it is enqueued, else one that the lane brings.
// So what is claimed ends without asking for another slot, and gives its slot back. Slots are held besides by chunks
// that are enqueued and not claimed. Those were enqueued ahead, which leaves R slots of the ring free each time, for
// all jobs together: with no chunk claimed, at least R are free. The next chunk in order then either is enqueued, or
// gets one of these. R > 0, or nothing is enqueued ahead.
//
// Ownership: sources live until sources_free() or drained(). Slots and device memory that copies may still use when a
//            job ends badly are given up for good.
// Threads:   any; one lock, held while work is enqueued.
// Failure:   CudaError; the job fails, and close() is what remains.
#pragma once

#include <atomic>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <vector>

#include "codec/digest.h"
#include "mem/slot_ring.h"
#include "pipeline/device_options.h"
#include "pipeline/device_plan.h"
#include "pipeline/device_queue.h"
#include "pipeline/host_parts.h"
#include "pipeline/job.h"
#include "pipeline/producer_mark.h"

namespace snapstone::pipeline {

class DeviceStage {
 public:
  // The digest that the base has for a chunk, or nullptr.
  using Expected = std::function<const codec::Digest*(std::uint32_t chunk)>;

  struct Taken {
    mem::Slot slot;                       // empty: the chunk is the base's
    std::optional<codec::Digest> digest;  // else the host computes it
  };

  enum class Claim { kReady, kNeedsSlot, kNotYet };

  // All references outlive the stage. `expected` may be empty.
  DeviceStage(const format::Layout& layout, const SaveSources& sources, DevicePlan plan,
              std::shared_ptr<mem::SlotRing> ring, const DeviceOptions& options, int lanes, Expected expected);
  ~DeviceStage();
  DeviceStage(const DeviceStage&) = delete;
  DeviceStage& operator=(const DeviceStage&) = delete;

  std::uint32_t position(std::uint64_t chunk) const { return plan_.position[chunk]; }
  std::size_t chunk_count() const { return plan_.chunks.size(); }

  // Once, before lanes come.
  void enqueue(const ProducerMark& mark);
  // Everything that reads the sources of this stage is enqueued, or done on the host.
  bool all_read() const noexcept { return all_read_.load(std::memory_order_acquire) && host_parts_.all_taken(); }
  // Once all_read(): `stream` waits until the sources on its device have been read. std::logic_error before.
  void fence(cuda::Stream& stream);
  // The host knows that the sources have been read.
  bool sources_free() const noexcept {
    return sources_free_.load(std::memory_order_acquire) && host_parts_.all_taken();
  }
  DeviceStats stats() const;

  // Of lanes. First, once for each: takes the part that mixed chunks have on the host, registers the ring, and loads
  // kernels, for the next save: this one does without those that were not loaded when it was enqueued.
  void enter();
  Claim claim(std::uint32_t position);
  // Claims the next chunk with `claimed`, which says whether this lane was the one, and gives it the slot in `spare`,
  // unless it got one meanwhile. In one step: another lane that claims the chunk after it finds the cursor there.
  bool provide(std::uint32_t position, mem::Slot& spare, const std::function<bool()>& claimed);
  // Of a claimed chunk, once its bytes are in the slot.
  std::optional<Taken> take(std::uint32_t position, LaneBooks& books);
  // Enqueues what can be; never waits.
  void advance(LaneBooks& books);

  // Last: waits for what is in flight. drained() says whether that is known to have ended.
  void close() noexcept;
  bool drained() const noexcept { return drained_.load(std::memory_order_acquire); }

 private:
  struct Chunk {
    mem::Slot slot;
    std::uint32_t batch = 0;
    bool same = false;  // as the base's: it is not copied
  };
  // Chunks that one event, or one on each of their devices, stands for.
  struct Batch {
    std::vector<cuda::Event> events;
    std::vector<DeviceQueue::Buffer> buffers;  // that its copies read
    std::uint64_t nbytes = 0;
    std::int64_t begin_ns = 0;
    bool ended = false;
  };

  DeviceQueue& queue(std::uint32_t position) { return *queues_.at(plan_.chunks[position].device); }
  std::uint64_t raw_bytes(std::uint32_t position) const {
    return layout_.chunks[plan_.chunks[position].chunk].raw_bytes;
  }
  bool all_enqueued() const { return cursor_.load(std::memory_order_acquire) == plan_.chunks.size(); }
  void enqueue_ahead();
  bool enqueue_batch(mem::Slot* spare, std::uint64_t leave);
  std::vector<mem::Slot> slots_for(std::uint64_t wanted, mem::Slot* spare, std::uint64_t leave);
  void fill(Batch& batch, mem::Slot* spare, std::uint64_t leave);
  void fill_shared(Batch& batch, mem::Slot* spare, std::uint64_t leave);
  std::uint8_t* place(std::uint32_t position, mem::Slot slot, bool bare);
  std::uint32_t skip_same(std::uint32_t position) const;
  std::uint64_t run_wanted() const;
  std::optional<std::uint64_t> leave_ahead() const;
  bool within_rate() const;
  void overflow();
  void overflow_on(DeviceQueue& queue);
  bool ended(Batch& batch, LaneBooks& books);
  void learn_digests(LaneBooks& books);
  void note_digests(LaneBooks& books);
  void note_reads();
  void note_sources_free(LaneBooks& books);

  const format::Layout& layout_;
  const SaveSources& sources_;
  const DevicePlan plan_;
  const std::shared_ptr<mem::SlotRing> ring_;
  const DeviceOptions options_;
  const std::uint64_t lanes_;
  const Expected expected_;
  HostParts host_parts_;
  std::atomic<std::uint32_t> cursor_{0};  // the first chunk that is not enqueued
  std::atomic<bool> all_read_{false};
  std::atomic<bool> sources_free_{false};
  std::atomic<bool> drained_{false};

  mutable std::mutex mutex_;  // guards the rest
  std::map<std::int32_t, std::unique_ptr<DeviceQueue>> queues_;
  std::vector<Chunk> chunks_;  // by position
  std::deque<Batch> batches_;
  std::vector<cuda::Copy> copies_;
  DeviceStats stats_;
  std::int64_t begin_ns_ = 0;
  std::uint64_t taken_ = 0;
  bool begun_ = false;
  bool digests_known_ = false;  // of all that can be known before copying
  bool overflowed_ = false;
  bool torn_ = false;  // enqueueing did not come to its end: no slot is known to be filled
  bool closed_ = false;
};

}  // namespace snapstone::pipeline
