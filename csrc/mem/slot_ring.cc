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
      segment_(other.segment_),
      number_(other.number_) {}

Slot& Slot::operator=(Slot&& other) noexcept {
  if (this != &other) {
    if (ring_ != nullptr) ring_->release(number_);
    ring_ = std::exchange(other.ring_, nullptr);
    data_ = std::exchange(other.data_, nullptr);
    segment_ = other.segment_;
    number_ = other.number_;
  }
  return *this;
}

Slot::~Slot() {
  if (ring_ != nullptr) ring_->release(number_);
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
  assert(inherited || free_count_ == slot_count_);
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
  return free_count_;
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

void SlotRing::reserve(std::uint64_t slots, int numa_node) {
  std::lock_guard growing(grow_mutex_);
  while (true) {
    const std::uint64_t have = slot_count();
    if (have >= slots) return;
    const std::uint64_t per_segment = std::max<std::uint64_t>(1, kSegmentBytes / slot_bytes_);
    const std::uint64_t count = std::min(slots - have, per_segment);
    os::MappedMemory memory(count * slot_bytes_, numa_node);  // touches every page: outside the lock
    std::lock_guard lock(mutex_);
    const auto first = static_cast<std::uint32_t>(places_.size());
    places_.reserve(first + count);
    registered_.reserve(registered_.size() + 1);
    memory_->segments.push_back(std::move(memory));
    registered_.push_back(Registered::kNot);
    const int segment = static_cast<int>(memory_->segments.size()) - 1;
    std::uint8_t* data = memory_->segments.back().data();
    for (std::uint64_t i = 0; i < count; ++i) places_.push_back({data + i * slot_bytes_, segment, false, kNone, kNone});
    for (std::uint64_t i = count; i-- > 0;) push(first + static_cast<std::uint32_t>(i));
    slot_count_ += count;
    freed_->notify_all();
  }
}

void SlotRing::register_with(cuda::Device& device) {
  std::lock_guard registering(register_mutex_);
  while (register_next(device)) {
  }
}

bool SlotRing::register_next(cuda::Device& device) {
  std::size_t segment = 0;
  Segment memory{};
  {
    std::lock_guard lock(mutex_);
    const auto next = std::find(registered_.begin(), registered_.end(), Registered::kNot);
    if (next == registered_.end()) return false;
    segment = static_cast<std::size_t>(next - registered_.begin());
    memory = {memory_->segments[segment].data(), memory_->segments[segment].nbytes()};
  }
  std::string refusal;
  auto registration = cuda::HostRegistration::of(device, memory.data, memory.nbytes, &refusal);
  std::lock_guard lock(mutex_);
  if (registration) {
    memory_->registrations.push_back(std::move(*registration));
    registered_[segment] = Registered::kDone;
  } else {
    registered_[segment] = Registered::kRefused;
    refusal_ = std::move(refusal);
  }
  return true;
}

bool SlotRing::registered() const {
  std::lock_guard lock(mutex_);
  return !registered_.empty() && std::all_of(registered_.begin(), registered_.end(),
                                             [](Registered registered) { return registered == Registered::kDone; });
}

bool SlotRing::registered(int segment) const {
  std::lock_guard lock(mutex_);
  return registered_.at(static_cast<std::size_t>(segment)) == Registered::kDone;
}

RegisteredBytes SlotRing::registered_bytes() const {
  std::lock_guard lock(mutex_);
  RegisteredBytes result;
  for (std::size_t i = 0; i < registered_.size(); ++i) {
    const std::uint64_t nbytes = memory_->segments[i].nbytes();
    if (registered_[i] == Registered::kDone) result.registered += nbytes;
    if (registered_[i] == Registered::kRefused) result.refused += nbytes;
  }
  result.refusal = refusal_;
  return result;
}

Slot SlotRing::try_acquire() noexcept { return acquire(std::chrono::milliseconds(0)); }

Slot SlotRing::acquire(std::chrono::milliseconds timeout) noexcept {
  std::unique_lock lock(mutex_);
  if (free_count_ == 0 && timeout.count() > 0) {
    freed_->wait_for(lock, timeout, [this] { return free_count_ > 0; });
  }
  return free_count_ > 0 ? take(freed_last_) : Slot();
}

std::vector<Slot> SlotRing::acquire_run(std::uint64_t most, std::uint64_t leave) {
  std::vector<Slot> run;
  std::lock_guard lock(mutex_);
  if (free_count_ <= leave || most == 0) return run;
  const std::uint64_t limit = std::min(most, free_count_ - leave);
  const int segment = places_[freed_last_].segment;
  std::uint32_t begin = freed_last_;
  std::uint32_t end = freed_last_ + 1;
  while (end - begin < limit && free_in(end, segment)) ++end;
  while (end - begin < limit && begin > 0 && free_in(begin - 1, segment)) --begin;
  run.reserve(end - begin);
  for (std::uint32_t number = begin; number < end; ++number) run.push_back(take(number));
  return run;
}

bool SlotRing::free_in(std::uint32_t number, int segment) const noexcept {
  return number < places_.size() && places_[number].free && places_[number].segment == segment;
}

void SlotRing::push(std::uint32_t number) noexcept {
  Place& place = places_[number];
  place.free = true;
  place.freed_before = freed_last_;
  place.freed_after = kNone;
  if (freed_last_ != kNone) places_[freed_last_].freed_after = number;
  freed_last_ = number;
  ++free_count_;
}

Slot SlotRing::take(std::uint32_t number) noexcept {
  Place& place = places_[number];
  place.free = false;
  if (place.freed_before != kNone) places_[place.freed_before].freed_after = place.freed_after;
  (place.freed_after != kNone ? places_[place.freed_after].freed_before : freed_last_) = place.freed_before;
  --free_count_;
  Slot slot;
  slot.ring_ = this;
  slot.data_ = place.data;
  slot.segment_ = place.segment;
  slot.number_ = number;
  return slot;
}

// Notifies under the lock: whoever sees the slot back may destroy the ring.
void SlotRing::release(std::uint32_t number) noexcept {
  std::lock_guard lock(mutex_);
  push(number);
  freed_->notify_one();
}

void SlotRing::forfeit() noexcept {
  std::lock_guard lock(mutex_);
  forfeited_ = true;
  --slot_count_;
}

}  // namespace snapstone::mem
