// Clock: which work comes before which. Access: bytes that a piece of work reads or writes.
//
// Device addresses and host addresses are of one address space, so that one kind of range does for both.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace fakecuda {

// For each stream, by its number, how many of its pieces of work are known to have come before.
class Clock {
 public:
  std::uint64_t of(std::size_t stream) const { return stream < counts_.size() ? counts_[stream] : 0; }
  void set(std::size_t stream, std::uint64_t count) {
    if (stream >= counts_.size()) counts_.resize(stream + 1);
    counts_[stream] = std::max(counts_[stream], count);
  }
  void join(const Clock& other) {
    for (std::size_t i = 0; i < other.counts_.size(); ++i) set(i, other.counts_[i]);
  }

 private:
  std::vector<std::uint64_t> counts_;
};

// `rows` rows of `width` bytes, `pitch` apart; contiguous: one row.
struct Access {
  std::uint64_t begin = 0;
  std::uint64_t width = 0;
  bool write = false;
  std::uint64_t pitch = 0;
  std::uint64_t rows = 1;

  std::uint64_t end() const { return begin + (rows - 1) * pitch + width; }
};

inline bool overlaps_span(const Access& a, std::uint64_t begin, std::uint64_t end) {
  if (a.begin >= end || begin >= a.end()) return false;
  if (a.rows == 1 || a.pitch == a.width) return true;
  // The last row that begins before `end` is the only one that may reach past `begin` without beginning after it.
  const std::uint64_t row = std::min((end - 1 - a.begin) / a.pitch, a.rows - 1);
  return a.begin + row * a.pitch + a.width > begin;
}

inline bool overlap(const Access& a, const Access& b) {
  const Access& few = a.rows <= b.rows ? a : b;
  const Access& many = a.rows <= b.rows ? b : a;
  for (std::uint64_t row = 0; row < few.rows; ++row) {
    const std::uint64_t begin = few.begin + row * few.pitch;
    if (overlaps_span(many, begin, begin + few.width)) return true;
  }
  return false;
}

inline bool conflict(const Access& a, const Access& b) { return (a.write || b.write) && overlap(a, b); }

}  // namespace fakecuda
