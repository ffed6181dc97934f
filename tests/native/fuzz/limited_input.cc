// What an input of a fuzz target may cost: 100 ms of CPU, sanitizers included, and 64 MiB of memory at once.
//
// The machine is shared, and other work on it makes CPU time longer too: what takes too long is run again, and the
// shortest of three counts. Memory is counted where clang's AddressSanitizer tells of every allocation; its shadow, and
// what it keeps after free(), make the size of the process say little.
#include <sys/resource.h>

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>

#include "fuzz_target.h"

#ifdef __has_feature  // clang; gcc comes without this interface
#if __has_feature(address_sanitizer)
#define SNAPSTONE_COUNTS_MEMORY 1
#include <sanitizer/allocator_interface.h>
#endif
#endif

namespace snapstone::fuzz {
namespace {

constexpr double kCpuSecondsMax = 0.1;
constexpr int kTries = 3;
constexpr std::int64_t kBytesMax = 64 << 20;

// Since the process began. What was allocated before that counts when it is freed, so only differences say something.
std::atomic<std::int64_t> bytes_in_use{0};
std::atomic<std::int64_t> bytes_peak{0};

#ifdef SNAPSTONE_COUNTS_MEMORY
void count_allocated(const volatile void*, std::size_t nbytes) {
  const std::int64_t now =
      bytes_in_use.fetch_add(static_cast<std::int64_t>(nbytes)) + static_cast<std::int64_t>(nbytes);
  std::int64_t peak = bytes_peak.load();
  while (now > peak && !bytes_peak.compare_exchange_weak(peak, now)) {
  }
}

void count_freed(const volatile void* pointer) {
  if (pointer != nullptr) {
    bytes_in_use -= static_cast<std::int64_t>(__sanitizer_get_allocated_size(const_cast<const void*>(pointer)));
  }
}

[[maybe_unused]] const int hooks = __sanitizer_install_malloc_and_free_hooks(count_allocated, count_freed);
#endif

double cpu_seconds() {
  rusage used{};
  getrusage(RUSAGE_SELF, &used);
  const auto seconds = [](const timeval& time) {
    return static_cast<double>(time.tv_sec) + 1e-6 * static_cast<double>(time.tv_usec);
  };
  return seconds(used.ru_utime) + seconds(used.ru_stime);
}

}  // namespace
}  // namespace snapstone::fuzz

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace snapstone::fuzz;
  double shortest = 1e9;
  int result = 0;
  for (int tried = 0; tried < kTries && shortest >= kCpuSecondsMax; ++tried) {
    const std::int64_t before = bytes_in_use;
    bytes_peak = before;
    const double begin = cpu_seconds();
    result = run_input(data, size);
    shortest = std::min(shortest, cpu_seconds() - begin);
    require(bytes_peak - before < kBytesMax, "an input takes less than 64 MiB of memory");
  }
  require(shortest < kCpuSecondsMax, "an input takes less than 100 ms of CPU");
  return result;
}
