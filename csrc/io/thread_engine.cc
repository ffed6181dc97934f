#include "io/thread_engine.h"

#include <pthread.h>
#include <signal.h>

#include <algorithm>
#include <cassert>
#include <cerrno>
#include <chrono>
#include <new>
#include <system_error>

#include "base/error.h"
#include "base/limits.h"
#include "os/process.h"

namespace snapstone::io {
namespace {

// All bytes of a request, or the reason why not. os:: retries EINTR and short counts and passes the fault seam.
int transfer(const Request& request) noexcept {
  const os::File& file = *request.file;
  bool direct_dropped = false;
  for (unsigned retries = 0;;) {
    try {
      if (request.write) {
        os::pwrite_full(file.fd.get(), file.path, request.buffer, request.nbytes, request.offset);
      } else {
        os::pread_full(file.fd.get(), file.path, request.buffer, request.nbytes, request.offset);
      }
      return 0;
    } catch (const OsError& error) {
      if (error.error_number() == EINVAL && file.direct && !direct_dropped) {
        os::drop_direct(file.fd.get());  // O_DIRECT refused at transfer time; the whole request again, same bytes
        direct_dropped = true;
      } else if (error.error_number() == EAGAIN && retries < kTransientRetriesMax) {
        ++retries;
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
      } else {
        return error.error_number();
      }
    } catch (const CorruptError&) {
      return Completion::kEndOfFile;
    } catch (const std::bad_alloc&) {
      return ENOMEM;
    }
  }
}

// Threads inherit the mask of their creator: a signal handler of the application never runs in an I/O thread.
class BlockedSignals {
 public:
  BlockedSignals() noexcept {
    sigset_t all;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &previous_);
  }
  BlockedSignals(const BlockedSignals&) = delete;
  BlockedSignals& operator=(const BlockedSignals&) = delete;
  ~BlockedSignals() { pthread_sigmask(SIG_SETMASK, &previous_, nullptr); }

 private:
  sigset_t previous_{};
};

}  // namespace

ThreadEngine::ThreadEngine(Rung rung, unsigned queue_depth) : rung_(rung), queue_depth_(queue_depth) {
  assert(queue_depth > 0 && !rung_is_uring(rung));
  waiting_.reserve(queue_depth);  // threads that carry requests allocate nothing
  done_.reserve(queue_depth);
  if (rung_is_direct(rung)) {
    start_threads();
  }
}

ThreadEngine::~ThreadEngine() {
  check_owner();
  stop_threads();
}

void ThreadEngine::check_owner() const { assert(std::this_thread::get_id() == owner_); }

void ThreadEngine::start_threads() {
  const BlockedSignals blocked;
  const unsigned wanted = std::min(kDirectThreadsPerLane, queue_depth_);
  threads_.reserve(wanted);
  try {
    while (threads_.size() < wanted) {
      threads_.emplace_back([this] { serve(); });
    }
  } catch (const std::system_error& error) {
    if (threads_.empty()) {  // fewer than wanted are slower, none is the end
      throw OsError(error.code().value(), "pthread_create", "");
    }
  } catch (const std::bad_alloc&) {
    if (threads_.empty()) {
      throw;
    }
  }
}

void ThreadEngine::stop_threads() noexcept {
  {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  work_arrived_.notify_all();
  for (std::thread& thread : threads_) {
    thread.join();
  }
}

void ThreadEngine::serve() {
  os::name_thread("snapstone-io");
  std::unique_lock lock(mutex_);
  for (;;) {
    work_arrived_.wait(lock, [this] { return stopping_ || !waiting_.empty(); });
    if (stopping_) {
      return;
    }
    const Request request = waiting_.front();
    waiting_.erase(waiting_.begin());
    lock.unlock();
    const int error_number = transfer(request);
    lock.lock();
    done_.push_back(Completion{request.token, error_number});
    work_done_.notify_one();
  }
}

void ThreadEngine::submit(const Request& request) {
  check_owner();
  assert(in_flight_ < queue_depth_ && request.file != nullptr && request.buffer != nullptr && request.nbytes > 0);
  if (rung_ == Rung::kBuffered && request.write) {
    const int error_number = transfer(request);
    const std::lock_guard lock(mutex_);
    done_.push_back(Completion{request.token, error_number});
  } else {
    if (threads_.empty()) {
      start_threads();
    }
    const std::lock_guard lock(mutex_);
    waiting_.push_back(request);
    work_arrived_.notify_one();
  }
  ++in_flight_;
}

std::size_t ThreadEngine::complete(std::span<Completion> completions, std::size_t minimum) {
  check_owner();
  assert(minimum <= in_flight_ && minimum <= completions.size());
  std::unique_lock lock(mutex_);
  work_done_.wait(lock, [this, minimum] { return done_.size() >= minimum; });
  const std::size_t count = std::min(done_.size(), completions.size());
  const auto end = done_.begin() + static_cast<std::ptrdiff_t>(count);
  std::copy(done_.begin(), end, completions.begin());
  done_.erase(done_.begin(), end);
  in_flight_ -= static_cast<unsigned>(count);
  return count;
}

}  // namespace snapstone::io
