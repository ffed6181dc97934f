#include "os/private_fds.h"

#include <fcntl.h>
#include <pthread.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <bit>
#include <cstdint>

namespace snapstone::os {
namespace {

constexpr int kWordBits = 64;

constinit std::array<std::atomic<std::uint64_t>, kPrivateFdsMax / kWordBits> words{};

std::uint64_t bit_of(int fd) { return std::uint64_t{1} << (fd % kWordBits); }

// Only what is safe between fork and exec of a process with threads.
void replace_in_child() {
  int null = -1;
  for (std::size_t word = 0; word < words.size(); ++word) {
    for (std::uint64_t left = words[word].exchange(0); left != 0; left &= left - 1) {
      if (null < 0) null = ::open("/dev/null", O_RDWR | O_CLOEXEC);
      const int fd = static_cast<int>(word) * kWordBits + std::countr_zero(left);
      if (null >= 0) ::dup3(null, fd, O_CLOEXEC);
    }
  }
  if (null >= 0) ::close(null);
}

[[maybe_unused]] const int fork_handler = ::pthread_atfork(nullptr, nullptr, replace_in_child);

}  // namespace

void keep_from_children(int fd) noexcept {
  if (fd >= 0 && fd < kPrivateFdsMax) words[static_cast<std::size_t>(fd / kWordBits)].fetch_or(bit_of(fd));
}

void forget_private(int fd) noexcept {
  if (fd < 0 || fd >= kPrivateFdsMax) return;
  auto& word = words[static_cast<std::size_t>(fd / kWordBits)];
  if ((word.load(std::memory_order_relaxed) & bit_of(fd)) != 0) word.fetch_and(~bit_of(fd));
}

}  // namespace snapstone::os
