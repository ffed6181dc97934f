#include "pipeline/landing_batch.h"

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <thread>
#include <utility>

#include "base/clock.h"
#include "base/error.h"
#include "base/fault_hook.h"
#include "base/limits.h"

namespace snapstone::pipeline {
namespace {

constexpr std::uint64_t kAlignment = 256;  // of chunks in the scratch, as the device's own allocations have
constexpr std::uint64_t kTableBytes = 256 << 10;
constexpr std::uint64_t kGatherBytesMax = 64 << 10;  // longer runs are copied by copies
constexpr std::size_t kLandingsMax = 1024;
constexpr std::chrono::microseconds kDrainPoll{200};

std::uint64_t address_of(const std::uint8_t* pointer) { return reinterpret_cast<std::uintptr_t>(pointer); }

cuda::BoxItem item_of(const StridedBlock& box, std::uint64_t scratch) {
  cuda::BoxItem item{};
  item.source = scratch + static_cast<std::uint64_t>(box.source);
  item.target = static_cast<std::uint64_t>(box.target);
  item.run_bytes = static_cast<std::uint32_t>(box.unit_bytes);
  item.dims = static_cast<std::uint32_t>(box.dims.size());
  for (std::size_t i = 0; i < box.dims.size(); ++i) {
    item.sizes[i] = static_cast<std::uint32_t>(box.dims[i].size);
    item.source_strides[i] = box.dims[i].source_stride;
    item.target_strides[i] = box.dims[i].target_stride;
  }
  return item;
}

std::uint64_t nbytes_of(const cuda::BoxItem& box) {
  std::uint64_t nbytes = box.run_bytes;
  for (std::size_t i = 0; i < box.dims; ++i) nbytes *= box.sizes[i];
  return nbytes;
}

template <typename Item>
void put(std::uint8_t* target, const std::vector<Item>& items) {
  if (!items.empty()) std::memcpy(target, items.data(), items.size() * sizeof(Item));
}

}  // namespace

std::uint64_t LandingBatch::Work::results_at() const {
  return round_up(boxes_at() + boxes.size() * sizeof(cuda::BoxItem), sizeof(codec::Digest));
}

std::uint64_t LandingBatch::Work::table_bytes() const { return results_at() + digests.size() * sizeof(codec::Digest); }

void LandingBatch::Work::clear() {
  to_scratch.clear();
  runs.clear();
  rows.clear();
  digests.clear();
  gathers.clear();
  boxes.clear();
}

LandingBatch::LandingBatch(const LoadPlan& plan, std::int32_t ordinal, const cuda::Kernels* kernels,
                           std::uint64_t capacity, LaneBooks& books)
    : plan_(plan),
      capacity_(std::max(round_up(capacity, kAlignment), 2 * round_up(plan.raw_bytes_max(), kAlignment))),
      books_(books),
      workspace_(DeviceWorkspace::lease(ordinal)),
      kernels_(kernels),
      copied_(workspace_->device()),
      verified_(workspace_->device()),
      placed_(workspace_->device()) {
  if (kernels_ != nullptr && !workspace_->reserve_table(capacity_ + kTableBytes)) kernels_ = nullptr;
}

LandingBatch::~LandingBatch() { give_up(nullptr, false, 0); }

bool LandingBatch::add(const Arrived& arrived) {
  if (landings_.size() == kLandingsMax) return false;
  if (!(can_verify() ? add_to_scratch(arrived) : add_to_targets(arrived))) return false;
  state_ = State::kFilling;
  return true;
}

bool LandingBatch::add_to_scratch(const Arrived& arrived) {
  const std::uint64_t nbytes = plan_.record(*arrived.chunk).raw_bytes;
  const Placement placement = place_on_device(plan_, *arrived.chunk, workspace_->device().ordinal());
  const std::uint64_t items = placement.runs.size() * sizeof(cuda::GatherItem) +
                              placement.boxes.size() * sizeof(cuda::BoxItem) + 4 * sizeof(codec::Digest);
  const bool fits = nbytes <= capacity_ - used_ && work_.table_bytes() + items <= kTableBytes;
  if (!fits && !landings_.empty()) return false;
  const std::uint8_t* source = arrived.raw;
  if (arrived.slot == nullptr) {
    std::memcpy(workspace_->host_table() + used_, arrived.raw, nbytes);
    source = workspace_->host_table() + used_;
  }
  const cuda::DevicePointer scratch = workspace_->device_table() + used_;
  work_.to_scratch.push_back({scratch, address_of(source), nbytes});
  if (arrived.unverified) work_.digests.push_back({scratch, nbytes});
  add_kernel_work(placement, scratch);
  used_ = std::min(round_up(used_ + nbytes, kAlignment), capacity_);
  keep(arrived, placement.nbytes);
  return true;
}

void LandingBatch::keep(const Arrived& arrived, std::uint64_t placed_bytes) {
  SharedSlot slot = fault::skipped("keep", "load/slots") ? nullptr : arrived.slot;
  landings_.push_back({arrived.chunk, std::move(slot), arrived.unverified, placed_bytes});
}

void LandingBatch::add_kernel_work(const Placement& placement, std::uint64_t scratch) {
  const auto has_room = [this](std::uint64_t nbytes) {
    return work_.table_bytes() + nbytes + sizeof(codec::Digest) <= kTableBytes;
  };
  Placement rest;  // a chunk of more pieces than the table holds
  for (const StridedBlock& box : placement.boxes) {
    if (has_room(sizeof(cuda::BoxItem))) {
      work_.boxes.push_back(item_of(box, scratch));
    } else {
      add_as_rows(box, rest);
    }
  }
  const auto add_run = [&](const cuda::Copy& run) {
    if (run.nbytes <= kGatherBytesMax && has_room(sizeof(cuda::GatherItem))) {
      work_.gathers.push_back({scratch + run.src, run.dst, run.nbytes});
    } else {
      work_.runs.push_back({run.dst, scratch + run.src, run.nbytes});
    }
  };
  const auto add_rows = [&](cuda::Copy2d rows) {
    rows.src += scratch;
    work_.rows.push_back(rows);
  };
  std::for_each(placement.runs.begin(), placement.runs.end(), add_run);
  std::for_each(rest.runs.begin(), rest.runs.end(), add_run);
  std::for_each(placement.rows.begin(), placement.rows.end(), add_rows);
  std::for_each(rest.rows.begin(), rest.rows.end(), add_rows);
}

bool LandingBatch::add_to_targets(const Arrived& arrived) {
  const std::uint64_t nbytes = round_up(plan_.record(*arrived.chunk).raw_bytes, kAlignment);
  const Placement placement =
      place_from_host(plan_, *arrived.chunk, workspace_->device().ordinal(), capacity_ - nbytes);
  if (nbytes + placement.packed_bytes > capacity_ - used_) return false;  // never if the batch is empty
  const std::uint8_t* raw = arrived.raw;
  std::uint8_t* const own = arrived.slot == nullptr || !placement.packs.empty() ? bounce() + used_ : nullptr;
  std::uint8_t* const packed = own + nbytes;
  if (arrived.slot == nullptr) {
    std::memcpy(own, arrived.raw, placement.raw_bytes);
    raw = own;
  }
  for (const Placement::Pack& pack : placement.packs) gather_block(pack.block, arrived.raw, packed + pack.at);
  const auto source = [&](std::uint64_t offset) {
    return offset < placement.raw_bytes ? address_of(raw) + offset : address_of(packed) + offset - placement.raw_bytes;
  };
  for (const cuda::Copy& run : placement.runs) work_.runs.push_back({run.dst, source(run.src), run.nbytes});
  for (cuda::Copy2d rows : placement.rows) {
    rows.src = source(rows.src);
    work_.rows.push_back(rows);
  }
  used_ = std::min(round_up(used_ + nbytes + placement.packed_bytes, kAlignment), capacity_);
  keep(arrived, placement.nbytes);
  return true;
}

// Registered if the driver agreed to that; copies out of it are slow if not.
std::uint8_t* LandingBatch::bounce() {
  if (workspace_->host_table_bytes() < capacity_) workspace_->reserve_table(capacity_ + kTableBytes);
  if (workspace_->host_table_bytes() < capacity_) throw OsError(ENOMEM, "mmap", "", 0, capacity_);
  return workspace_->host_table();
}

std::uint64_t LandingBatch::submit(cuda::Stream& targets) {
  if (can_verify()) {
    submit_to_scratch();
    return 0;
  }
  submit_to_targets(targets);
  return placed_bytes();
}

void LandingBatch::submit_to_scratch() {
  state_ = State::kVerifying;
  begin_ns_ = now_ns();
  cuda::Stream& stream = workspace_->stream();
  if (const std::uint64_t nbytes = work_.results_at(); nbytes > 0) {
    put(host_table(), work_.digests);
    put(host_table() + work_.gathers_at(), work_.gathers);
    put(host_table() + work_.boxes_at(), work_.boxes);
    work_.to_scratch.push_back({device_table(), address_of(host_table()), nbytes});
  }
  cuda::copy_to_device(stream, work_.to_scratch);
  stream.record(copied_, "load/copied");
  if (!work_.digests.empty()) {
    const std::uint64_t results = work_.results_at();
    kernels_->digest(stream, device_table(), work_.digests.size(), device_table() + results);
    const cuda::Copy back{address_of(host_table() + results), device_table() + results,
                          work_.digests.size() * sizeof(codec::Digest)};
    cuda::copy_to_host(stream, {&back, 1});
  }
  stream.record(verified_, "load/verified");
}

void LandingBatch::submit_to_targets(cuda::Stream& targets) {
  state_ = State::kPlacing;
  begin_ns_ = now_ns();
  cuda::copy_to_device(targets, work_.runs);
  for (const cuda::Copy2d& rows : work_.rows) cuda::copy_2d(targets, cuda::Direction::kToDevice, rows);
  targets.record(placed_, "load/placed");
}

LandingBatch::Progress LandingBatch::advance(cuda::Stream& targets, const Mismatch& mismatch) {
  if (state_ == State::kVerifying) {
    const bool verified = verified_.done("load/verified");  // and copied, then
    const bool copied = !copied_noted_ && (verified || copied_.done("load/copied"));
    if (copied) note_copied();
    if (!verified) return {copied, 0};
    compare(mismatch);
    place_from_scratch(targets);
    return {true, placed_bytes()};
  }
  if (state_ == State::kPlacing && placed_.done("load/placed")) {
    if (!copied_noted_) note_copied();
    reset();
    return {true, 0};
  }
  return {};
}

void LandingBatch::compare(const Mismatch& mismatch) const {
  std::uint64_t nbytes = 0;
  for (const cuda::DigestItem& item : work_.digests) nbytes += item.nbytes;
  if (nbytes > 0) books_.add(Stage::kDeviceDigest, begin_ns_, now_ns(), nbytes);
  const std::uint8_t* result = host_table() + work_.results_at();
  for (const Landing& landing : landings_) {
    if (!landing.unverified) continue;
    codec::Digest actual;
    std::memcpy(actual.data(), result, actual.size());
    result += actual.size();
    if (actual != plan_.record(*landing.chunk).digest) mismatch(*landing.chunk, actual);
  }
}

void LandingBatch::place_from_scratch(cuda::Stream& targets) {
  state_ = State::kPlacing;
  cuda::copy_on_device(targets, work_.runs);
  for (const cuda::Copy2d& rows : work_.rows) cuda::copy_2d(targets, cuda::Direction::kOnDevice, rows);
  std::uint64_t run_max = 0;
  for (const cuda::GatherItem& run : work_.gathers) run_max = std::max(run_max, run.nbytes);
  if (run_max > 0) kernels_->gather(targets, device_table() + work_.gathers_at(), work_.gathers.size(), run_max);
  std::uint64_t box_max = 0;
  for (const cuda::BoxItem& box : work_.boxes) box_max = std::max(box_max, nbytes_of(box));
  if (box_max > 0) kernels_->scatter(targets, device_table() + work_.boxes_at(), work_.boxes.size(), box_max);
  targets.record(placed_, "load/placed");
}

std::uint64_t LandingBatch::placed_bytes() const {
  std::uint64_t nbytes = 0;
  for (const Landing& landing : landings_) nbytes += landing.placed_bytes;
  return nbytes;
}

void LandingBatch::note_copied() {
  std::uint64_t nbytes = 0;
  for (const Landing& landing : landings_) nbytes += plan_.record(*landing.chunk).raw_bytes;
  books_.add(Stage::kDeviceCopy, begin_ns_, now_ns(), nbytes);
  copied_noted_ = true;
  let_go_of_slots();
}

void LandingBatch::let_go_of_slots() noexcept {
  for (Landing& landing : landings_) landing.slot.reset();
}

void LandingBatch::reset() noexcept {
  let_go_of_slots();
  landings_.clear();
  work_.clear();
  used_ = 0;
  copied_noted_ = false;
  state_ = State::kFree;
}

void LandingBatch::end(const cuda::Event* landed) {
  if (writes_targets()) workspace_->stream().wait(*landed, "load/scratch");
  reset();
  DeviceWorkspace::give_back(std::move(workspace_));
}

void LandingBatch::give_up(const cuda::Event* landed, bool targets_drained, std::int64_t deadline_ns) noexcept {
  if (workspace_ == nullptr) return;
  bool host_free = true;
  bool device_free = true;
  if (state_ == State::kVerifying || state_ == State::kPlacing) {
    const bool own_drained = !can_verify() || drained(workspace_->stream(), deadline_ns);
    host_free = own_drained && (can_verify() || targets_drained);
    device_free = own_drained && (state_ == State::kVerifying || targets_drained || follows(landed));
  }
  if (!host_free) {
    for (const Landing& landing : landings_) {
      if (landing.slot != nullptr && !fault::skipped("keep", "load/hung_slots")) landing.slot->forfeit();
    }
  }
  reset();
  if (host_free && device_free) {
    DeviceWorkspace::give_back(std::move(workspace_));
  } else {
    DeviceWorkspace::abandon(std::move(workspace_), "load/hung_workspace");
  }
}

bool LandingBatch::follows(const cuda::Event* landed) noexcept {
  if (landed == nullptr || !can_verify()) return false;
  try {
    workspace_->stream().wait(*landed, "load/scratch");
    return true;
  } catch (...) {
    return false;
  }
}

bool drained(cuda::Stream& stream, std::int64_t deadline_ns) noexcept {
  for (int attempt = 0; attempt < 2; ++attempt) {  // one call may fail and the device be well
    try {
      cuda::Event all(stream.device());
      stream.record(all, "load/drained");
      while (!all.done("load/drained")) {
        if (now_ns() >= deadline_ns) return false;
        std::this_thread::sleep_for(kDrainPoll);
      }
      return true;
    } catch (...) {
    }
  }
  return false;
}

}  // namespace snapstone::pipeline
