#include "report.h"

#include <algorithm>
#include <cstdio>

namespace fakecuda {
namespace {

constexpr std::size_t kViolationsMax = 1000;

}  // namespace

void Report::count_max(const std::string& name, std::uint64_t value) {
  counters_[name] = std::max(counters_[name], value);
}

std::uint64_t Report::of(const std::string& name) const {
  const auto found = counters_.find(name);
  return found == counters_.end() ? 0 : found->second;
}

void Report::violation(const std::string& text) {
  if (violations_.size() >= kViolationsMax) return;
  violations_.push_back(text);
  std::fprintf(stderr, "fakecuda: violation: %s\n", text.c_str());
}

std::string Report::json(const std::map<std::string, std::uint64_t>& more) const {
  std::map<std::string, std::uint64_t> all = counters_;
  all.insert(more.begin(), more.end());
  std::string text = "{";
  for (const auto& [name, value] : all) {
    text += (text.size() > 1 ? ", \"" : "\"") + name + "\": " + std::to_string(value);
  }
  return text + "}";
}

void Report::clear() {
  counters_.clear();
  violations_.clear();
}

}  // namespace fakecuda
