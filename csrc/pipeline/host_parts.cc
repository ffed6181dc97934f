#include "pipeline/host_parts.h"

#include <algorithm>
#include <cstring>

namespace snapstone::pipeline {

HostParts::HostParts(const format::Layout& layout, const SaveSources& sources, const DevicePlan& plan)
    : layout_(layout), sources_(sources), plan_(plan) {
  for (std::uint32_t position = 0; position < plan.chunks.size(); ++position) {
    if (plan.chunks[position].host_bytes > 0) part_of_.emplace(position, count_++);
  }
  parts_ = std::make_unique<Part[]>(count_);
  for (const auto& [position, number] : part_of_) {
    parts_[number].position = position;
    nbytes_ += plan.chunks[position].host_bytes;
  }
  left_ = count_;
}

template <typename Found>
void HostParts::for_each_piece(std::uint32_t position, Found found) const {
  for (const format::Piece& piece : pieces_of(layout_, plan_.chunks[position].chunk)) {
    if (sources_.device_of(piece.tensor) == kOnHost) found(piece);
  }
}

void HostParts::take() {
  for (std::size_t number = next_.fetch_add(1); number < count_; number = next_.fetch_add(1)) {
    Part& part = parts_[number];
    part.bytes.resize(plan_.chunks[part.position].host_bytes);
    std::uint8_t* target = part.bytes.data();
    for_each_piece(part.position, [&](const format::Piece& piece) {
      sources_.copy(piece, target);
      target += nbytes_of(piece);
    });
    part.taken.store(true, std::memory_order_release);
    left_.fetch_sub(1, std::memory_order_acq_rel);
  }
}

bool HostParts::taken(std::uint32_t position) const {
  if (count_ == 0) return true;
  const auto found = part_of_.find(position);
  return found == part_of_.end() || parts_[found->second].taken.load(std::memory_order_acquire);
}

void HostParts::put(std::uint32_t position, std::uint8_t* slot) const {
  const auto found = part_of_.find(position);
  if (found == part_of_.end()) return;
  const std::uint8_t* source = parts_[found->second].bytes.data();
  for_each_piece(position, [&](const format::Piece& piece) {
    std::memcpy(slot + piece.at, source, nbytes_of(piece));
    source += nbytes_of(piece);
  });
}

}  // namespace snapstone::pipeline
