#include "pipeline/device_queue.h"

#include <algorithm>
#include <cstring>
#include <thread>
#include <utility>

#include "base/clock.h"
#include "base/limits.h"
#include "cuda/kernel_parameters.h"
#include "pipeline/orphans.h"

namespace snapstone::pipeline {
namespace {

constexpr std::uint64_t kScratchAlignBytes = 256;
constexpr std::uint64_t kDigestBytes = sizeof(codec::Digest);
constexpr std::chrono::microseconds kDrainPoll{50};

std::uint64_t aligned(std::uint64_t nbytes) { return round_up(nbytes, kScratchAlignBytes); }

}  // namespace

DeviceQueue::DeviceQueue(const format::Layout& layout, const SaveSources& sources, const DevicePlan& plan,
                         std::int32_t device, const DeviceOptions& options)
    : layout_(layout),
      sources_(sources),
      plan_(plan),
      ordinal_(device),
      options_(options),
      workspace_(DeviceWorkspace::lease(device)),
      states_(plan.chunks.size()) {
  for (std::uint32_t position = 0; position < states_.size(); ++position) {
    const auto found = pieces(position);
    const bool touched = chunk(position).device == device ||
                         (chunk(position).shared &&
                          std::any_of(found.begin(), found.end(), [&](const auto& piece) { return here(piece); }));
    unread_ += touched ? 1 : 0;
  }
}

DeviceQueue::~DeviceQueue() { drain(options_.drain_patience); }

void DeviceQueue::begin(const cuda::Event& producer, DeviceStats& stats) {
  const cuda::Scope scope(workspace_->device());
  stream().wait(producer, "save/producer");
  kernels_ = cuda::Kernels::loaded(workspace_->device());  // loading takes too long for the step path
  if (kernels_ == nullptr) {
    stats.no_kernels = "not loaded before the save";
    return;
  }
  plan_kernels();
  if (!plan_table()) {
    stats.no_kernels = "no memory that the device reaches by DMA, or none on the device";
    kernels_ = nullptr;
    for (State& state : states_) state = {};
    groups_.clear();
    scratch_.reset();
    return;
  }
  if (digests_at_ == 0) return;  // nothing for kernels to do
  fill_table();
  const cuda::Copy upload{workspace_->device_table(), reinterpret_cast<std::uintptr_t>(workspace_->host_table()),
                          digests_at_};
  cuda::copy_to_device(stream(), {&upload, 1});
  if (whole_count_ > 0) digest_whole_chunks(stats);
  if (groups_.size() == 1) gather_next_group(stats);
}

void DeviceQueue::plan_kernels() {
  const std::vector<std::uint32_t> grouped = plan_groups();
  if (!options_.digests) return;
  for (std::uint32_t position = 0; position < states_.size(); ++position) {
    if (mine(position) && !chunk(position).packed) digested_.push_back(position);
  }
  whole_count_ = static_cast<std::uint32_t>(digested_.size());
  std::size_t at = 0;
  for (Group& group : groups_) {
    group.first_digest = static_cast<std::uint32_t>(digested_.size());
    for (std::size_t i = 0; i < group.positions.size(); ++i, ++at) {
      if (chunk(grouped[at]).host_bytes == 0) digested_.push_back(grouped[at]);
    }
    group.digest_count = static_cast<std::uint32_t>(digested_.size()) - group.first_digest;
  }
  for (std::uint32_t i = 0; i < digested_.size(); ++i) states_[digested_[i]].digest = i;
}

// All groups' positions. None are gathered when the device has no memory for that.
std::vector<std::uint32_t> DeviceQueue::plan_groups() {
  std::vector<std::uint32_t> packed;
  std::uint64_t nbytes = 0;
  for (std::uint32_t position = 0; position < states_.size(); ++position) {
    if (!mine(position) || !chunk(position).packed) continue;
    packed.push_back(position);
    nbytes += aligned(raw_bytes(position));
  }
  if (packed.empty()) return packed;
  std::uint64_t scratch_bytes = std::min(nbytes, std::max(options_.scratch_bytes, aligned(layout_.chunk_bytes)));
  if (nbytes > scratch_bytes && options_.overflow_fraction > 0 &&
      static_cast<double>(nbytes) <= options_.overflow_fraction * static_cast<double>(free_bytes())) {
    scratch_bytes = nbytes;  // one group: the snapshot of all packed chunks is taken at once
  }
  std::optional<cuda::DeviceBuffer> scratch = cuda::DeviceBuffer::allocate(stream(), scratch_bytes);
  if (!scratch) return {};
  scratch_ = std::make_shared<cuda::DeviceBuffer>(std::move(*scratch));
  std::uint64_t filled = scratch_bytes;
  for (const std::uint32_t position : packed) {
    const std::uint64_t wanted = aligned(raw_bytes(position));
    if (filled + wanted > scratch_bytes) {
      groups_.emplace_back().first_item = item_count_;
      filled = 0;
    }
    filled += wanted;
    Group& group = groups_.back();
    group.positions.push_back(position);
    for (const format::Piece& piece : pieces(position)) {
      if (!here(piece)) continue;
      ++item_count_;
      group.item_bytes_max = std::max(group.item_bytes_max, nbytes_of(piece));
    }
    for_each_gap(pieces(position), [&](std::uint64_t, std::uint64_t) { ++item_count_; });
    group.item_count = item_count_ - group.first_item;
    states_[position].in_group = true;
  }
  return packed;
}

bool DeviceQueue::plan_table() {
  if (digested_.empty() && item_count_ == 0) return true;
  gather_items_at_ = digested_.size() * sizeof(cuda::DigestItem);
  zeros_at_ = gather_items_at_ + item_count_ * sizeof(cuda::GatherItem);
  digests_at_ = round_up(zeros_at_ + kPackAlignBytes, kPageBytes);
  return workspace_->reserve_table(digests_at_ + digested_.size() * kDigestBytes);
}

void DeviceQueue::fill_table() {
  std::uint8_t* const table = workspace_->host_table();
  auto* digest_items = reinterpret_cast<cuda::DigestItem*>(table);
  auto* gather_item = reinterpret_cast<cuda::GatherItem*>(table + gather_items_at_);
  std::memset(table + zeros_at_, 0, kPackAlignBytes);
  for (std::uint32_t i = 0; i < whole_count_; ++i) {
    const std::uint32_t position = digested_[i];
    digest_items[i] = {sources_.device_address(pieces(position)[0]), raw_bytes(position)};
  }
  for (const Group& group : groups_) {
    std::uint64_t target = scratch_->address();
    for (const std::uint32_t position : group.positions) {
      for (const format::Piece& piece : pieces(position)) {
        if (here(piece)) *gather_item++ = {sources_.device_address(piece), target + piece.at, nbytes_of(piece)};
      }
      for_each_gap(pieces(position), [&](std::uint64_t at, std::uint64_t nbytes) {
        *gather_item++ = {workspace_->device_table() + zeros_at_, target + at, nbytes};
      });
      const std::uint32_t digest = states_[position].digest;
      if (digest != kNoDigest) digest_items[digest] = {target, raw_bytes(position)};
      target += aligned(raw_bytes(position));
    }
  }
}

void DeviceQueue::digest_whole_chunks(DeviceStats& stats) {
  digest_on_device(0, whole_count_);
  digests_event_ = record("save/digests");
  for (std::uint32_t i = 0; i < whole_count_; ++i) stats.digested_bytes += raw_bytes(digested_[i]);
}

void DeviceQueue::digest_on_device(std::uint32_t first, std::uint32_t count) {
  if (count == 0) return;
  const cuda::DevicePointer table = workspace_->device_table();
  const std::uint64_t at = digests_at_ + first * kDigestBytes;
  kernels_->digest(stream(), table + first * sizeof(cuda::DigestItem), count, table + at);
  const cuda::Copy fetch{reinterpret_cast<std::uintptr_t>(workspace_->host_table() + at), table + at,
                         count * kDigestBytes};
  cuda::copy_to_host(stream(), {&fetch, 1});
}

void DeviceQueue::gather_next_group(DeviceStats& stats) {
  const Group& group = groups_[next_group_++];
  kernels_->gather(stream(),
                   workspace_->device_table() + gather_items_at_ + group.first_item * sizeof(cuda::GatherItem),
                   group.item_count, group.item_bytes_max);
  digest_on_device(group.first_digest, group.digest_count);
  std::uint64_t address = scratch_->address();
  for (const std::uint32_t position : group.positions) {
    State& state = states_[position];
    state.address = address;
    state.buffer = scratch_;
    address += aligned(raw_bytes(position));
    stats.gathered_bytes += raw_bytes(position) - chunk(position).host_bytes;
    if (state.digest != kNoDigest) stats.digested_bytes += raw_bytes(position);
  }
  unread_ -= group.positions.size();
  if (next_group_ == groups_.size()) scratch_.reset();  // its chunks hold it
}

// Neighbours at both ends become one copy, if they are of one allocation: the driver refuses a copy that reaches from
// one into another, adjacent as they may be.
void DeviceQueue::join(std::vector<cuda::Copy>& copies, const cuda::Copy& copy, std::uint64_t source,
                       std::uint64_t nbytes_max) {
  if (!copies.empty() && joined_ == source) {
    cuda::Copy& last = copies.back();
    if (last.dst + last.nbytes == copy.dst && last.src + last.nbytes == copy.src &&
        last.nbytes + copy.nbytes <= nbytes_max) {
      last.nbytes += copy.nbytes;
      return;
    }
  }
  joined_ = source;
  copies.push_back(copy);
}

void DeviceQueue::append_copies(std::uint32_t position, std::uint8_t* slot, std::vector<cuda::Copy>& copies,
                                DeviceStats& stats) {
  State& state = states_[position];
  if (state.in_group && state.address == 0) {
    enqueue(copies);  // they read the scratch that is about to be overwritten
    gather_next_group(stats);
  }
  const auto target = reinterpret_cast<std::uintptr_t>(slot);
  if (state.address != 0 && (state.in_group || !chunk(position).packed)) {
    join(copies, {target, state.address, raw_bytes(position)}, state.buffer->address(), options_.dma_bytes);
    return;
  }
  bool any = false;  // a shared chunk may have nothing on this device
  for (const format::Piece& piece : pieces(position)) {
    if (!here(piece)) continue;
    any = true;
    if (state.address != 0) {
      join(copies, {target + piece.at, state.address + piece.at, nbytes_of(piece)}, state.buffer->address(),
           options_.dma_bytes);
    } else {
      join(copies, {target + piece.at, sources_.device_address(piece), nbytes_of(piece)}, piece.tensor,
           options_.dma_bytes);
    }
  }
  if (any && state.address == 0) --unread_;
}

void DeviceQueue::enqueue(std::vector<cuda::Copy>& copies) {
  cuda::copy_to_host(stream(), copies);
  copies.clear();
  joined_ = kNothing;
}

bool DeviceQueue::put_aside(std::span<const std::uint32_t> positions, DeviceStats& stats) {
  std::uint64_t nbytes = 0;
  for (const std::uint32_t position : positions) nbytes += aligned(raw_bytes(position));
  std::optional<cuda::DeviceBuffer> allocated = cuda::DeviceBuffer::allocate(stream(), nbytes);
  if (!allocated) return false;
  const Buffer buffer = std::make_shared<cuda::DeviceBuffer>(std::move(*allocated));
  std::vector<cuda::Copy> copies;
  joined_ = kNothing;
  std::uint64_t target = buffer->address();
  for (const std::uint32_t position : positions) {
    for (const format::Piece& piece : pieces(position)) {
      if (!here(piece)) continue;
      join(copies, {target + piece.at, sources_.device_address(piece), nbytes_of(piece)}, piece.tensor, UINT64_MAX);
      stats.overflow_bytes += nbytes_of(piece);
    }
    states_[position].buffer = buffer;
    states_[position].address = target;
    target += aligned(raw_bytes(position));
  }
  cuda::copy_on_device(stream(), copies);
  joined_ = kNothing;
  unread_ -= positions.size();
  return true;
}

cuda::Event DeviceQueue::record(const char* why) {
  cuda::Event event(workspace_->device());
  stream().record(event, why);
  return event;
}

const cuda::Event& DeviceQueue::sources_event() {
  if (!sources_event_) sources_event_ = record("save/sources");
  return *sources_event_;
}

bool DeviceQueue::digests_done() { return !digests_event_ || digests_event_->done("save/digests"); }

std::optional<codec::Digest> DeviceQueue::digest(std::uint32_t position) const {
  const std::uint32_t number = states_[position].digest;
  if (number == kNoDigest) return std::nullopt;
  codec::Digest digest;
  std::memcpy(digest.data(), workspace_->host_table() + digests_at_ + number * kDigestBytes, kDigestBytes);
  return digest;
}

bool DeviceQueue::drain(std::chrono::milliseconds patience) noexcept {
  if (workspace_ == nullptr) return true;
  bool drained = false;
  const auto end = std::chrono::steady_clock::now() + patience;
  for (int attempt = 0; attempt < 2 && !drained; ++attempt) {  // one call may fail and the device be well
    try {
      const cuda::Event all = record("save/drained");
      while (!(drained = all.done("save/drained")) && std::chrono::steady_clock::now() < end) {
        std::this_thread::sleep_for(kDrainPoll);
      }
    } catch (...) {
    }
  }
  if (drained) {
    states_.clear();
    scratch_.reset();
    DeviceWorkspace::give_back(std::move(workspace_));
  } else {
    for (State& state : states_) orphan(std::move(state.buffer), "save/hung_buffers");
    orphan(std::move(scratch_), "save/hung_buffers");
    DeviceWorkspace::abandon(std::move(workspace_), "save/hung_workspace");
  }
  return drained;
}

}  // namespace snapstone::pipeline
