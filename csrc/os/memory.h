// MappedMemory: anonymous, page-aligned memory for staging slots.
//
// mmap -> MADV_HUGEPAGE -> touch -> MADV_DONTFORK. Huge pages are advice: `huge` says whether the kernel had any to
// give. Failure: the constructor throws OsError (ENOMEM); everything after is noexcept.
#pragma once

#include <cstdint>

namespace snapstone::os {

class MappedMemory {
 public:
  MappedMemory() = default;
  explicit MappedMemory(std::uint64_t nbytes);  // rounded up to kHugePageBytes, 2 MiB aligned, every page touched
  MappedMemory(MappedMemory&& other) noexcept;
  MappedMemory& operator=(MappedMemory&& other) noexcept;
  ~MappedMemory();

  std::uint8_t* data() const noexcept { return data_; }
  std::uint64_t nbytes() const noexcept { return nbytes_; }
  bool huge() const noexcept { return huge_; }  // from AnonHugePages of this mapping's first page, best effort

 private:
  void* mapping_ = nullptr;
  std::uint64_t mapping_nbytes_ = 0;
  std::uint8_t* data_ = nullptr;
  std::uint64_t nbytes_ = 0;
  bool huge_ = false;
};

std::uint64_t memlock_limit_bytes();     // RLIMIT_MEMLOCK; UINT64_MAX when unlimited or CAP_IPC_LOCK is held
std::uint64_t available_memory_bytes();  // MemAvailable of /proc/meminfo; 0 when unknown

}  // namespace snapstone::os
