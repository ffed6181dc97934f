#include "base/fault_hook.h"

#include <gtest/gtest.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <limits>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "armed_faults.h"

namespace snapstone {
namespace {

using testing::ArmedFaults;

int error_of(const char* call) { return fault::point(call, "path").error_number; }

TEST(FaultHook, is_silent_and_counts_nothing_while_disarmed) {
  fault::disarm();
  EXPECT_EQ(error_of("fsync"), 0);
  EXPECT_EQ(fault::point("pwrite", "").limit_nbytes, std::numeric_limits<std::uint64_t>::max());
  EXPECT_EQ(fault::seen("*"), 0u);
}

TEST(FaultHook, fails_exactly_the_nth_matching_call) {
  const ArmedFaults faults("fsync:2:errno=EIO");
  EXPECT_EQ(error_of("fsync"), 0);
  EXPECT_EQ(error_of("pwrite"), 0);
  EXPECT_EQ(error_of("fsync"), EIO);
  EXPECT_EQ(error_of("fsync"), 0);
}

TEST(FaultHook, plus_fails_the_nth_and_all_later_calls) {
  const ArmedFaults faults("pwrite:3+:errno=ENOSPC");
  EXPECT_EQ(error_of("pwrite"), 0);
  EXPECT_EQ(error_of("pwrite"), 0);
  for (int i = 0; i < 5; ++i) {
    EXPECT_EQ(error_of("pwrite"), ENOSPC);
  }
}

TEST(FaultHook, star_matches_and_counts_every_call) {
  const ArmedFaults faults("*:3:errno=EIO");
  EXPECT_EQ(error_of("open"), 0);
  EXPECT_EQ(error_of("pwrite"), 0);
  EXPECT_EQ(error_of("close"), EIO);
  EXPECT_EQ(fault::seen("*"), 3u);
  EXPECT_EQ(fault::seen("pwrite"), 1u);
  EXPECT_EQ(fault::seen("rename"), 0u);
}

TEST(FaultHook, several_rules_apply_to_one_call) {
  const ArmedFaults faults(" write:1:short=512 ; write:1+:short=100;write:2:errno=EIO; ");
  EXPECT_EQ(fault::point("write", "").limit_nbytes, 100u);
  const fault::Outcome second = fault::point("write", "");
  EXPECT_EQ(second.error_number, EIO);
  EXPECT_EQ(second.limit_nbytes, 100u);
}

TEST(FaultHook, knows_errno_names_and_numbers) {
  const std::vector<std::pair<std::string, int>> names = {
      {"EIO", EIO},       {"ENOSPC", ENOSPC}, {"EDQUOT", EDQUOT},       {"EINTR", EINTR},           {"EAGAIN", EAGAIN},
      {"EBUSY", EBUSY},   {"EMFILE", EMFILE}, {"EACCES", EACCES},       {"EPERM", EPERM},           {"ENOENT", ENOENT},
      {"EINVAL", EINVAL}, {"ENOMEM", ENOMEM}, {"ECANCELED", ECANCELED}, {"EOPNOTSUPP", EOPNOTSUPP}, {"ENOSYS", ENOSYS},
      {"EROFS", EROFS},   {"EFBIG", EFBIG},   {"EEXIST", EEXIST},       {"ESTALE", ESTALE},         {"116", 116}};
  for (const auto& [name, number] : names) {
    const ArmedFaults faults("x:1:errno=" + name);
    EXPECT_EQ(error_of("x"), number) << name;
  }
}

TEST(FaultHook, refuses_rules_that_do_not_parse_and_keeps_the_old_ones) {
  const ArmedFaults faults("x:1+:errno=EIO");
  for (const char* rule : {"x", "x:1", ":1:kill", "x:0:kill", "x::kill", "x:a:kill", "x:1++:kill", "x:-1:kill",
                           "x:1:explode", "x:1:errno=EWHAT", "x:1:errno=0", "x:1:errno=5000", "x:1:short=",
                           "x:1:short=1k", "x:1:delay=", "y:1:kill;x:1:kil", "x:99999999999999999999:kill"}) {
    EXPECT_THROW(fault::arm(rule), std::invalid_argument) << rule;
  }
  EXPECT_EQ(error_of("x"), EIO);
}

TEST(FaultHook, steps_are_left_out_as_told_and_are_no_calls) {
  EXPECT_FALSE(fault::skipped("wait", "save/producer")) << "disarmed";
  const ArmedFaults faults(
      "wait/save/producer:2:skip;*:1+:errno=EIO;*:1+:skip;wait/save/fence:1+:errno=EIO;fsync:1:skip");
  EXPECT_FALSE(fault::skipped("wait", "save/producer"));
  EXPECT_TRUE(fault::skipped("wait", "save/producer"));
  EXPECT_FALSE(fault::skipped("wait", "save/producer"));
  EXPECT_FALSE(fault::skipped("wait", "save/fence")) << "a step cannot fail";
  EXPECT_EQ(fault::seen("*"), 0u);
  EXPECT_EQ(fault::seen("wait/save/producer"), 3u);
  EXPECT_EQ(error_of("fsync"), EIO) << "a call cannot be left out";
  EXPECT_EQ(fault::seen_names(), (std::vector<std::string>{"fsync", "wait/save/fence", "wait/save/producer"}));
  fault::arm("wait/a:1+:skip");
  EXPECT_TRUE(fault::skipped("wait", "a"));
  EXPECT_TRUE(fault::skipped("wait", "a"));
  EXPECT_EQ(fault::seen_names(), std::vector<std::string>{"wait/a"}) << "arming forgets";
}

TEST(FaultHook, delay_waits_and_then_lets_the_call_through) {
  const ArmedFaults faults("fsync:1:delay=30");
  const auto begin = std::chrono::steady_clock::now();
  EXPECT_EQ(error_of("fsync"), 0);
  EXPECT_GE(std::chrono::steady_clock::now() - begin, std::chrono::milliseconds(30));
}

TEST(FaultHookDeathTest, kill_ends_the_process_with_sigkill) {
  EXPECT_EXIT(
      {
        fault::arm("rename:2:kill");
        error_of("rename");
        error_of("rename");
        ::_exit(0);
      },
      ::testing::KilledBySignal(SIGKILL), "");
}

TEST(FaultHook, counts_every_call_of_every_thread_once) {
  const ArmedFaults faults("x:1000:errno=EIO");
  std::vector<int> failures(4, 0);
  {
    std::vector<std::jthread> threads;
    for (int& failed : failures) {
      threads.emplace_back([&failed] {
        for (int i = 0; i < 500; ++i) {
          failed += error_of("x") == EIO ? 1 : 0;
        }
      });
    }
  }
  EXPECT_EQ(fault::seen("x"), 2000u);
  EXPECT_EQ(failures[0] + failures[1] + failures[2] + failures[3], 1);
}

// Runs this program again with SNAPSTONE_FAULT set; returns its wait status.
int run_again(const char* rules, const char* filter) {
  const pid_t child = ::fork();
  if (child == 0) {
    ::setenv("SNAPSTONE_FAULT", rules, 1);
    ::freopen("/dev/null", "w", stdout);
    ::freopen("/dev/null", "w", stderr);
    ::execl("/proc/self/exe", "fault_hook_test", filter, "--gtest_also_run_disabled_tests", nullptr);
    ::_exit(127);
  }
  int status = 0;
  ::waitpid(child, &status, 0);
  return status;
}

// Only run by the next test, in a process of its own: exits 42 when the rule from the environment has fired.
TEST(FaultHookEnvironment, DISABLED_child) { ::_exit(error_of("probe") == ESTALE ? 42 : 1); }

TEST(FaultHookEnvironment, arms_the_process_at_load) {
  const int status = run_again("probe:1:errno=ESTALE", "--gtest_filter=FaultHookEnvironment.DISABLED_child");
  ASSERT_TRUE(WIFEXITED(status));
  EXPECT_EQ(WEXITSTATUS(status), 42);
}

TEST(FaultHookEnvironment, a_rule_that_does_not_parse_ends_the_process) {
  const int status = run_again("probe:1:errno=EWHAT", "--gtest_list_tests");
  ASSERT_TRUE(WIFSIGNALED(status));
  EXPECT_EQ(WTERMSIG(status), SIGABRT);
}

}  // namespace
}  // namespace snapstone
