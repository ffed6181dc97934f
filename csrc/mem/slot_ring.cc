#include "mem/slot_ring.h"

#include <algorithm>
#include <cassert>
#include <utility>

#include "base/limits.h"

namespace snapstone::mem {

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

SlotRing::SlotRing(std::uint64_t slot_bytes) : slot_bytes_(round_up(slot_bytes, kPageBytes)) {}

SlotRing::~SlotRing() { assert(free_.size() == slot_count_); }

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
  return std::all_of(memory_.begin(), memory_.end(), [](const os::MappedMemory& memory) { return memory.huge(); });
}

std::vector<Segment> SlotRing::segments() const {
  std::lock_guard lock(mutex_);
  std::vector<Segment> result;
  for (const os::MappedMemory& memory : memory_) result.push_back({memory.data(), memory.nbytes()});
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
    const int segment = static_cast<int>(memory_.size());
    free_.reserve(slot_count_ + count);  // so that release() never allocates
    for (std::uint64_t i = count; i-- > 0;) free_.push_back({memory.data() + i * slot_bytes_, segment});
    memory_.push_back(std::move(memory));
    slot_count_ += count;
    freed_.notify_all();
  }
}

Slot SlotRing::try_acquire() noexcept { return acquire(std::chrono::milliseconds(0)); }

Slot SlotRing::acquire(std::chrono::milliseconds timeout) noexcept {
  Slot slot;
  std::unique_lock lock(mutex_);
  if (free_.empty() && timeout.count() > 0) {
    freed_.wait_for(lock, timeout, [this] { return !free_.empty(); });
  }
  if (!free_.empty()) {
    slot.ring_ = this;
    slot.data_ = free_.back().data;
    slot.segment_ = free_.back().segment;
    free_.pop_back();
  }
  return slot;
}

void SlotRing::release(std::uint8_t* data, int segment) noexcept {
  {
    std::lock_guard lock(mutex_);
    free_.push_back({data, segment});
  }
  freed_.notify_one();
}

}  // namespace snapstone::mem
