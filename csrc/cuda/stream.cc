#include "cuda/stream.h"

#include <map>
#include <mutex>
#include <utility>
#include <vector>

namespace snapstone::cuda {
namespace {

// Events that nobody has. One that is still pending may be recorded again: waits refer to the record they saw.
class EventPool {
 public:
  EventHandle take(Device& device) {
    {
      const std::lock_guard lock(mutex_);
      std::vector<EventHandle>& free = free_[&device];
      if (!free.empty()) {
        const EventHandle handle = free.back();
        free.pop_back();
        return handle;
      }
    }
    const Scope scope(device);
    EventHandle handle = nullptr;
    Driver::require().cuEventCreate.must(device.ordinal(), &handle, kEventDisableTiming);
    return handle;
  }

  void give(Device& device, EventHandle handle) {
    const std::lock_guard lock(mutex_);
    free_[&device].push_back(handle);
  }

 private:
  std::mutex mutex_;
  std::map<const Device*, std::vector<EventHandle>> free_;
};

EventPool& pool() {
  static EventPool& instance = *new EventPool;
  return instance;
}

StreamHandle make_stream(Device& device) {
  const Driver& driver = Driver::require();
  const Scope scope(device);
  int least = 0;
  int greatest = 0;  // the smaller number
  driver.cuCtxGetStreamPriorityRange.must(device.ordinal(), &least, &greatest);
  StreamHandle handle = nullptr;
  driver.cuStreamCreateWithPriority.must(device.ordinal(), &handle, kStreamNonBlocking, greatest);
  return handle;
}

}  // namespace

Event::Event(Device& device) : device_(&device), handle_(pool().take(device)) {}

Event::Event(Event&& other) noexcept : device_(other.device_), handle_(std::exchange(other.handle_, nullptr)) {}

Event& Event::operator=(Event&& other) noexcept {
  std::swap(device_, other.device_);
  std::swap(handle_, other.handle_);
  return *this;
}

Event::~Event() {
  if (handle_ == nullptr || Driver::get() == nullptr) return;  // in a forked child the pool may be locked for good
  try {
    pool().give(*device_, handle_);
  } catch (...) {
    release(*device_, [this](const Driver& driver) { driver.cuEventDestroy(handle_); });
  }
}

bool Event::done(const char* why) const {
  if (fault::skipped("poll", why)) return true;
  const Scope scope(*device_);
  const Driver& driver = Driver::require();
  const Result result = driver.cuEventQuery(handle_);
  if (result == Result::kNotReady) return false;
  check(result, driver.cuEventQuery.name(), device_->ordinal());
  return true;
}

void Event::synchronize() const {
  const Scope scope(*device_);
  Driver::require().cuEventSynchronize.must(device_->ordinal(), handle_);
}

Stream::Stream(Device& device) : Stream(device, make_stream(device), true) {}

Stream::Stream(Device& device, StreamHandle handle, bool owned) : device_(&device), handle_(handle), owned_(owned) {}

Stream Stream::borrowed(Device& device, StreamHandle handle) { return Stream(device, handle, false); }

Stream::Stream(Stream&& other) noexcept
    : device_(other.device_), handle_(other.handle_), owned_(std::exchange(other.owned_, false)) {}

Stream& Stream::operator=(Stream&& other) noexcept {
  std::swap(device_, other.device_);
  std::swap(handle_, other.handle_);
  std::swap(owned_, other.owned_);
  return *this;
}

Stream::~Stream() {
  if (owned_) release(*device_, [this](const Driver& driver) { driver.cuStreamDestroy(handle_); });
}

void Stream::wait(const Event& event, const char* why) {
  if (fault::skipped("wait", why)) return;
  const Scope scope(*device_);
  Driver::require().cuStreamWaitEvent.must(device_->ordinal(), handle_, event.handle(), 0);
}

void Stream::record(Event& event, const char* why) {
  if (fault::skipped("record", why)) return;
  const Scope scope(*device_);
  Driver::require().cuEventRecord.must(device_->ordinal(), event.handle(), handle_);
}

void Stream::synchronize() const {
  const Scope scope(*device_);
  Driver::require().cuStreamSynchronize.must(device_->ordinal(), handle_);
}

bool Stream::capturing() const {
  const Scope scope(*device_);
  CaptureStatus status = CaptureStatus::kNone;
  const Driver& driver = Driver::require();
  const Result result = driver.cuStreamIsCapturing(handle_, &status);
  // Said of the legacy default stream while one that it waits for is captured: it can be given nothing then, either.
  if (result == Result::kStreamCaptureImplicit) return true;
  check(result, driver.cuStreamIsCapturing.name(), device_->ordinal());
  return status != CaptureStatus::kNone;
}

}  // namespace snapstone::cuda
