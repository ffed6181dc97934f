// The door of every driver function: counted, refused in a forked child, before cuInit, on a lost device, by a rule of
// FAKECUDA_FAIL, without a current context, or while a graph is being captured.
#pragma once

#include <string>
#include <vector>

#include "cuda/driver_types.h"
#include "world.h"

#define FAKECUDA_API extern "C" __attribute__((visibility("default")))

namespace fakecuda {

using snapstone::cuda::Result;

enum class Needs {
  kNothing,
  kInit,
  kContext,
  kUncapturedContext,  // and what breaks every capture that is going on, unless the thread has said that it is careful
};

// Contexts of this thread, the current one last.
std::vector<Context*>& context_stack();
snapstone::cuda::CaptureMode& capture_mode();
// Device of the current context; -1: none.
int current_device();

// The reason to refuse the call, or kSuccess.
Result enter(World& world, const char* name, Needs needs);

template <class Function>
Result call(const char* name, Needs needs, Function&& function) {
  World& world = World::get();
  if (world.forked) return Result::kNotInitialized;  // the mutex may have been locked at the fork
  World::Lock lock(world.mutex);
  if (const Result refusal = enter(world, name, needs); refusal != Result::kSuccess) return refusal;
  return function(world, lock);
}

// What is lost is lost for good.
inline Result lost_or_success(const World& world, int device) { return static_cast<Result>(world.lost(device)); }

inline std::string hex(std::uint64_t value) {
  constexpr const char* kDigits = "0123456789abcdef";
  std::string text;
  do {
    text.insert(text.begin(), kDigits[value % 16]);
    value /= 16;
  } while (value != 0);
  return "0x" + text;
}

}  // namespace fakecuda
