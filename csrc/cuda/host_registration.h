// HostRegistration: host memory that the devices reach by DMA, for as long as this object lives.
//
// Pages are pinned for every context of the process (PORTABLE). One registration covers at most kRegistrationBytesMax:
// drivers fail above 512 GiB, some kernels above 2 GiB, and a long one holds locks that all other calls wait for.
// It takes 0.1 s or more per GiB: never on the step path.
// Failure: refused memory is a value, not an exception: copies work without, slower and synchronously.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "cuda/device.h"

namespace snapstone::cuda {

inline constexpr std::uint64_t kRegistrationBytesMax = 1ull << 30;

class HostRegistration {
 public:
  // Nothing, and why in `*refusal`, when the driver will not. Throws std::invalid_argument when `nbytes` is 0 or more
  // than kRegistrationBytesMax. `begin` is page-aligned.
  static std::optional<HostRegistration> of(Device& device, void* begin, std::uint64_t nbytes, std::string* refusal);

  HostRegistration(HostRegistration&& other) noexcept;
  HostRegistration& operator=(HostRegistration&& other) noexcept;
  ~HostRegistration();  // no copy may be in flight

  void* begin() const noexcept { return begin_; }
  std::uint64_t nbytes() const noexcept { return nbytes_; }

  // The registered range that an address is in; empty where it is in none.
  struct Range {
    std::uint64_t begin = 0;
    std::uint64_t end = 0;
  };
  static Range around(std::uint64_t address);

 private:
  HostRegistration(Device& device, void* begin, std::uint64_t nbytes);

  Device* device_;
  void* begin_;
  std::uint64_t nbytes_;
};

}  // namespace snapstone::cuda
