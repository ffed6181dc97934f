#include "pipeline/device_landing.h"

#include <algorithm>
#include <utility>

#include "base/clock.h"

namespace snapstone::pipeline {

DeviceLanding::DeviceLanding(const LoadPlan& plan, std::int32_t ordinal, const LandingOptions& options,
                             TargetFence& fence, LaneBooks& books, LandingBatch::Mismatch mismatch)
    : plan_(plan),
      ordinal_(ordinal),
      options_(options),
      fence_(fence),
      books_(books),
      mismatch_(std::move(mismatch)),
      batches_max_(std::max<std::size_t>(options.batches, 1)) {}

DeviceLanding::~DeviceLanding() { give_up(); }

void DeviceLanding::open() {
  if (targets_) return;
  cuda::Device& device = cuda::Device::of(ordinal_);
  if (options_.kernels) kernels_ = cuda::Kernels::of(device);
  cuda::Stream stream(device);
  fence_.hold_back(stream);
  targets_ = std::move(stream);
}

bool DeviceLanding::make_batch() {
  if (batches_.size() == batches_max_) return false;
  auto batch = std::make_unique<LandingBatch>(plan_, ordinal_, kernels_, options_.batch_bytes, books_);
  if (!batch->can_verify() && kernels_ != nullptr) {  // no memory
    if (!batches_.empty()) {
      batches_max_ = batches_.size();
      return false;
    }
    kernels_ = nullptr;
  }
  batches_.push_back(std::move(batch));
  return true;
}

bool DeviceLanding::can_verify() {
  open();
  if (batches_.empty()) make_batch();
  return kernels_ != nullptr;
}

LandingBatch* DeviceLanding::batch_with_room() {
  open();
  const auto find = [this](auto wanted) {
    const auto found = std::find_if(batches_.begin(), batches_.end(), wanted);
    return found == batches_.end() ? nullptr : found->get();
  };
  if (LandingBatch* batch = find([](const auto& each) { return each->filling(); })) return batch;
  if (LandingBatch* batch = find([](const auto& each) { return each->free(); })) return batch;
  return make_batch() ? batches_.back().get() : nullptr;
}

bool DeviceLanding::add(const Arrived& arrived) {
  LandingBatch* batch = batch_with_room();
  if (batch == nullptr) return false;
  if (batch->add(arrived)) return true;
  flush(true);
  batch = batch_with_room();
  return batch != nullptr && batch->add(arrived);
}

void DeviceLanding::flush(bool at_once) {
  const bool works =
      std::any_of(batches_.begin(), batches_.end(), [](const auto& batch) { return batch->owes_host(); });
  if (works && !at_once) return;
  for (const auto& batch : batches_) {
    if (batch->filling()) placed_bytes_ += batch->submit(*targets_);
  }
}

bool DeviceLanding::advance() {
  bool moved = false;
  for (const auto& batch : batches_) {
    const LandingBatch::Progress progress = batch->advance(*targets_, mismatch_);
    placed_bytes_ += progress.placed_bytes;
    moved = moved || progress.moved;
  }
  return moved;
}

bool DeviceLanding::busy() const noexcept {
  return std::any_of(batches_.begin(), batches_.end(),
                     [](const auto& batch) { return batch->filling() || batch->owes_host(); });
}

// Nothing is noted where the host has seen the last write end: who comes after the host then comes after that, too.
void DeviceLanding::end() {
  if (!targets_) return;
  if (writes()) {
    cuda::Event landed(targets_->device());
    targets_->record(landed, "load/landed");
    for (const auto& batch : batches_) batch->end(&landed);
    fence_.note(ordinal_, std::move(landed));
  } else {
    for (const auto& batch : batches_) batch->end(nullptr);
  }
  batches_.clear();
  targets_.reset();
}

bool DeviceLanding::writes() const noexcept {
  return std::any_of(batches_.begin(), batches_.end(), [](const auto& batch) { return batch->writes_targets(); });
}

std::optional<cuda::Event> DeviceLanding::last_write() noexcept {
  try {
    cuda::Event landed(targets_->device());
    targets_->record(landed, "load/landed");
    return landed;
  } catch (...) {
    return std::nullopt;
  }
}

// Targets are the caller's to free once the job has ended: the end of their last write has to be known.
void DeviceLanding::give_up() noexcept {
  if (!targets_) return;
  const std::int64_t deadline_ns = now_ns() + std::chrono::nanoseconds(options_.patience).count();
  const bool host_waits =
      std::any_of(batches_.begin(), batches_.end(), [](const auto& batch) { return batch->needs_targets_drained(); });
  bool targets_drained = !writes() || (host_waits && drained(*targets_, deadline_ns));
  std::optional<cuda::Event> landed = targets_drained ? std::nullopt : last_write();
  if (!targets_drained && !landed) targets_drained = drained(*targets_, deadline_ns);
  for (const auto& batch : batches_) batch->give_up(landed ? &*landed : nullptr, targets_drained, deadline_ns);
  batches_.clear();
  targets_.reset();
  if (targets_drained) return;
  try {
    if (landed) return fence_.note(ordinal_, std::move(*landed));
  } catch (...) {
  }
  fence_.lose();
}

}  // namespace snapstone::pipeline
