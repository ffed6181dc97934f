// The mapping is one huge page longer than asked for, so that an aligned start exists in it; the rest is never touched
// and costs only address space.
#include "os/memory.h"

#include <linux/capability.h>
#include <linux/mempolicy.h>
#include <stdio.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <exception>
#include <limits>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "base/error.h"
#include "base/limits.h"
#include "os/call.h"
#include "os/process.h"

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23  // Linux 5.14
#endif

namespace snapstone::os {
namespace {

struct CloseStream {
  void operator()(FILE* stream) const noexcept { std::fclose(stream); }
};
using Stream = std::unique_ptr<FILE, CloseStream>;

constexpr std::uint64_t kPopulateShareBytes = 16 << 20;  // 4 ms of work, against 0.1 ms to start a thread
constexpr std::uint64_t kPopulateThreadsMax = 4;

void populate_range(std::uint8_t* data, std::uint64_t nbytes) {
  const std::string what = "staging memory";
  if (call("madvise", what, [&] { return ::madvise(data, nbytes, MADV_POPULATE_WRITE); }) == 0) {
    return;
  }
  if (errno == ENOMEM) {
    throw OsError(ENOMEM, "madvise", what, 0, nbytes);
  }
  for (std::uint64_t offset = 0; offset < nbytes; offset += kPageBytes) {
    *static_cast<volatile std::uint8_t*>(data + offset) = 0;
  }
}

// Faults every page in now, so that the copy path never does; the first writer's NUMA node gets the page, unless
// another one was asked for. Zeroing pages is the work, so large memory is shared among threads.
void populate(std::uint8_t* data, std::uint64_t nbytes) {
  const std::uint64_t cores = std::max(1u, std::thread::hardware_concurrency());
  const std::uint64_t shares =
      std::clamp<std::uint64_t>(nbytes / kPopulateShareBytes, 1, std::min(cores, kPopulateThreadsMax));
  const std::uint64_t share_bytes = round_up(nbytes / shares, kHugePageBytes);
  std::exception_ptr error;
  std::mutex mutex;
  const auto populate_share = [&](std::uint64_t begin) noexcept {
    try {
      if (begin < nbytes) populate_range(data + begin, std::min(share_bytes, nbytes - begin));
    } catch (...) {
      const std::lock_guard lock(mutex);
      error = std::current_exception();
    }
  };
  {
    std::vector<std::jthread> threads;
    for (std::uint64_t share = 1; share < shares; ++share) {
      try {
        threads.emplace_back([&, share] {
          block_all_signals();
          populate_share(share * share_bytes);
        });
      } catch (const std::exception&) {  // no more threads, or no memory to start one
        populate_share(share * share_bytes);
      }
    }
    populate_share(0);
  }
  if (error) {
    std::rethrow_exception(error);
  }
}

// By system call, since libnuma may be missing. Preferred, not bound: a full node must not end a save.
void prefer_numa_node(std::uint8_t* data, std::uint64_t nbytes, int node) {
  constexpr std::size_t kNodesMax = 1024;  // of the kernel: CONFIG_NODES_SHIFT is at most 10
  constexpr std::size_t kWordBits = 8 * sizeof(unsigned long);
  if (node < 0 || static_cast<std::size_t>(node) >= kNodesMax) {
    return;
  }
  unsigned long nodes[kNodesMax / kWordBits] = {};
  nodes[static_cast<std::size_t>(node) / kWordBits] = 1ul << (static_cast<std::size_t>(node) % kWordBits);
  // The kernel takes one bit less than it is told.
  call("mbind", "staging memory",
       [&] { return ::syscall(SYS_mbind, data, nbytes, MPOL_PREFERRED, nodes, kNodesMax + 1, 0); });
}

// AnonHugePages of the mapping around `data`. The kernel lists mappings in address order and walks the page tables of
// each one that is read, so reading stops at the answer.
bool has_huge_pages(const std::uint8_t* data) {
  const Stream stream(std::fopen("/proc/self/smaps", "re"));
  if (!stream) {
    return false;
  }
  const auto address = reinterpret_cast<std::uintptr_t>(data);
  char line[512];
  bool inside = false;
  while (std::fgets(line, sizeof line, stream.get()) != nullptr) {
    unsigned long begin = 0;
    unsigned long end = 0;
    unsigned long kib = 0;
    if (std::sscanf(line, "%lx-%lx ", &begin, &end) == 2) {
      if (inside || begin > address) {
        return false;
      }
      inside = begin <= address && address < end;
    } else if (inside && std::sscanf(line, "AnonHugePages: %lu kB", &kib) == 1) {
      return kib != 0;
    }
  }
  return false;
}

bool may_lock_without_limit() {
  __user_cap_header_struct header{_LINUX_CAPABILITY_VERSION_3, 0};
  __user_cap_data_struct data[2]{};
  return ::syscall(SYS_capget, &header, data) == 0 && (data[0].effective & (1u << CAP_IPC_LOCK)) != 0;
}

}  // namespace

MappedMemory::MappedMemory(std::uint64_t nbytes, int numa_node) {
  if (nbytes == 0) {
    return;
  }
  const std::string what = "staging memory";
  if (nbytes > static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max()) - 2 * kHugePageBytes) {
    throw OsError(ENOMEM, "mmap", what, 0, nbytes);
  }
  const std::uint64_t usable_nbytes = round_up(nbytes, kHugePageBytes);
  const std::uint64_t mapping_nbytes = usable_nbytes + kHugePageBytes;
  void* mapping = MAP_FAILED;
  const int result = call("mmap", what, [&] {
    mapping =
        ::mmap(nullptr, mapping_nbytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return mapping == MAP_FAILED ? -1 : 0;
  });
  if (result != 0) {
    throw OsError(errno, "mmap", what, 0, mapping_nbytes);
  }
  auto* data = reinterpret_cast<std::uint8_t*>(round_up(reinterpret_cast<std::uintptr_t>(mapping), kHugePageBytes));
  prefer_numa_node(data, usable_nbytes, numa_node);
  ::madvise(data, usable_nbytes, MADV_HUGEPAGE);
  try {
    populate(data, usable_nbytes);
  } catch (...) {
    ::munmap(mapping, mapping_nbytes);
    throw;
  }
  // A forked child (data loader) would make these pages copy-on-write under a device or an I/O ring that has pinned
  // them.
  ::madvise(mapping, mapping_nbytes, MADV_DONTFORK);
  mapping_ = mapping;
  mapping_nbytes_ = mapping_nbytes;
  data_ = data;
  nbytes_ = usable_nbytes;
  huge_ = has_huge_pages(data);
}

MappedMemory::MappedMemory(MappedMemory&& other) noexcept
    : mapping_(std::exchange(other.mapping_, nullptr)),
      mapping_nbytes_(std::exchange(other.mapping_nbytes_, 0)),
      data_(std::exchange(other.data_, nullptr)),
      nbytes_(std::exchange(other.nbytes_, 0)),
      huge_(std::exchange(other.huge_, false)) {}

MappedMemory& MappedMemory::operator=(MappedMemory&& other) noexcept {
  if (this != &other) {
    MappedMemory moved(std::move(other));
    std::swap(mapping_, moved.mapping_);
    std::swap(mapping_nbytes_, moved.mapping_nbytes_);
    std::swap(data_, moved.data_);
    std::swap(nbytes_, moved.nbytes_);
    std::swap(huge_, moved.huge_);
  }
  return *this;
}

MappedMemory::~MappedMemory() {
  if (mapping_ != nullptr) {
    ::munmap(mapping_, mapping_nbytes_);
  }
}

int numa_node_of(const void* address) {
  int node = kAnyNumaNode;
  void* page = const_cast<void*>(address);
  const long result = ::syscall(SYS_get_mempolicy, &node, nullptr, 0, page, MPOL_F_NODE | MPOL_F_ADDR);
  return result == 0 ? node : kAnyNumaNode;
}

std::uint64_t memlock_limit_bytes() {
  struct rlimit limit{};
  if (may_lock_without_limit() || ::getrlimit(RLIMIT_MEMLOCK, &limit) != 0 || limit.rlim_cur == RLIM_INFINITY) {
    return std::numeric_limits<std::uint64_t>::max();
  }
  return limit.rlim_cur;
}

std::uint64_t available_memory_bytes() {
  const Stream stream(std::fopen("/proc/meminfo", "re"));
  char line[256];
  unsigned long long kib = 0;
  while (stream && std::fgets(line, sizeof line, stream.get()) != nullptr) {
    if (std::sscanf(line, "MemAvailable: %llu kB", &kib) == 1) {
      return kib << 10;
    }
  }
  return 0;
}

}  // namespace snapstone::os
