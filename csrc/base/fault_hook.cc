// Rules live behind one mutex: armed processes are test processes, where order matters more than speed.
//
// A call that several rules match gets the first errno, the smallest byte limit and the sum of the delays. Counting
// goes on after a rule has fired, so "fsync:2:errno=EIO;fsync:3:kill" means what it says. Delays sleep outside the
// mutex.
#include "base/fault_hook.h"

#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <string_view>
#include <thread>
#include <utility>
#include <vector>

namespace snapstone::fault {

constinit std::atomic<bool> armed{false};

namespace {

constexpr int kErrnoMax = 4095;  // the kernel's MAX_ERRNO

struct Rule {
  std::string call;
  std::uint64_t nth = 1;
  bool and_later = false;
  int error_number = 0;
  std::uint64_t limit_nbytes = std::numeric_limits<std::uint64_t>::max();
  std::uint64_t delay_ms = 0;
  bool kill = false;
  bool skip = false;

  bool matches(std::uint64_t count) const { return count == nth || (and_later && count > nth); }
};

struct State {
  std::mutex mutex;
  std::vector<Rule> rules;
  std::map<std::string, std::uint64_t, std::less<>> seen;
  std::uint64_t seen_total = 0;

  std::uint64_t count(std::string_view name) {
    auto entry = seen.find(name);
    if (entry == seen.end()) {
      entry = seen.emplace(name, 0).first;
    }
    return ++entry->second;
  }
};

// Never destroyed: threads may still pass points while the process exits.
State& state() {
  static State& instance = *new State;
  return instance;
}

constexpr std::pair<std::string_view, int> kErrnoNames[] = {
    {"EACCES", EACCES},
    {"EAGAIN", EAGAIN},
    {"EBADF", EBADF},
    {"EBUSY", EBUSY},
    {"ECANCELED", ECANCELED},
    {"EDQUOT", EDQUOT},
    {"EEXIST", EEXIST},
    {"EFAULT", EFAULT},
    {"EFBIG", EFBIG},
    {"EINTR", EINTR},
    {"EINVAL", EINVAL},
    {"EIO", EIO},
    {"EISDIR", EISDIR},
    {"ELOOP", ELOOP},
    {"EMFILE", EMFILE},
    {"EMLINK", EMLINK},
    {"ENAMETOOLONG", ENAMETOOLONG},
    {"ENFILE", ENFILE},
    {"ENODEV", ENODEV},
    {"ENOENT", ENOENT},
    {"ENOLCK", ENOLCK},
    {"ENOMEM", ENOMEM},
    {"ENOSPC", ENOSPC},
    {"ENOSYS", ENOSYS},
    {"ENOTDIR", ENOTDIR},
    {"ENOTEMPTY", ENOTEMPTY},
    {"ENXIO", ENXIO},
    {"EOPNOTSUPP", EOPNOTSUPP},
    {"EPERM", EPERM},
    {"EROFS", EROFS},
    {"ESTALE", ESTALE},
    {"ETIMEDOUT", ETIMEDOUT},
    {"ETXTBSY", ETXTBSY},
    {"EXDEV", EXDEV},
};

[[noreturn]] void refuse(std::string_view rule, const char* why) {
  throw std::invalid_argument("SNAPSTONE_FAULT rule '" + std::string(rule) + "': " + why +
                              "; expected CALL:NTH[+]:errno=NAME|short=BYTES|delay=MILLISECONDS|kill|skip");
}

std::optional<std::uint64_t> parse_number(std::string_view text) {
  std::uint64_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (text.empty() || error != std::errc{} || end != text.data() + text.size()) {
    return std::nullopt;
  }
  return value;
}

int parse_errno(std::string_view rule, std::string_view text) {
  for (const auto& [name, value] : kErrnoNames) {
    if (name == text) {
      return value;
    }
  }
  const auto number = parse_number(text);
  if (!number || *number == 0 || *number > static_cast<std::uint64_t>(kErrnoMax)) {
    refuse(rule, "unknown errno");
  }
  return static_cast<int>(*number);
}

void parse_action(std::string_view text, std::string_view action, Rule& rule) {
  const auto take = [&action](std::string_view prefix) {
    if (!action.starts_with(prefix)) {
      return false;
    }
    action.remove_prefix(prefix.size());
    return true;
  };
  const auto number = [&] {
    const auto value = parse_number(action);
    if (!value) {
      refuse(text, "not a number");
    }
    return *value;
  };
  if (action == "kill") {
    rule.kill = true;
  } else if (action == "skip") {
    rule.skip = true;
  } else if (take("errno=")) {
    rule.error_number = parse_errno(text, action);
  } else if (take("short=")) {
    rule.limit_nbytes = number();
  } else if (take("delay=")) {
    rule.delay_ms = number();
  } else {
    refuse(text, "unknown action");
  }
}

Rule parse_rule(std::string_view text) {
  const auto first = text.find(':');
  const auto second = first == std::string_view::npos ? first : text.find(':', first + 1);
  if (second == std::string_view::npos || first == 0) {
    refuse(text, "three fields are needed");
  }
  Rule rule;
  rule.call = text.substr(0, first);
  std::string_view nth = text.substr(first + 1, second - first - 1);
  if (nth.ends_with('+')) {
    rule.and_later = true;
    nth.remove_suffix(1);
  }
  const auto number = parse_number(nth);
  if (!number || *number == 0) {
    refuse(text, "NTH counts from 1");
  }
  rule.nth = *number;
  parse_action(text, text.substr(second + 1), rule);
  return rule;
}

std::vector<Rule> parse_rules(std::string_view text) {
  constexpr std::string_view kSpace = " \t\n";
  std::vector<Rule> rules;
  while (!text.empty()) {
    const auto end = std::min(text.find(';'), text.size());
    std::string_view rule = text.substr(0, end);
    text.remove_prefix(std::min(end + 1, text.size()));
    rule.remove_prefix(std::min(rule.find_first_not_of(kSpace), rule.size()));
    rule = rule.substr(0, rule.find_last_not_of(kSpace) + 1);
    if (!rule.empty()) {
      rules.push_back(parse_rule(rule));
    }
  }
  return rules;
}

// A test whose faults are not injected would pass without proving anything: a rule that does not parse ends the
// process.
[[maybe_unused]] const bool armed_from_environment = [] {
  const char* rules = std::getenv("SNAPSTONE_FAULT");
  if (rules == nullptr || *rules == '\0') {
    return false;
  }
  try {
    arm(rules);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "snapstone: %s\n", error.what());
    std::abort();
  }
  return true;
}();

}  // namespace

Outcome fire(const char* call, const char* /*path*/) {
  Outcome outcome;
  std::uint64_t delay_ms = 0;
  {
    State& shared = state();
    const std::lock_guard lock(shared.mutex);
    if (!armed.load(std::memory_order_relaxed)) {
      return outcome;  // disarmed between the branch in point() and here
    }
    const std::uint64_t total = ++shared.seen_total;
    const std::uint64_t count = shared.count(call);
    for (const Rule& rule : shared.rules) {
      const bool any = rule.call == "*";
      if (!any && rule.call != call) {
        continue;
      }
      const std::uint64_t nth = any ? total : count;
      if (!rule.matches(nth)) {
        continue;
      }
      if (rule.kill) {
        ::kill(::getpid(), SIGKILL);
      }
      if (outcome.error_number == 0) {
        outcome.error_number = rule.error_number;
      }
      outcome.limit_nbytes = std::min(outcome.limit_nbytes, rule.limit_nbytes);
      delay_ms += rule.delay_ms;
    }
  }
  if (delay_ms != 0) {
    std::this_thread::sleep_for(std::chrono::milliseconds(delay_ms));
  }
  return outcome;
}

bool fire_skip(const char* kind, const char* name) {
  const std::string step = std::string(kind) + "/" + name;
  State& shared = state();
  const std::lock_guard lock(shared.mutex);
  if (!armed.load(std::memory_order_relaxed)) {
    return false;
  }
  const std::uint64_t count = shared.count(step);
  return std::any_of(shared.rules.begin(), shared.rules.end(),
                     [&](const Rule& rule) { return rule.skip && rule.call == step && rule.matches(count); });
}

void arm(const std::string& rules) {
  std::vector<Rule> parsed = parse_rules(rules);
  State& shared = state();
  const std::lock_guard lock(shared.mutex);
  shared.rules = std::move(parsed);
  shared.seen.clear();
  shared.seen_total = 0;
  armed.store(true, std::memory_order_relaxed);
}

void disarm() {
  State& shared = state();
  const std::lock_guard lock(shared.mutex);
  armed.store(false, std::memory_order_relaxed);
  shared.rules.clear();
  shared.seen.clear();
  shared.seen_total = 0;
}

std::uint64_t seen(const std::string& call) {
  State& shared = state();
  const std::lock_guard lock(shared.mutex);
  if (call == "*") {
    return shared.seen_total;
  }
  const auto entry = shared.seen.find(call);
  return entry == shared.seen.end() ? 0 : entry->second;
}

std::vector<std::string> seen_names() {
  State& shared = state();
  const std::lock_guard lock(shared.mutex);
  std::vector<std::string> names;
  for (const auto& [name, count] : shared.seen) {
    names.push_back(name);
  }
  return names;
}

}  // namespace snapstone::fault
