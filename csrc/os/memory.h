// MappedMemory: anonymous, page-aligned memory for staging slots.
//
// mmap -> mbind -> MADV_HUGEPAGE -> touch -> MADV_DONTFORK. Huge pages and the NUMA node are advice: `huge` says
// whether the kernel had any to give, and where a node is full or unknown the pages come from elsewhere. Failure: the
// constructor throws OsError (ENOMEM); everything after is noexcept.
#pragma once

#include <cstdint>

namespace snapstone::os {

inline constexpr int kAnyNumaNode = -1;

class MappedMemory {
 public:
  MappedMemory() = default;
  // Rounded up to kHugePageBytes, 2 MiB aligned, every page touched, on `numa_node` while that has pages to give.
  explicit MappedMemory(std::uint64_t nbytes, int numa_node = kAnyNumaNode);
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

// The NUMA node that holds the page at `address`, or kAnyNumaNode when the kernel does not say.
int numa_node_of(const void* address);
std::uint64_t memlock_limit_bytes();     // RLIMIT_MEMLOCK; UINT64_MAX when unlimited or CAP_IPC_LOCK is held
std::uint64_t available_memory_bytes();  // MemAvailable of /proc/meminfo; 0 when unknown

}  // namespace snapstone::os
