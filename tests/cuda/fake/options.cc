#include "options.h"

#include <dlfcn.h>
#include <elf.h>
#include <link.h>
#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <sstream>
#include <stdexcept>
#include <string_view>

namespace fakecuda {
namespace {

std::string text_of(const char* name, const char* fallback) {
  const char* value = std::getenv(name);
  return value != nullptr && *value != '\0' ? value : fallback;
}

double number_of(const char* name, double fallback) {
  const std::string text = text_of(name, "");
  return text.empty() ? fallback : std::stod(text);
}

std::vector<std::string> split(const std::string& text, char separator) {
  std::vector<std::string> parts;
  std::istringstream stream(text);
  for (std::string part; std::getline(stream, part, separator);) {
    if (!part.empty()) parts.push_back(part);
  }
  return parts;
}

struct Strings {
  char* begin = nullptr;
  std::size_t nbytes = 0;
};

// The string table that dlsym reads names from. Tables have absolute addresses once glibc has loaded the library.
Strings own_symbol_names() {
  Dl_info info{};
  void* map = nullptr;
  if (::dladdr1(reinterpret_cast<const void*>(&hide_symbols), &info, &map, RTLD_DL_LINKMAP) == 0) {
    throw std::runtime_error("dladdr1");
  }
  Strings strings;
  for (const ElfW(Dyn)* entry = static_cast<link_map*>(map)->l_ld; entry->d_tag != DT_NULL; ++entry) {
    if (entry->d_tag == DT_STRTAB) strings.begin = reinterpret_cast<char*>(entry->d_un.d_ptr);
    if (entry->d_tag == DT_STRSZ) strings.nbytes = entry->d_un.d_val;
  }
  return strings;
}

void hide(const Strings& strings, const std::string& name) {
  const std::string pattern = '\0' + name + '\0';
  const std::string_view names(strings.begin, strings.nbytes);
  const auto at = names.find(pattern);
  if (at == std::string_view::npos) throw std::invalid_argument("FAKECUDA_HIDE: no symbol " + name);
  strings.begin[at + 1] = '-';
}

}  // namespace

Mode parse_mode(const std::string& text) {
  if (text == "eager") return Mode::kEager;
  if (text == "lazy") return Mode::kLazy;
  if (text == "chaos") return Mode::kChaos;
  throw std::invalid_argument("FAKECUDA_MODE=" + text);
}

std::vector<FailRule> parse_fail_rules(const std::string& text) {
  std::vector<FailRule> rules;
  for (const std::string& part : split(text, ';')) {
    const std::vector<std::string> fields = split(part, ':');
    if (fields.size() != 3) throw std::invalid_argument("FAKECUDA_FAIL: " + part);
    const bool later = fields[1].back() == '+';
    rules.push_back({fields[0], std::stoull(fields[1]), later, std::stoi(fields[2])});
  }
  return rules;
}

Options Options::from_environment() {
  Options options;
  options.mode = parse_mode(text_of("FAKECUDA_MODE", "chaos"));
  const std::string seed = text_of("FAKECUDA_SEED", "");
  options.seed = seed.empty() ? std::random_device{}() : std::stoull(seed);
  options.late_us = static_cast<std::uint64_t>(number_of("FAKECUDA_LATE_US", 300));
  options.gbps = number_of("FAKECUDA_GBPS", 0);
  options.devices = static_cast<int>(number_of("FAKECUDA_DEVICES", 2));
  options.gap_bytes = static_cast<std::uint64_t>(number_of("FAKECUDA_GAP", 512));
  options.memory_bytes = static_cast<std::uint64_t>(number_of("FAKECUDA_MEMORY", 4.0 * (1ull << 30)));
  options.compute_capability = static_cast<int>(number_of("FAKECUDA_CC", 90));
  options.numa_node = static_cast<int>(number_of("FAKECUDA_NUMA", -1));
  options.pools = number_of("FAKECUDA_POOLS", 1) != 0;
  options.host_pointers = number_of("FAKECUDA_HOST_POINTERS", 1) != 0;
  options.version = static_cast<int>(number_of("FAKECUDA_VERSION", 13000));
  options.guard = number_of("FAKECUDA_GUARD", 1) != 0;
  options.fail_rules = parse_fail_rules(text_of("FAKECUDA_FAIL", ""));
  return options;
}

void hide_symbols(int version) {
  std::vector<std::string> names = split(text_of("FAKECUDA_HIDE", ""), ',');
  if (version < 13000) names.emplace_back("cuMemcpyBatchAsync_v2");
  if (version < 12080) names.emplace_back("cuMemcpyBatchAsync");
  if (names.empty()) return;
  const Strings strings = own_symbol_names();
  const auto page = reinterpret_cast<std::uintptr_t>(strings.begin) & ~std::uintptr_t{4095};
  const std::size_t nbytes = reinterpret_cast<std::uintptr_t>(strings.begin) + strings.nbytes - page;
  // Never made read-only again: other tables may share the pages, and nobody writes them by accident.
  if (::mprotect(reinterpret_cast<void*>(page), nbytes, PROT_READ | PROT_WRITE) != 0) {
    throw std::runtime_error("mprotect of the symbol names");
  }
  for (const std::string& name : names) hide(strings, name);
}

}  // namespace fakecuda
