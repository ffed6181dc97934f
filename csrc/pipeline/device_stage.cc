// The order of a save's work on devices:
//   1. enqueue(): each device's stream waits for its producer, then digests and gathers (device_queue.h).
//   2. With digests first, lanes wait for those and mark the chunks that the base has; else there is nothing to learn.
//   3. Chunks are enqueued ahead, in batches, while more than R slots are free.
//   4. What is left once that stops overflows: it is copied within its device. Its copy to the host follows like any
//   other.
//   5. With the last chunk that reads the tensors the snapshot is enqueued: streams can wait for sources_event().
//   6. Lanes claim chunks, bring slots for those that got none, and take each one when its batch has ended.
//   7. close().
#include "pipeline/device_stage.h"

#include <algorithm>
#include <stdexcept>
#include <utility>

#include "base/clock.h"
#include "base/fault_hook.h"
#include "pipeline/orphans.h"

namespace snapstone::pipeline {
namespace {

constexpr std::uint64_t kPartsOfCallerBytes = 1 << 20;  // 0.1 ms to copy

}  // namespace

DeviceStage::DeviceStage(const format::Layout& layout, const SaveSources& sources, DevicePlan plan,
                         std::shared_ptr<mem::SlotRing> ring, const DeviceOptions& options, int lanes,
                         Expected expected)
    : layout_(layout),
      sources_(sources),
      plan_(std::move(plan)),
      ring_(std::move(ring)),
      options_(options),
      lanes_(static_cast<std::uint64_t>(lanes)),
      expected_(std::move(expected)),
      host_parts_(layout_, sources_, plan_),
      chunks_(plan_.chunks.size()) {
  for (const std::int32_t device : plan_.devices) {
    queues_.emplace(device, std::make_unique<DeviceQueue>(layout_, sources_, plan_, device, options_));
  }
}

DeviceStage::~DeviceStage() { close(); }

void DeviceStage::enqueue(const ProducerMark& mark) {
  const std::lock_guard lock(mutex_);
  if (begun_ || closed_) throw std::logic_error("the copies of a save are enqueued once");
  begun_ = torn_ = true;
  begin_ns_ = now_ns();
  for (const auto& [device, queue] : queues_) queue->begin(mark.on(device), stats_);
  const bool learns = options_.two_phase && expected_ &&
                      std::any_of(queues_.begin(), queues_.end(),
                                  [](const auto& entry) { return entry.second->digests_whole_chunks(); });
  digests_known_ = !learns;
  if (host_parts_.nbytes() <= kPartsOfCallerBytes) host_parts_.take();
  // Copies to memory that is not registered would hold the caller until the producer got there: left to lanes.
  if (!learns && ring_->registered()) enqueue_ahead();
  if (!learns) overflow();
  note_reads();
  torn_ = false;
  for (std::uint32_t position = cursor_; position < chunks_.size(); ++position) {
    if (queue(position).in_tensors(position)) stats_.late_bytes += raw_bytes(position);
  }
}

void DeviceStage::enter() {
  host_parts_.take();
  ring_->register_with(cuda::Device::of(plan_.devices.front()));
  for (const std::int32_t ordinal : plan_.devices) {
    const std::string absence = cuda::Kernels::absence(cuda::Device::of(ordinal));
    const std::lock_guard lock(mutex_);
    if (!absence.empty()) stats_.no_kernels = absence;
  }
}

DeviceStage::Claim DeviceStage::claim(std::uint32_t position) {
  if (position < cursor_.load(std::memory_order_acquire)) return Claim::kReady;
  const std::lock_guard lock(mutex_);
  if (position < cursor_) return Claim::kReady;
  if (!begun_) throw std::logic_error("a save of device memory was started before its copies were enqueued");
  return digests_known_ && within_rate() ? Claim::kNeedsSlot : Claim::kNotYet;
}

bool DeviceStage::provide(std::uint32_t position, mem::Slot& spare, const std::function<bool()>& claimed) {
  const std::lock_guard lock(mutex_);
  if (closed_ || torn_ || !claimed()) return false;
  if (position < cursor_) return true;
  enqueue_batch(&spare, 0);
  note_reads();
  return true;
}

std::optional<DeviceStage::Taken> DeviceStage::take(std::uint32_t position, LaneBooks& books) {
  if (!host_parts_.taken(position)) return std::nullopt;
  Taken taken;
  {
    const std::lock_guard lock(mutex_);
    if (closed_ || torn_ || position >= cursor_) return std::nullopt;
    Chunk& chunk = chunks_[position];
    if (!chunk.same && !ended(batches_[chunk.batch], books)) return std::nullopt;
    taken.slot = std::move(chunk.slot);
    taken.digest = queue(position).digest(position);
    if (++taken_ == chunks_.size()) note_sources_free(books);
  }
  if (taken.slot) host_parts_.put(position, taken.slot.data());
  return taken;
}

bool DeviceStage::ended(Batch& batch, LaneBooks& books) {
  if (batch.ended) return true;
  if (!std::all_of(batch.events.begin(), batch.events.end(),
                   [](const cuda::Event& event) { return event.done("save/batch"); })) {
    return false;
  }
  batch.ended = true;
  batch.events.clear();
  batch.buffers.clear();
  books.add(Stage::kDeviceCopy, batch.begin_ns, now_ns(), batch.nbytes);
  return true;
}

void DeviceStage::advance(LaneBooks& books) {
  if (all_enqueued() && sources_free()) return;
  const std::unique_lock lock(mutex_, std::try_to_lock);  // another lane is at it
  if (!lock || !begun_ || closed_ || torn_) return;
  if (!digests_known_) learn_digests(books);
  if (digests_known_ && !all_enqueued()) {
    enqueue_ahead();
    overflow();
  }
  note_reads();
  if (!all_read_ || sources_free_) return;
  for (const auto& entry : queues_) {
    if (!entry.second->sources_event().done("save/sources")) return;
  }
  note_sources_free(books);
}

void DeviceStage::learn_digests(LaneBooks& books) {
  for (const auto& entry : queues_) {
    if (!entry.second->digests_done()) return;
  }
  for (std::uint32_t position = 0; position < chunks_.size(); ++position) {
    const DeviceChunk& chunk = plan_.chunks[position];
    if (chunk.packed) continue;  // these are copied anyway, and compared then
    const std::optional<codec::Digest> digest = queue(position).digest(position);
    const codec::Digest* const base = digest ? expected_(chunk.chunk) : nullptr;
    if (base == nullptr || *base != *digest) continue;
    chunks_[position].same = true;
    queue(position).skip();
  }
  digests_known_ = true;
  cursor_.store(skip_same(0), std::memory_order_release);
  note_digests(books);
}

void DeviceStage::note_digests(LaneBooks& books) {
  if (stats_.digested_bytes > 0) books.add(Stage::kDeviceDigest, begin_ns_, now_ns(), stats_.digested_bytes);
}

// Once everything that reads them is enqueued, streams can wait for that.
void DeviceStage::note_reads() {
  if (all_read_) return;
  bool all = true;
  for (const auto& entry : queues_) {
    if (entry.second->all_read()) {
      entry.second->sources_event();
    } else {
      all = false;
    }
  }
  all_read_.store(all, std::memory_order_release);
}

void DeviceStage::note_sources_free(LaneBooks& books) {
  if (sources_free_.exchange(true)) return;
  if (!options_.two_phase) note_digests(books);
  if (stats_.gathered_bytes > 0) books.add(Stage::kGather, begin_ns_, now_ns(), stats_.gathered_bytes);
  if (stats_.overflow_bytes > 0) books.add(Stage::kOverflow, begin_ns_, now_ns(), stats_.overflow_bytes);
}

void DeviceStage::fence(cuda::Stream& stream) {
  const std::lock_guard lock(mutex_);
  if (sources_free_ || closed_) return;
  if (!all_read_) throw std::logic_error("a stream can wait for a snapshot once all of it is enqueued");
  if (stream.capturing()) {
    throw std::logic_error(
        "a stream that is being captured into a CUDA graph cannot wait for a snapshot; wait for staging_completion "
        "before the capture");
  }
  const auto found = queues_.find(stream.device().ordinal());
  if (found != queues_.end()) stream.wait(found->second->sources_event(), "save/fence");
}

DeviceStats DeviceStage::stats() const {
  const std::lock_guard lock(mutex_);
  return stats_;
}

void DeviceStage::close() noexcept {
  {
    const std::lock_guard lock(mutex_);
    if (std::exchange(closed_, true)) return;
  }
  bool drained = true;
  for (const auto& entry : queues_) drained &= entry.second->drain(options_.drain_patience);
  const std::lock_guard lock(mutex_);
  for (Chunk& chunk : chunks_) {
    if (!drained && !fault::skipped("keep", "save/hung_slots")) chunk.slot.forfeit();
    chunk.slot = {};
  }
  for (Batch& batch : batches_) {
    if (drained) continue;
    for (DeviceQueue::Buffer& buffer : batch.buffers) orphan(std::move(buffer), "save/hung_buffers");
  }
  batches_.clear();
  drained_.store(drained, std::memory_order_release);
}

}  // namespace snapstone::pipeline
