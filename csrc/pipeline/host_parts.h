// HostParts: what mixed chunks have on the host, copied at the snapshot and put into their slots once the rest is
// there.
//
// Threads: take_some() from any, each part once; put() by whoever has the slot.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <unordered_map>
#include <vector>

#include "pipeline/device_plan.h"

namespace snapstone::pipeline {

class HostParts {
 public:
  // All arguments outlive the object.
  HostParts(const format::Layout& layout, const SaveSources& sources, const DevicePlan& plan);

  std::uint64_t nbytes() const { return nbytes_; }
  // Copies what nobody has begun to copy.
  void take();
  bool all_taken() const noexcept { return left_.load(std::memory_order_acquire) == 0; }
  bool taken(std::uint32_t position) const;  // true for a chunk without such a part
  void put(std::uint32_t position, std::uint8_t* slot) const;

 private:
  struct Part {
    std::uint32_t position = 0;
    std::vector<std::uint8_t> bytes;
    std::atomic<bool> taken{false};
  };

  template <typename Found>  // void(piece)
  void for_each_piece(std::uint32_t position, Found found) const;

  const format::Layout& layout_;
  const SaveSources& sources_;
  const DevicePlan& plan_;
  std::unique_ptr<Part[]> parts_;
  std::size_t count_ = 0;
  std::uint64_t nbytes_ = 0;
  std::unordered_map<std::uint32_t, std::size_t> part_of_;  // by position
  std::atomic<std::size_t> next_{0};
  std::atomic<std::size_t> left_{0};
};

}  // namespace snapstone::pipeline
