// ProducerMark: a place in the streams that produce what is saved, one per device: copies wait for it.
//
// Lives until the last save that it is for has enqueued its copies. Threads: any, once made.
// Failure: CudaError; std::logic_error for a stream that is being captured into a CUDA graph, since nothing outside of
//          a graph can wait for a place in it; std::invalid_argument for a device that the mark lacks.
#pragma once

#include <cstdint>
#include <map>
#include <stdexcept>
#include <string>

#include "cuda/stream.h"

namespace snapstone::pipeline {

class ProducerMark {
 public:
  // By ordinal the stream, 0 for the legacy default one.
  explicit ProducerMark(const std::map<std::int32_t, std::uintptr_t>& streams) {
    for (const auto& [ordinal, handle] : streams) {
      cuda::Device& device = cuda::Device::of(ordinal);
      cuda::Stream stream = cuda::Stream::borrowed(device, reinterpret_cast<cuda::StreamHandle>(handle));
      if (stream.capturing())
        throw std::logic_error(
            "a stream that is being captured into a CUDA graph cannot be saved from; save before or after the capture");
      stream.record(events_.emplace(ordinal, cuda::Event(device)).first->second, "save/mark");
    }
  }

  // What `stream` is given from now on runs after the mark on its device; nothing where that has none.
  void hold_back(cuda::Stream& stream) const {
    const auto found = events_.find(stream.device().ordinal());
    if (found != events_.end()) stream.wait(found->second, "save/beside");
  }

  const cuda::Event& on(std::int32_t ordinal) const {
    const auto found = events_.find(ordinal);
    if (found == events_.end())
      throw std::invalid_argument("no stream was marked on device " + std::to_string(ordinal));
    return found->second;
  }

 private:
  std::map<std::int32_t, cuda::Event> events_;
};

}  // namespace snapstone::pipeline
