#include "pipeline/target_fence.h"

#include <algorithm>
#include <stdexcept>

namespace snapstone::pipeline {
namespace {

cuda::Stream stream_of_caller(std::int32_t ordinal, cuda::StreamHandle handle) {
  cuda::Stream stream = cuda::Stream::borrowed(cuda::Device::of(ordinal), handle);
  if (stream.capturing()) {
    throw std::logic_error("nothing can be loaded for a stream that is being captured into a CUDA graph");
  }
  return stream;
}

}  // namespace

void TargetFence::mark(std::int32_t ordinal, cuda::StreamHandle stream) {
  cuda::Stream caller = stream_of_caller(ordinal, stream);
  cuda::Event event(caller.device());
  caller.record(event, "load/mark");
  marks_.emplace_back(ordinal, std::move(event));
}

void TargetFence::fence(std::int32_t ordinal, cuda::StreamHandle stream) const {
  cuda::Stream caller = stream_of_caller(ordinal, stream);
  const std::lock_guard lock(mutex_);
  for (const auto& [device, event] : landed_) {
    if (device == ordinal) caller.wait(event, "load/fence");
  }
}

bool TargetFence::settled() const noexcept {
  const std::lock_guard lock(mutex_);
  try {
    return !lost_ && std::all_of(landed_.begin(), landed_.end(),
                                 [](const auto& landed) { return landed.second.done("load/settled"); });
  } catch (...) {
    return false;  // of a device that does not answer nobody knows
  }
}

void TargetFence::hold_back(cuda::Stream& stream) const {
  for (const auto& [device, event] : marks_) {
    if (device == stream.device().ordinal()) stream.wait(event, "load/targets");
  }
}

void TargetFence::note(std::int32_t ordinal, cuda::Event landed) {
  const std::lock_guard lock(mutex_);
  landed_.emplace_back(ordinal, std::move(landed));
}

void TargetFence::lose() noexcept {
  const std::lock_guard lock(mutex_);
  lost_ = true;
}

}  // namespace snapstone::pipeline
