// choose_rung() remembers its verdicts for the life of the process: tests of it run in forked children.
#include "io/rung.h"

#include <linux/capability.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

#include <chrono>
#include <csignal>
#include <cstddef>
#include <cstdio>
#include <memory>
#include <stdexcept>
#include <thread>

#include "base/fault_hook.h"
#include "failing_allocations.h"
#include "forked_child.h"
#include "io/engine_fixture.h"
#include "os/file_system.h"
#include "os/memory.h"
#include "refused_calls.h"

namespace snapstone::io {
namespace {

constexpr std::array<Rung, 4> kRungs = {Rung::kUringFixed, Rung::kUring, Rung::kThreadsDirect, Rung::kBuffered};
constexpr unsigned kIoUringSetup = 425;
constexpr unsigned kIoUringRegister = 427;

class RungTest : public ::testing::Test {
 protected:
  void SetUp() override { ::unsetenv("SNAPSTONE_IO"); }
  void TearDown() override { fault::disarm(); }

  // Does this machine let tests have a ring and O_DIRECT? FAIL_WITHOUT_IO_URING=1: it has to.
  bool has(Rung rung) const {
    const std::string reason = try_rung(directory_.get(), rung);
    const char* const required = std::getenv("FAIL_WITHOUT_IO_URING");
    if (required != nullptr && std::string(required) == "1") {
      EXPECT_EQ(reason, "");
    }
    return reason.empty();
  }

  // What was chosen for `directory`, said by a child process.
  static void report(const os::Directory& directory) {
    try {
      const RungChoice choice = choose_rung(directory);
      std::fprintf(stderr, "chose %s%s\n", rung_name(choice.rung), choice.forced ? " (forced)" : "");
      for (const std::string& reason : choice.reasons) {
        std::fprintf(stderr, "%s\n", reason.c_str());
      }
    } catch (const std::exception& error) {
      std::fprintf(stderr, "threw %s\n", error.what());
    }
  }

  const TemporaryDirectory directory_;
};

#if defined(__x86_64__)
constexpr std::uint32_t kFromHandler = 0x5afe;
constexpr std::size_t kFeatures = 5;              // of the words of struct io_uring_params
constexpr std::uint32_t kFeatureNoDrop = 1 << 1;  // IORING_FEAT_NODROP

// In place of io_uring_setup: a ring, but without a feature that came with 5.5.
void set_up_as_an_old_kernel(int /*signal*/, siginfo_t* /*facts*/, void* context) {
  auto& registers = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
  auto* const params = reinterpret_cast<std::uint32_t*>(registers[REG_RSI]);
  const long ring = ::syscall(kIoUringSetup, registers[REG_RDI], params, 0, 0, 0, kFromHandler);
  if (ring >= 0) params[kFeatures] &= ~kFeatureNoDrop;
  registers[REG_RAX] = ring >= 0 ? ring : -errno;
}

void become_an_old_kernel() {
  struct sigaction action{};
  action.sa_sigaction = set_up_as_an_old_kernel;
  action.sa_flags = SA_SIGINFO;
  ::sigaction(SIGSYS, &action, nullptr);
  std::vector<sock_filter> code = {
      BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(seccomp_data, nr)),
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, kIoUringSetup, 0, 3),
      BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(seccomp_data, args[5])),
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, kFromHandler, 1, 0),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_TRAP),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
  };
  testing::install_filter(code);
}
#endif

// Gives up CAP_IPC_LOCK too: it exempts from the limit.
void lower_memlock_limit(rlim_t nbytes) {
  __user_cap_header_struct header{_LINUX_CAPABILITY_VERSION_3, 0};
  __user_cap_data_struct data[_LINUX_CAPABILITY_U32S_3];
  const rlimit limit{nbytes, nbytes};
  bool done = ::setrlimit(RLIMIT_MEMLOCK, &limit) == 0 && ::syscall(SYS_capget, &header, data) == 0;
  data[0].effective &= ~(1u << CAP_IPC_LOCK);
  done = done && ::syscall(SYS_capset, &header, data) == 0;
  if (!done) {
    std::perror("setrlimit, capset");
    std::_Exit(2);
  }
}

TEST_F(RungTest, NamesAreRead) {
  for (const Rung rung : kRungs) {
    EXPECT_EQ(rung_from_name(rung_name(rung)), rung);
  }
  EXPECT_STREQ(rung_name(static_cast<Rung>(99)), "unknown");
  try {
    rung_from_name("floppy");
    FAIL() << "took it";
  } catch (const std::invalid_argument& error) {
    EXPECT_NE(std::string(error.what()).find("uring-fixed, uring, threads-direct, buffered"), std::string::npos);
  }
}

TEST_F(RungTest, AllRungsWriteTheSameFile) {
  std::vector<std::unique_ptr<Buffer>> sources;
  for (std::size_t i = 0; i < 40; ++i) {
    sources.push_back(std::make_unique<Buffer>((1 + i % 5) * kPageBytes, i + 1));
  }
  std::vector<std::uint8_t> expected;
  for (const auto& source : sources) {
    expected.insert(expected.end(), source->bytes().begin(), source->bytes().end());
  }
  for (const Rung rung : kRungs) {
    if (rung_is_uring(rung) && !has(rung)) {
      continue;
    }
    const auto engine = make_engine(rung, 8);
    const os::File file = directory_.create(rung_name(rung), rung_is_direct(rung));
    std::vector<Request> requests;
    std::uint64_t offset = 0;
    for (const auto& source : sources) {
      requests.push_back(transfer_request(true, file, *source, offset, requests.size()));
      offset += source->nbytes();
    }
    run_all(*engine, requests);
    EXPECT_TRUE(equal(directory_.content(rung_name(rung)), expected)) << rung_name(rung);
  }
}

TEST_F(RungTest, ProbeLeavesNothingBehind) {
  for (const Rung rung : kRungs) {
    try_rung(directory_.get(), rung);
  }
  EXPECT_TRUE(std::filesystem::is_empty(directory_.get().path));
  EXPECT_EQ(try_rung(directory_.get(), Rung::kBuffered), "");
}

TEST_F(RungTest, AnyFailureOfTheProbeIsAReason) {
  const auto reason = [this](const char* rules, Rung rung) {
    fault::arm(rules);
    return try_rung(directory_.get(), rung);
  };
  EXPECT_EQ(reason("pwrite:1:errno=EIO", Rung::kBuffered), "write: EIO");
  EXPECT_EQ(reason("pread:1:errno=ESTALE", Rung::kBuffered), "read: ESTALE");
  EXPECT_EQ(reason("pread:1:short=0", Rung::kBuffered), "read: end of file");
  EXPECT_EQ(reason("fsync:1:errno=EIO", Rung::kBuffered), "fsync: EIO");
  EXPECT_EQ(reason("open:1:errno=ENOSPC", Rung::kBuffered), "open: ENOSPC");
  EXPECT_EQ(reason("fcntl:1+:errno=EINVAL", Rung::kThreadsDirect), "O_DIRECT: EINVAL (the file system has none)");
  fault::disarm();
  if (!has(Rung::kUring)) {
    GTEST_SKIP() << try_rung(directory_.get(), Rung::kUring);
  }
  EXPECT_EQ(reason("uring_write:1:errno=EIO", Rung::kUring), "write: EIO");
  EXPECT_EQ(reason("uring_read:1:errno=EIO", Rung::kUring), "read: EIO");
  EXPECT_EQ(reason("uring_write:1:errno=EINVAL", Rung::kUring),
            "O_DIRECT: EINVAL (the file system refuses it at the first transfer)");
  const std::string refused = reason("io_uring_setup:1:errno=EPERM", Rung::kUring);
  EXPECT_TRUE(refused.starts_with("io_uring_setup: EPERM (")) << refused;
}

TEST_F(RungTest, OtherBytesThanWereWrittenAreAReason) {
  fault::arm("pread:1:delay=200");
  std::thread scribbler([&] {
    while (fault::seen("pread") == 0) std::this_thread::sleep_for(std::chrono::milliseconds(1));
    const std::string here = std::filesystem::canonical(directory_.get().path).string() + "/";
    for (const auto& entry : std::filesystem::directory_iterator("/proc/self/fd")) {
      std::error_code gone;
      if (!std::filesystem::read_symlink(entry, gone).string().starts_with(here)) continue;
      std::fstream(entry.path(), std::ios::in | std::ios::out | std::ios::binary) << "other";
    }
  });
  EXPECT_EQ(try_rung(directory_.get(), Rung::kBuffered), "read: not the bytes that were written");
  scribbler.join();
}

TEST_F(RungTest, AnyFailingAllocationOfTheProbeIsAReason) {
  int refused = 0;
  bool reached = true;
  for (std::uint64_t nth = 1; reached; ++nth) {
    std::string reason;
    {
      const FailingAllocation failing(nth);
      reason = try_rung(directory_.get(), Rung::kBuffered);
      reached = FailingAllocation::reached();
    }
    EXPECT_TRUE(reason == "ENOMEM" || reason.empty()) << nth << ": " << reason;  // fewer threads will do
    EXPECT_TRUE(std::filesystem::is_empty(directory_.get().path)) << nth;
    refused += reason.empty() ? 0 : 1;
    ASSERT_LT(nth, 200u);
  }
  EXPECT_GT(refused, 5);
}

TEST_F(RungTest, RefusedRungsArePassedOverWithReasons) {
  testing::expect_child_says("chose buffered\nuring-fixed: .*\nuring: .*\nthreads-direct: O_DIRECT: EINVAL .*\n", [&] {
    fault::arm("io_uring_setup:1+:errno=ENOSYS;fcntl:1+:errno=EINVAL");
    report(directory_.get());
  });
}

TEST_F(RungTest, BestRungThatWorksIsChosen) {
  const char* expected = has(Rung::kUringFixed)      ? "chose uring-fixed\n$"
                         : has(Rung::kUring)         ? "chose uring\nuring-fixed: .*\n$"
                         : has(Rung::kThreadsDirect) ? "chose threads-direct\n"
                                                     : "chose buffered\n";
  if (os::file_system_facts(directory_.get()).memory_backed) {
    expected = "chose buffered\n";
  }
  testing::expect_child_says(expected, [&] { report(directory_.get()); });
}

TEST_F(RungTest, EnvironmentForcesARung) {
  for (const Rung rung : {Rung::kThreadsDirect, Rung::kBuffered}) {
    if (!try_rung(directory_.get(), rung).empty()) {
      continue;
    }
    testing::expect_child_says(std::string("chose ") + rung_name(rung) + " \\(forced\\)", [&] {
      ::setenv("SNAPSTONE_IO", rung_name(rung), 1);
      report(directory_.get());
    });
  }
}

TEST_F(RungTest, UnusableForcedRungIsAnError) {
  testing::expect_child_says("threw SNAPSTONE_IO=uring does not work: io_uring_setup: ", [&] {
    ::setenv("SNAPSTONE_IO", "uring", 1);
    fault::arm("io_uring_setup:1+:errno=EPERM");
    report(directory_.get());
  });
  testing::expect_child_says("threw .*'floppy'; choose one of uring-fixed", [&] {
    ::setenv("SNAPSTONE_IO", "floppy", 1);
    report(directory_.get());
  });
}

TEST_F(RungTest, VerdictOfAFileSystemIsRemembered) {
  testing::expect_child_says("probed again 0 times", [&] {
    choose_rung(directory_.get());
    fault::arm("io_uring_setup:1+:errno=EPERM;pwrite:1+:errno=EIO");
    choose_rung(directory_.get());
    std::fprintf(stderr, "probed again %llu times\n",
                 static_cast<unsigned long long>(fault::seen("io_uring_setup") + fault::seen("pwrite")));
  });
}

TEST_F(RungTest, MemoryBackedFileSystemIsBuffered) {
  std::unique_ptr<TemporaryDirectory> memory;
  try {
    memory = std::make_unique<TemporaryDirectory>("/dev/shm");
  } catch (const OsError& error) {
    GTEST_SKIP() << error.what();
  }
  if (!os::file_system_facts(memory->get()).memory_backed) {
    GTEST_SKIP() << "/dev/shm is not memory here";
  }
  testing::expect_child_says(
      "chose buffered\nuring-fixed: tmpfs keeps files in memory.*\nuring: .*\nthreads-direct: .*\n$",
      [&] { report(memory->get()); });
}

// A checkpoint on a read-only mount is read with the best engine there is, and that is not held against the whole
// file system.
TEST_F(RungTest, DirectoryWithoutWritePermissionGetsTheBestEngine) {
  if (!has(Rung::kUring)) {
    GTEST_SKIP() << try_rung(directory_.get(), Rung::kUring);
  }
  testing::expect_child_says("^1 0\n", [&] {
    fault::arm("open:1+:errno=EROFS");
    const Rung read_only = choose_rung(directory_.get()).rung;
    fault::arm("io_uring_setup:1+:errno=EPERM");
    const Rung writable = choose_rung(directory_.get()).rung;
    std::fprintf(stderr, "%d %d\n", rung_is_uring(read_only), rung_is_uring(writable));
  });
}

TEST_F(RungTest, SeccompFilterThatKillsIsSurvived) {
  testing::expect_child_says(
      uring_compiled_in() ? "uring: io_uring_setup: kills the caller with signal [0-9]+ .SIGSYS" : "liburing", [&] {
        testing::refuse_call(kIoUringSetup, SECCOMP_RET_KILL_PROCESS);
        report(directory_.get());
      });
}

TEST_F(RungTest, SeccompFilterThatRefusesIsNamed) {
  testing::expect_child_says(uring_compiled_in() ? "uring: io_uring_setup: EPERM .*" : "liburing", [&] {
    testing::refuse_call(kIoUringSetup, SECCOMP_RET_ERRNO | EPERM);
    report(directory_.get());
  });
}

TEST_F(RungTest, RefusedBuffersMeanPlainBuffers) {
  if (!has(Rung::kUring) || os::memlock_limit_bytes() < kSegmentBytes) {
    GTEST_SKIP() << try_rung(directory_.get(), Rung::kUringFixed);
  }
  testing::expect_child_says("^chose uring\nuring-fixed: io_uring_register: no registered buffers", [&] {
    testing::refuse_call(kIoUringRegister, SECCOMP_RET_ERRNO | ENOMEM);
    report(directory_.get());
  });
}

#if defined(__x86_64__)
TEST_F(RungTest, RingWithoutWhatIsNeededIsPassedOver) {
  if (!has(Rung::kUring)) {
    GTEST_SKIP() << try_rung(directory_.get(), Rung::kUring);
  }
  testing::expect_child_says("\nuring: io_uring_setup: ENOSYS", [&] {
    become_an_old_kernel();
    report(directory_.get());
  });
}
#endif

TEST_F(RungTest, SmallMemlockLimitMeansPlainBuffers) {
  if (!has(Rung::kUring)) {
    GTEST_SKIP() << try_rung(directory_.get(), Rung::kUring);
  }
  testing::expect_child_says("uring-fixed: RLIMIT_MEMLOCK: 8388608 bytes", [&] {
    lower_memlock_limit(8 << 20);
    report(directory_.get());
  });
}

}  // namespace
}  // namespace snapstone::io
