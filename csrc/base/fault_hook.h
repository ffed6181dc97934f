// The fault seam: line one of every function in csrc/os/, every io_uring submission and completion and every call of
// the CUDA driver asks here whether to fail; every step that only ordering depends on asks whether to be left out.
//
// Off (always, outside tests): one relaxed load and a predictable branch.
// Armed by arm() or by SNAPSTONE_FAULT in the environment with ';'-separated rules
//     CALL:NTH[+]:ACTION        fsync:2:errno=EIO   pwrite:3+:errno=ENOSPC   write:1:short=512   renameat2:1:kill
// CALL is the name given to point() (table in os/call.h; the driver's own names, as in cuda/driver.h) or '*'; NTH
// counts matching calls of this process from 1; '+' means that call and all later ones. ACTION: errno=NAME|NUMBER,
// short=BYTES, kill (SIGKILL to this process), delay=MILLISECONDS. Only pread, pwrite, copy_file_range and io_uring
// completions have a count for `short` to limit. For calls of the driver the errno is a CUresult.
//
// Steps without which results may be wrong, though no call fails, have names too, "KIND/NAME": the waits of streams
// ("wait/save/producer"), records of events, looks at them (left out: it seems to be done), what keeps memory alive.
// The ACTION skip leaves such a step out, and means nothing for calls; '*' neither matches nor counts steps.
//     wait/save/producer:1+:skip
// Threads: any.
#pragma once

#include <atomic>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

namespace snapstone::fault {

struct Outcome {
  int error_number = 0;  // nonzero: fail with this errno without making the call
  std::uint64_t limit_nbytes = std::numeric_limits<std::uint64_t>::max();  // transfer at most this much
};

extern std::atomic<bool> armed;

Outcome fire(const char* call, const char* path);

inline Outcome point(const char* call, const char* path) {
  if (!armed.load(std::memory_order_relaxed)) [[likely]] {
    return {};
  }
  return fire(call, path);
}

bool fire_skip(const char* kind, const char* name);

// Whether the step `kind`/`name` is to be left out.
inline bool skipped(const char* kind, const char* name) {
  return armed.load(std::memory_order_relaxed) && fire_skip(kind, name);
}

// Replaces all rules and resets the counters; throws std::invalid_argument for a rule that does not parse.
void arm(const std::string& rules);
void disarm();
// Calls of `call`, or passes of that step, seen since arm(); "*" counts all calls. Zero while disarmed.
std::uint64_t seen(const std::string& call);
// The names of all calls and steps seen since arm(), sorted.
std::vector<std::string> seen_names();

}  // namespace snapstone::fault
