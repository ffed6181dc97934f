// The part of DeviceStage that fills slots: batches of copies, ahead of the lanes or for one of them, and the overflow.
#include <algorithm>
#include <cstring>
#include <utility>

#include "base/clock.h"
#include "base/fault_hook.h"
#include "pipeline/device_stage.h"

namespace snapstone::pipeline {
namespace {

constexpr std::uint64_t kOverflowUnitBytes = 256 << 20;  // device memory is given back in pieces of this size
constexpr std::uint64_t kFreeSlots = 16;  // for claimed chunks, in a ring that has plenty: to keep a disk busy

}  // namespace

std::uint32_t DeviceStage::skip_same(std::uint32_t position) const {
  while (position < chunks_.size() && chunks_[position].same) ++position;
  return position;
}

// R, or nothing when the ring is too small to enqueue ahead.
std::optional<std::uint64_t> DeviceStage::leave_ahead() const {
  const std::uint64_t slots = ring_->slot_count();
  const std::uint64_t least = 2 * lanes_;
  if (slots <= least) return std::nullopt;
  return std::max(least, std::min(kFreeSlots, slots / 4));
}

// How many chunks from the cursor on, of one device, one run of slots could take.
std::uint64_t DeviceStage::run_wanted() const {
  const std::uint64_t most = std::max<std::uint64_t>(1, options_.dma_bytes / ring_->slot_bytes());
  const DeviceChunk& first = plan_.chunks[cursor_];
  if (first.shared) return 1;
  std::uint64_t count = 0;
  for (std::uint32_t position = cursor_; position < chunks_.size() && count < most; ++position) {
    const DeviceChunk& chunk = plan_.chunks[position];
    if (chunk.device != first.device || chunk.shared) break;
    if (!chunks_[position].same) ++count;
  }
  return count;
}

bool DeviceStage::within_rate() const {
  if (options_.dma_gbps <= 0) return true;
  const double allowed = options_.dma_gbps * static_cast<double>(now_ns() - begin_ns_);  // GB/s are bytes per ns
  return static_cast<double>(stats_.copied_bytes) <= allowed;
}

void DeviceStage::enqueue_ahead() {
  const std::optional<std::uint64_t> leave = leave_ahead();
  if (!leave) return;
  // Slots come back one by one: a few are awaited, since one copy of many costs less than many copies of one.
  const std::uint64_t patience = std::max<std::uint64_t>(1, (ring_->slot_count() - *leave) / 4);
  while (!all_enqueued() && within_rate()) {
    if (ring_->free_count() < *leave + std::min(run_wanted(), patience)) return;
    if (!enqueue_batch(nullptr, *leave)) return;
  }
}

// One batch from the cursor on, into the slot of a lane or into free ones. False when there are none.
bool DeviceStage::enqueue_batch(mem::Slot* spare, std::uint64_t leave) {
  torn_ = true;  // until the event that the batch ends with is recorded
  const std::uint32_t begin = cursor_;
  const std::uint64_t copied = stats_.copied_bytes;
  Batch& batch = batches_.emplace_back();
  batch.begin_ns = now_ns();
  if (plan_.chunks[begin].shared) {
    fill_shared(batch, spare, leave);
  } else {
    fill(batch, spare, leave);
  }
  batch.nbytes = stats_.copied_bytes - copied;
  if (cursor_ == begin) batches_.pop_back();
  torn_ = false;
  return cursor_ != begin;
}

std::vector<mem::Slot> DeviceStage::slots_for(std::uint64_t wanted, mem::Slot* spare, std::uint64_t leave) {
  if (spare == nullptr) return ring_->acquire_run(wanted, leave);
  std::vector<mem::Slot> run;
  run.push_back(std::move(*spare));
  return run;
}

void DeviceStage::fill(Batch& batch, mem::Slot* spare, std::uint64_t leave) {
  const std::int32_t device = plan_.chunks[cursor_].device;
  DeviceQueue& queue = *queues_.at(device);
  const cuda::Scope scope(cuda::Device::of(device));
  copies_.clear();
  std::uint64_t nbytes = 0;
  // A rate is kept from batch to batch, so that these are short then.
  const std::uint64_t most = options_.dma_gbps > 0 ? options_.dma_bytes : options_.batch_bytes;
  const auto more = [&] {
    return !all_enqueued() && nbytes < most && plan_.chunks[cursor_].device == device && !plan_.chunks[cursor_].shared;
  };
  while (more()) {
    std::vector<mem::Slot> run = slots_for(run_wanted(), spare, leave);
    for (mem::Slot& slot : run) {
      const std::uint32_t position = cursor_;
      nbytes += raw_bytes(position);
      std::uint8_t* const data = place(position, std::move(slot), !queue.gathers(position));
      queue.append_copies(position, data, copies_, stats_);
      DeviceQueue::Buffer buffer = queue.give_up_buffer(position);
      const bool new_one = batch.buffers.empty() || batch.buffers.back() != buffer;
      if (buffer && new_one && !fault::skipped("keep", "save/buffers")) batch.buffers.push_back(std::move(buffer));
      cursor_.store(skip_same(position + 1), std::memory_order_release);
    }
    if (run.empty() || spare != nullptr) break;
  }
  if (nbytes == 0) return;
  queue.enqueue(copies_);
  batch.events.push_back(queue.record("save/batch"));
}

void DeviceStage::fill_shared(Batch& batch, mem::Slot* spare, std::uint64_t leave) {
  std::vector<mem::Slot> run = slots_for(1, spare, leave);
  if (run.empty()) return;
  const std::uint32_t position = cursor_;
  std::uint8_t* const data = place(position, std::move(run[0]), true);
  for (const auto& entry : queues_) {
    copies_.clear();
    entry.second->append_copies(position, data, copies_, stats_);
    if (copies_.empty()) continue;
    entry.second->enqueue(copies_);
    batch.events.push_back(entry.second->record("save/batch"));
  }
  cursor_.store(skip_same(position + 1), std::memory_order_release);
}

// Gives a chunk its slot. `bare`: nothing but pieces is copied there, and what lies between them has to be zero.
std::uint8_t* DeviceStage::place(std::uint32_t position, mem::Slot slot, bool bare) {
  const DeviceChunk& planned = plan_.chunks[position];
  std::uint8_t* const data = slot.data();
  const std::uint64_t nbytes = raw_bytes(position) - planned.host_bytes;
  stats_.copied_bytes += nbytes;
  if (!ring_->registered(slot.segment())) stats_.unregistered_bytes += nbytes;
  if (bare) {
    for_each_gap(pieces_of(layout_, planned.chunk),
                 [&](std::uint64_t at, std::uint64_t gap) { std::memset(data + at, 0, gap); });
  }
  chunks_[position].slot = std::move(slot);
  chunks_[position].batch = static_cast<std::uint32_t>(batches_.size() - 1);
  return data;
}

void DeviceStage::overflow() {
  if (overflowed_ || all_enqueued() || options_.overflow_fraction <= 0 || !within_rate()) return;
  torn_ = overflowed_ = true;
  for (const auto& entry : queues_) overflow_on(*entry.second);
  torn_ = false;
}

void DeviceStage::overflow_on(DeviceQueue& queue) {
  double room = options_.overflow_fraction * static_cast<double>(queue.free_bytes());
  const cuda::Scope scope(cuda::Device::of(queue.ordinal()));
  std::vector<std::uint32_t> unit;
  std::uint64_t unit_bytes = 0;
  const auto put_aside = [&] {
    if (unit.empty()) return true;
    const bool done = queue.put_aside(unit, stats_);
    unit.clear();
    unit_bytes = 0;
    return done;
  };
  for (std::uint32_t position = cursor_; position < chunks_.size(); ++position) {
    if (chunks_[position].same || !queue.can_put_aside(position)) continue;
    const std::uint64_t nbytes = raw_bytes(position);
    if (static_cast<double>(nbytes) > room) break;
    if (unit_bytes + nbytes > kOverflowUnitBytes && !put_aside()) return;
    unit.push_back(position);
    unit_bytes += nbytes;
    room -= static_cast<double>(nbytes);
  }
  put_aside();
}

}  // namespace snapstone::pipeline
