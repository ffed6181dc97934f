// The part of SaveJob that has to do with sources on devices.
#include <stdexcept>
#include <utility>

#include "base/clock.h"
#include "codec/digest.h"
#include "pipeline/engine.h"
#include "pipeline/save_job.h"

namespace snapstone::pipeline {

std::unique_ptr<DeviceStage> SaveJob::make_device_stage(DevicePlan plan) {
  DeviceStage::Expected expected;
  if (!base_.empty()) {
    expected = [this](std::uint32_t chunk) {
      const format::ChunkRecord* record = base_.record(chunk, layout_->chunks[chunk].raw_bytes);
      return record != nullptr ? &record->digest : nullptr;
    };
  }
  return std::make_unique<DeviceStage>(*layout_, sources_, std::move(plan), ring_, options_.device,
                                       Engine::instance().lane_count(), std::move(expected));
}

// Chunks of the host first, while devices copy theirs; but where a chunk's place depends on those before it, the order
// of chunks.
void SaveJob::order_claims() {
  if (places_in_turn()) return;
  claim_order_.reserve(layout_->chunks.size());
  for (const bool device : {false, true}) {
    for (std::uint32_t chunk = 0; chunk < layout_->chunks.size(); ++chunk) {
      if (on_device(chunk) == device) claim_order_.push_back(chunk);
    }
  }
}

void SaveJob::enqueue(const ProducerMark& mark) noexcept {
  if (!device_) return;
  try {
    device_->enqueue(mark);
  } catch (...) {
    fail(std::current_exception());
  }
  announce_staging();
}

bool SaveJob::wait_snapshot(std::chrono::milliseconds timeout) {
  std::unique_lock lock(mutex_);
  return changed_->wait_for(lock, timeout, [this] { return snapshot_enqueued() || finished(); });
}

void SaveJob::fence(cuda::Stream& stream) {
  if (device_ && !stopped() && !finished()) device_->fence(stream);
}

// Wakes those who wait for the snapshot to be enqueued, and for it to be taken; each once.
void SaveJob::announce_staging() {
  const int reached = staged() ? 2 : snapshot_enqueued() ? 1 : 0;
  if (reached <= announced_staging_.load(std::memory_order_relaxed)) return;
  std::lock_guard lock(mutex_);
  announced_staging_.store(reached, std::memory_order_relaxed);
  changed_->notify_all();
}

bool SaveJob::stage_from_device(std::uint64_t index, const DeviceStage::Taken& taken, LaneBooks& books) {
  const std::uint32_t raw_bytes = layout_->chunks[index].raw_bytes;
  const format::ChunkRecord* base = base_.record(index, raw_bytes);
  format::ChunkRecord record{};
  record.raw_bytes = record.stored_bytes = raw_bytes;
  bool same = !taken.slot;
  if (!same) {
    if (taken.digest) {
      record.digest = *taken.digest;
    } else {
      const std::int64_t begin = now_ns();
      record.digest = codec::digest({taken.slot.data(), raw_bytes});
      books.add(Stage::kDigest, begin, now_ns(), raw_bytes);
    }
    same = base != nullptr && record.digest == base->digest;
  }
  settle(index, same ? *base : record, same);
  return !same;
}

}  // namespace snapstone::pipeline
