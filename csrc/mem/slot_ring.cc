#include "mem/slot_ring.h"

#include <algorithm>
#include <cassert>
#include <stdexcept>
#include <string>
#include <utility>

#include "base/limits.h"
#include "os/process.h"

namespace snapstone::mem {
namespace {

std::uint64_t checked_slot_bytes(std::uint64_t slot_bytes) {
  if (slot_bytes == 0 || slot_bytes > kChunkBytesMax) {
    throw std::invalid_argument("slot_bytes=" + std::to_string(slot_bytes) + ": must be between 1 and " +
                                std::to_string(kChunkBytesMax));
  }
  return round_up(slot_bytes, kPageBytes);
}

}  // namespace

Slot::Slot(Slot&& other) noexcept
    : ring_(std::exchange(other.ring_, nullptr)),
      data_(std::exchange(other.data_, nullptr)),
      segment_(other.segment_) {}

Slot& Slot::operator=(Slot&& other) noexcept {
  if (this != &other) {
    if (ring_ != nullptr) ring_->release(data_, segment_);
    ring_ = std::exchange(other.ring_, nullptr);
    data_ = std::exchange(other.data_, nullptr);
    segment_ = other.segment_;
  }
  return *this;
}

Slot::~Slot() {
  if (ring_ != nullptr) ring_->release(data_, segment_);
}

void Slot::forfeit() noexcept {
  if (ring_ != nullptr) std::exchange(ring_, nullptr)->forfeit();
  data_ = nullptr;
}

SlotRing::SlotRing(std::uint64_t slot_bytes)
    : slot_bytes_(checked_slot_bytes(slot_bytes)),
      process_id_(os::process_id()),
      freed_(std::make_unique<std::condition_variable>()),
      memory_(std::make_unique<Memory>()) {}

constinit std::atomic<SlotRing::Memory*> SlotRing::kept_{nullptr};

SlotRing::~SlotRing() {
  const bool inherited = process_id_ != os::process_id();
  assert(inherited || free_.size() == slot_count_);
  // The kernel may still write into a forfeited slot. In a forked child the memory is not mapped, and something else
  // may lie at its addresses; and destroying a condition on which a thread waited at the fork waits for that thread.
  if (inherited || forfeited_) {
    memory_->kept_before = kept_.exchange(memory_.get());
    memory_.release();
  }
  if (inherited) freed_.release();
}

std::uint64_t SlotRing::slot_count() const {
  std::lock_guard lock(mutex_);
  return slot_count_;
}

std::uint64_t SlotRing::free_count() const {
  std::lock_guard lock(mutex_);
  return free_.size();
}

std::uint64_t SlotRing::nbytes() const { return slot_count() * slot_bytes_; }

bool SlotRing::huge() const {
  std::lock_guard lock(mutex_);
  const auto& segments = memory_->segments;
  return std::all_of(segments.begin(), segments.end(), [](const os::MappedMemory& memory) { return memory.huge(); });
}

std::vector<Segment> SlotRing::segments() const {
  std::lock_guard lock(mutex_);
  std::vector<Segment> result;
  for (const os::MappedMemory& memory : memory_->segments) result.push_back({memory.data(), memory.nbytes()});
  return result;
}

void SlotRing::reserve(std::uint64_t slots) {
  std::lock_guard growing(grow_mutex_);
  while (true) {
    const std::uint64_t have = slot_count();
    if (have >= slots) return;
    const std::uint64_t per_segment = std::max<std::uint64_t>(1, kSegmentBytes / slot_bytes_);
    const std::uint64_t count = std::min(slots - have, per_segment);
    os::MappedMemory memory(count * slot_bytes_);  // touches every page: outside the lock
    std::lock_guard lock(mutex_);
    free_.reserve(slot_count_ + count);  // so that release() never allocates
    memory_->segments.push_back(std::move(memory));
    const int segment = static_cast<int>(memory_->segments.size()) - 1;
    std::uint8_t* data = memory_->segments.back().data();
    for (std::uint64_t i = count; i-- > 0;) free_.push_back({data + i * slot_bytes_, segment});
    slot_count_ += count;
    freed_->notify_all();
  }
}

Slot SlotRing::try_acquire() noexcept { return acquire(std::chrono::milliseconds(0)); }

Slot SlotRing::acquire(std::chrono::milliseconds timeout) noexcept {
  Slot slot;
  std::unique_lock lock(mutex_);
  if (free_.empty() && timeout.count() > 0) {
    freed_->wait_for(lock, timeout, [this] { return !free_.empty(); });
  }
  if (!free_.empty()) {
    slot.ring_ = this;
    slot.data_ = free_.back().data;
    slot.segment_ = free_.back().segment;
    free_.pop_back();
  }
  return slot;
}

// Notifies under the lock: whoever sees the slot back may destroy the ring.
void SlotRing::release(std::uint8_t* data, int segment) noexcept {
  std::lock_guard lock(mutex_);
  free_.push_back({data, segment});
  freed_->notify_one();
}

void SlotRing::forfeit() noexcept {
  std::lock_guard lock(mutex_);
  forfeited_ = true;
  --slot_count_;
}

}  // namespace snapstone::mem
