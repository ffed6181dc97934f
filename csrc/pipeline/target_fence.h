// TargetFence: where a load's writes to devices stand among the work of the caller's streams: after what was enqueued
// before the load, before what is enqueued after it.
//
// Threads: mark() before the job starts; note() and lose() by lanes; the rest by anyone.
// Failure: CudaError; std::logic_error for a stream that is being captured into a CUDA graph, since nothing outside of
// a
//          graph can wait for a place in it.
#pragma once

#include <cstdint>
#include <mutex>
#include <utility>
#include <vector>

#include "cuda/stream.h"

namespace snapstone::pipeline {

class TargetFence {
 public:
  // Targets on the device are written after all that is enqueued in `stream` so far. Once for each stream that uses
  // them.
  void mark(std::int32_t ordinal, cuda::StreamHandle stream);
  // What is enqueued in `stream` from now on runs after all writes to targets on the device. Once the job has finished.
  void fence(std::int32_t ordinal, cuda::StreamHandle stream) const;
  // Whether it is known that no device writes to a target any more; those must stay alive until then. Once the job has
  // finished.
  bool settled() const noexcept;

  // Makes a stream of the job's wait for the marks of its device.
  void hold_back(cuda::Stream& stream) const;
  // An event after all writes of one lane to targets on its device.
  void note(std::int32_t ordinal, cuda::Event landed);
  void lose() noexcept;  // writes whose end cannot be known

 private:
  using Events = std::vector<std::pair<std::int32_t, cuda::Event>>;

  Events marks_;
  mutable std::mutex mutex_;
  Events landed_;
  bool lost_ = false;
};

}  // namespace snapstone::pipeline
