// Stream: work in order on one device, beside all other streams; Event: a place in a stream that others can wait for.
//
// Streams made here have the highest priority and no ties with the legacy default stream. Borrowed ones are the
// caller's (torch's current stream); they are waited on and recorded in, and never given copies.
// Every wait, every record and every look at an event that order depends on has a name ("save/producer"), by which a
// test can leave it out: fault_hook.h, wait/NAME, record/NAME and poll/NAME.
//
// Ownership: move-only. Destroying a Stream lets its work finish; destroying an Event is safe while others wait for it.
// Threads:   any; an Event is recorded by one thread at a time.
// Failure:   CudaError. After a fault on the device every call fails, with the same code.
#pragma once

#include "cuda/device.h"

namespace snapstone::cuda {

// From a pool of the device's: making one costs a call of the driver only when the pool is empty.
class Event {
 public:
  explicit Event(Device& device);
  Event(Event&& other) noexcept;
  Event& operator=(Event&& other) noexcept;
  ~Event();

  // Whether all work before the last record() has ended; true if there was none. Never blocks.
  bool done(const char* why) const;
  // Blocks the thread until it is done, for ends and errors; never on the step path.
  void synchronize() const;

  Device& device() const noexcept { return *device_; }
  EventHandle handle() const noexcept { return handle_; }

 private:
  Device* device_;
  EventHandle handle_;
};

class Stream {
 public:
  explicit Stream(Device& device);
  static Stream borrowed(Device& device, StreamHandle handle);
  Stream(Stream&& other) noexcept;
  Stream& operator=(Stream&& other) noexcept;
  ~Stream();

  // What is enqueued from now on runs after `event`, as it was last recorded; no matter if it is recorded again. The
  // event may be another device's.
  void wait(const Event& event, const char* why);
  void record(Event& event, const char* why);
  // Blocks the thread until all work so far has ended, for ends and errors; never on the step path.
  void synchronize() const;
  // Whether work is being captured into a CUDA graph, in which case waits for events outside of it are errors.
  bool capturing() const;

  Device& device() const noexcept { return *device_; }
  StreamHandle handle() const noexcept { return handle_; }

 private:
  Stream(Device& device, StreamHandle handle, bool owned);

  Device* device_;
  StreamHandle handle_;
  bool owned_;
};

}  // namespace snapstone::cuda
