// What a test asks of the fake driver, read once from the environment.
//
//   FAKECUDA_MODE      eager (work runs as soon as it can), lazy (only when somebody waits or has asked a few times),
//                      chaos (late, and in random order across streams); default chaos
//   FAKECUDA_SEED      of chaos; default random, and shown by fakecuda_counters()
//   FAKECUDA_LATE_US   how late at most work of a stream begins in chaos; default 300
//   FAKECUDA_GBPS      speed of each direction of each device's link; default 0: unlimited
//   FAKECUDA_DEVICES   default 2; FAKECUDA_MEMORY, bytes of each, default 4 GiB; FAKECUDA_CC, default 90;
//                      FAKECUDA_NUMA, node of all of them, default -1; FAKECUDA_POOLS=0: no stream-ordered memory;
//                      FAKECUDA_HOST_POINTERS=0: registered memory has another address for devices (WSL)
//   FAKECUDA_GAP       bytes between allocations, default 512, so that one cannot be overrun into the next; 0:
//                      adjacent, as the driver's may be
//   FAKECUDA_VERSION   default 13000
//   FAKECUDA_HIDE      symbols that the library does not have, separated by commas
//   FAKECUDA_FAIL      CALL:NTH[+]:CODE, separated by ';': the call fails with that CUresult. CALL "work" counts what
//                      runs on devices instead. Codes that take a device with them (700, 719, ...) do.
//   FAKECUDA_GUARD=0   leave host memory accessible that copies are in flight to or from
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace fakecuda {

enum class Mode { kEager, kLazy, kChaos };

struct FailRule {
  std::string call;
  std::uint64_t nth = 1;
  bool and_later = false;
  int code = 0;
};

// Both throw std::invalid_argument.
Mode parse_mode(const std::string& text);
std::vector<FailRule> parse_fail_rules(const std::string& text);

struct Options {
  Mode mode = Mode::kChaos;
  std::uint64_t seed = 0;
  std::uint64_t late_us = 300;
  double gbps = 0;
  int devices = 2;
  std::uint64_t memory_bytes = 4ull << 30;
  std::uint64_t gap_bytes = 512;
  int compute_capability = 90;
  int numa_node = -1;
  bool pools = true;
  bool host_pointers = true;
  int version = 13000;
  bool guard = true;
  std::vector<FailRule> fail_rules;

  static Options from_environment();
};

// Renames the hidden symbols where the dynamic linker looks for them: those of FAKECUDA_HIDE, and those newer than
// `version`.
void hide_symbols(int version);

}  // namespace fakecuda
