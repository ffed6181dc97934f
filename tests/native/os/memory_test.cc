#include "os/memory.h"

#include <gtest/gtest.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <limits>
#include <thread>
#include <utility>
#include <vector>

#include "armed_faults.h"
#include "base/limits.h"

namespace snapstone::os {
namespace {

using testing::ArmedFaults;
using testing::errno_of;

TEST(MappedMemory, is_aligned_rounded_up_and_zero) {
  const MappedMemory memory(kHugePageBytes + 1);
  EXPECT_EQ(memory.nbytes(), 2 * kHugePageBytes);
  EXPECT_EQ(reinterpret_cast<std::uintptr_t>(memory.data()) % kHugePageBytes, 0u);
  for (std::uint64_t i = 0; i < memory.nbytes(); i += 509) {
    ASSERT_EQ(memory.data()[i], 0);
  }
  std::memset(memory.data(), 0xFF, memory.nbytes());
}

TEST(MappedMemory, every_page_is_resident_before_first_use) {
  for (const char* rule : {"", "madvise:1:errno=EINVAL"}) {  // with MADV_POPULATE_WRITE, and as on kernels before 5.14
    const ArmedFaults faults(rule);
    const MappedMemory memory(4 * kHugePageBytes);
    const auto page_bytes = static_cast<std::uint64_t>(::sysconf(_SC_PAGESIZE));
    std::vector<unsigned char> resident(memory.nbytes() / page_bytes);
    ASSERT_EQ(::mincore(memory.data(), memory.nbytes(), resident.data()), 0);
    for (std::size_t i = 0; i < resident.size(); ++i) {
      ASSERT_EQ(resident[i] & 1, 1) << "page " << i;
    }
  }
}

TEST(MappedMemory, large_memory_is_resident_too_and_refused_as_a_whole) {
  {
    const ArmedFaults faults("");
    const MappedMemory memory(70ull << 20);
    EXPECT_GE(fault::seen("madvise"), std::min(2u, std::thread::hardware_concurrency())) << "one thread did it all";
    std::vector<unsigned char> resident(memory.nbytes() / kPageBytes);
    ASSERT_EQ(::mincore(memory.data(), memory.nbytes(), resident.data()), 0);
    for (std::size_t i = 0; i < resident.size(); ++i) {
      ASSERT_EQ(resident[i] & 1, 1) << "page " << i;
    }
  }
  const ArmedFaults faults("madvise:2:errno=ENOMEM");
  if (std::thread::hardware_concurrency() > 1) {
    EXPECT_EQ(errno_of([] { MappedMemory(70ull << 20); }), ENOMEM);
  }
}

TEST(MappedMemory, lies_on_the_node_that_was_asked_for) {
  const int node = numa_node_of(MappedMemory(1).data());
  if (node == kAnyNumaNode) GTEST_SKIP() << "this kernel, or this container, does not tell nodes";
  const MappedMemory memory(kHugePageBytes, node);
  EXPECT_EQ(numa_node_of(memory.data()), node);
  EXPECT_EQ(numa_node_of(memory.data() + memory.nbytes() - 1), node);
}

TEST(MappedMemory, a_node_that_cannot_be_had_is_no_failure) {
  for (const int node : {1023, 1024, 1 << 30}) {
    const MappedMemory memory(1, node);
    EXPECT_NE(memory.data(), nullptr) << node;
  }
  const ArmedFaults faults("mbind:1+:errno=EPERM");
  const MappedMemory memory(1, 0);
  EXPECT_EQ(fault::seen("mbind"), 1u);
  EXPECT_NE(memory.data(), nullptr);
}

TEST(MappedMemory, moves_leave_one_owner) {
  MappedMemory first(1);
  std::uint8_t* data = first.data();
  data[0] = 42;
  MappedMemory second(std::move(first));
  EXPECT_EQ(first.data(), nullptr);  // NOLINT(bugprone-use-after-move): the promise under test
  EXPECT_EQ(first.nbytes(), 0u);
  MappedMemory third(1);
  third = std::move(second);
  EXPECT_EQ(third.data(), data);
  EXPECT_EQ(third.data()[0], 42);
  EXPECT_EQ(second.data(), nullptr);  // NOLINT(bugprone-use-after-move)
}

TEST(MappedMemory, returns_its_pages) {
  std::uint8_t* data = nullptr;
  {
    const MappedMemory memory(1);
    data = memory.data();
  }
  unsigned char resident = 0;
  EXPECT_EQ(::mincore(data, 1, &resident), -1);
  EXPECT_EQ(errno, ENOMEM);
}

TEST(MappedMemory, nothing_is_mapped_for_nothing) {
  EXPECT_EQ(MappedMemory(0).data(), nullptr);
  EXPECT_EQ(MappedMemory().nbytes(), 0u);
}

TEST(MappedMemory, refusals_are_enomem) {
  EXPECT_EQ(errno_of([] { MappedMemory(std::numeric_limits<std::uint64_t>::max()); }), ENOMEM);
  EXPECT_EQ(errno_of([] { MappedMemory(std::uint64_t{1} << 60); }), ENOMEM);
  for (const char* rule : {"mmap:1:errno=ENOMEM", "madvise:1:errno=ENOMEM"}) {
    const ArmedFaults faults(rule);
    EXPECT_EQ(errno_of([] { MappedMemory(1); }), ENOMEM) << rule;
  }
}

// The child hands over what it finds at the address, through a call that does not crash when nothing is mapped there: a
// sanitizer's runtime may have put memory of its own into the gap.
TEST(MappedMemory, a_forked_child_does_not_inherit_it) {
  const MappedMemory memory(1);
  const std::vector<std::uint8_t> written(64, 0xA5);
  std::memcpy(memory.data(), written.data(), written.size());
  int pipe_fds[2];
  ASSERT_EQ(::pipe(pipe_fds), 0);
  const pid_t child = ::fork();
  if (child == 0) {
    const ssize_t handed_over = ::write(pipe_fds[1], memory.data(), written.size());
    ::_exit(handed_over == -1 && errno != EFAULT ? 1 : 0);
  }
  ::close(pipe_fds[1]);
  std::vector<std::uint8_t> inherited(written.size());
  const ssize_t nbytes = ::read(pipe_fds[0], inherited.data(), inherited.size());
  ::close(pipe_fds[0]);
  int status = 0;
  ASSERT_EQ(::waitpid(child, &status, 0), child);
  EXPECT_TRUE(WIFEXITED(status));
  EXPECT_EQ(WEXITSTATUS(status), 0);
  EXPECT_GE(nbytes, 0);
  EXPECT_NE(inherited, written);
}

TEST(MemoryLimits, are_plausible) {
  EXPECT_GT(memlock_limit_bytes(), 0u);
  EXPECT_GT(available_memory_bytes(), std::uint64_t{1} << 20);
  EXPECT_LT(available_memory_bytes(), std::uint64_t{1} << 50);
}

}  // namespace
}  // namespace snapstone::os
