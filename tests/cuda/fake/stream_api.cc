// Streams and events.
#include "call.h"

using namespace fakecuda;
using snapstone::cuda::CaptureStatus;
using snapstone::cuda::EventHandle;
using snapstone::cuda::StreamHandle;

namespace {

Stream* stream_of(World& world, StreamHandle handle) { return world.find_stream(handle, current_device()); }

Result bad_handle(World& world, const char* name) {
  world.report.violation(std::string(name) + ": no such stream or event");
  return Result::kInvalidHandle;
}

}  // namespace

FAKECUDA_API Result cuStreamCreateWithPriority(StreamHandle* handle, unsigned flags, int priority) {
  return call("cuStreamCreateWithPriority", Needs::kContext, [&](World& world, auto&) {
    if (flags != snapstone::cuda::kStreamNonBlocking) {
      world.report.violation("a stream with ties to the legacy default stream");
      return Result::kInvalidValue;
    }
    if (priority == -5) world.report.count("streams_of_highest_priority");
    *handle = reinterpret_cast<StreamHandle>(world.make_stream(current_device()));
    return Result::kSuccess;
  });
}

// What is enqueued still runs.
FAKECUDA_API Result cuStreamDestroy_v2(StreamHandle handle) {
  return call("cuStreamDestroy_v2", Needs::kContext, [&](World& world, auto&) {
    Stream* const stream = handle == nullptr ? nullptr : stream_of(world, handle);
    if (stream == nullptr) return bad_handle(world, "cuStreamDestroy_v2");
    stream->destroyed = true;
    world.demand({stream, stream->enqueued});
    return Result::kSuccess;
  });
}

FAKECUDA_API Result cuStreamWaitEvent(StreamHandle stream_handle, EventHandle event_handle, unsigned flags) {
  return call("cuStreamWaitEvent", Needs::kContext, [&](World& world, auto&) {
    Stream* const stream = stream_of(world, stream_handle);
    Event* const event = world.find_event(event_handle);
    if (stream == nullptr || event == nullptr || flags != 0) return bad_handle(world, "cuStreamWaitEvent");
    if (stream->capturing != event->captured) {
      world.report.violation("a wait reaches out of the graph that is captured");
      return Result::kStreamCaptureIsolation;
    }
    if (event->place.stream == nullptr) return Result::kSuccess;
    stream->clock.join(event->clock);
    auto work = std::make_unique<Work>();
    work->what = "wait";
    work->after = event->place;
    world.enqueue(*stream, std::move(work));
    return Result::kSuccess;
  });
}

FAKECUDA_API Result cuStreamSynchronize(StreamHandle handle) {
  return call("cuStreamSynchronize", Needs::kUncapturedContext, [&](World& world, World::Lock& lock) {
    Stream* const stream = stream_of(world, handle);
    if (stream == nullptr) return bad_handle(world, "cuStreamSynchronize");
    const Place place{stream, stream->enqueued};
    const Clock clock = stream->clock;
    world.wait_for(lock, place);
    world.host_clock.join(clock);
    return lost_or_success(world, stream->device);
  });
}

FAKECUDA_API Result cuStreamIsCapturing(StreamHandle handle, CaptureStatus* status) {
  return call("cuStreamIsCapturing", Needs::kContext, [&](World& world, auto&) {
    Stream* const stream = stream_of(world, handle);
    if (stream == nullptr) return bad_handle(world, "cuStreamIsCapturing");
    *status = stream->capturing ? CaptureStatus::kActive : CaptureStatus::kNone;
    return Result::kSuccess;
  });
}

FAKECUDA_API Result cuEventCreate(EventHandle* handle, unsigned flags) {
  return call("cuEventCreate", Needs::kContext, [&](World& world, auto&) {
    if (flags != snapstone::cuda::kEventDisableTiming) world.report.violation("an event that takes the time");
    *handle = reinterpret_cast<EventHandle>(world.make_event(current_device()));
    return Result::kSuccess;
  });
}

FAKECUDA_API Result cuEventDestroy_v2(EventHandle handle) {
  return call("cuEventDestroy_v2", Needs::kContext, [&](World& world, auto&) {
    Event* const event = world.find_event(handle);
    if (event == nullptr) return bad_handle(world, "cuEventDestroy_v2");
    event->destroyed = true;
    return Result::kSuccess;
  });
}

FAKECUDA_API Result cuEventRecord(EventHandle event_handle, StreamHandle stream_handle) {
  return call("cuEventRecord", Needs::kContext, [&](World& world, auto&) {
    Stream* const stream = stream_of(world, stream_handle);
    Event* const event = world.find_event(event_handle);
    if (stream == nullptr || event == nullptr || stream->device != event->device) {
      return bad_handle(world, "cuEventRecord");
    }
    auto work = std::make_unique<Work>();
    work->what = "record";
    event->place = world.enqueue(*stream, std::move(work));
    event->clock = stream->clock;
    event->captured = stream->capturing;
    event->refusals = world.options.mode == Mode::kLazy ? 1 + static_cast<int>(world.random() % 3) : 0;
    return Result::kSuccess;
  });
}

FAKECUDA_API Result cuEventQuery(EventHandle handle) {
  return call("cuEventQuery", Needs::kUncapturedContext, [&](World& world, auto&) {
    Event* const event = world.find_event(handle);
    if (event == nullptr) return bad_handle(world, "cuEventQuery");
    if (const int code = world.lost(event->device); code != 0) return static_cast<Result>(code);
    if (event->refusals > 0) {
      --event->refusals;
      return Result::kNotReady;
    }
    if (!world.reached(event->place)) {
      world.demand(event->place);
      return Result::kNotReady;
    }
    world.host_clock.join(event->clock);
    return Result::kSuccess;
  });
}

FAKECUDA_API Result cuEventSynchronize(EventHandle handle) {
  return call("cuEventSynchronize", Needs::kUncapturedContext, [&](World& world, World::Lock& lock) {
    Event* const event = world.find_event(handle);
    if (event == nullptr) return bad_handle(world, "cuEventSynchronize");
    const int device = event->device;
    const Place place = event->place;
    const Clock clock = event->clock;
    world.wait_for(lock, place);
    world.host_clock.join(clock);
    return lost_or_success(world, device);
  });
}
