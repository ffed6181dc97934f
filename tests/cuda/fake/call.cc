#include "call.h"

namespace fakecuda {

using snapstone::cuda::CaptureMode;

std::vector<Context*>& context_stack() {
  thread_local std::vector<Context*> stack;
  return stack;
}

CaptureMode& capture_mode() {
  thread_local CaptureMode mode = CaptureMode::kGlobal;
  return mode;
}

int current_device() { return context_stack().empty() ? -1 : context_stack().back()->device; }

Result enter(World& world, const char* name, Needs needs) {
  world.report.count(name);
  if (needs != Needs::kNothing && !world.initialised) return Result::kNotInitialized;
  const int device = current_device();
  if (device >= 0 && world.initialised && world.lost(device) != 0) return lost_or_success(world, device);
  if (const int code = world.injected(name); code != 0) {
    const bool takes_device = code >= 700 && code <= 719 && code != 712 && code != 713;
    if (takes_device && device >= 0) world.lose(device, code);
    return static_cast<Result>(code);
  }
  if (needs >= Needs::kContext && device < 0) {
    world.report.violation(std::string(name) + " without a current context");
    return Result::kInvalidContext;
  }
  if (needs == Needs::kUncapturedContext && world.captures != 0 && capture_mode() == CaptureMode::kGlobal) {
    world.report.violation(std::string(name) + " while a graph is captured");
    return Result::kStreamCaptureUnsupported;
  }
  return Result::kSuccess;
}

}  // namespace fakecuda
