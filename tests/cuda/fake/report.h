// Report: what the fake driver saw, for tests to ask about: counted calls, bytes by kind of copy, and violations, which
// are things that a real device would punish by wrong bytes, by a stall, or not at all. Threads: the caller's lock.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace fakecuda {

class Report {
 public:
  void count(const std::string& name, std::uint64_t amount = 1) { counters_[name] += amount; }
  void count_max(const std::string& name, std::uint64_t value);
  std::uint64_t of(const std::string& name) const;
  // Printed at once, too.
  void violation(const std::string& text);
  const std::vector<std::string>& violations() const { return violations_; }
  std::string json(const std::map<std::string, std::uint64_t>& more) const;
  void clear();

 private:
  std::map<std::string, std::uint64_t> counters_;
  std::vector<std::string> violations_;
};

}  // namespace fakecuda
