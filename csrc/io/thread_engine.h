// The rungs without io_uring: threads-direct and buffered, by pread and pwrite.
//
//     threads-direct   kDirectThreadsPerLane threads: an O_DIRECT call blocks for as long as the device takes.
//     buffered         reads in as many threads, because a cold or networked read blocks; writes inside submit(), by
//                      the caller: they are copies into the page cache, the bytes are still in this core's cache, and
//                      the lock of the inode lets only one writer in anyway.
//
// Ownership: requests that no thread has begun when the engine is destroyed are given up; those begun are finished.
// Threads:   owned by one thread, like every engine; its own threads block all signals.
// Limits:    queue_depth requests in flight; buffered engines start their threads with the first read.
// Failure:   the constructor or the first read throws OsError("pthread_create") when there is not even one thread.
#pragma once

#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

#include "io/io_engine.h"

namespace snapstone::io {

class ThreadEngine final : public IoEngine {
 public:
  ThreadEngine(Rung rung, unsigned queue_depth);
  ThreadEngine(const ThreadEngine&) = delete;
  ThreadEngine& operator=(const ThreadEngine&) = delete;
  ~ThreadEngine() override;

  Rung rung() const override { return rung_; }
  unsigned capacity() const override { return queue_depth_; }
  unsigned in_flight() const override { return in_flight_; }
  void submit(const Request& request) override;
  std::size_t complete(std::span<Completion> completions, std::size_t minimum) override;
  bool register_segment(int /*segment*/, std::uint8_t* /*data*/, std::uint64_t /*nbytes*/) override { return false; }

 private:
  void check_owner() const;
  void start_threads();
  void stop_threads() noexcept;
  void serve();

  const Rung rung_;
  const unsigned queue_depth_;
  [[maybe_unused]] const std::thread::id owner_ = std::this_thread::get_id();
  unsigned in_flight_ = 0;  // the owner's alone

  std::mutex mutex_;  // guards the next three
  std::vector<Request> waiting_;
  std::vector<Completion> done_;
  bool stopping_ = false;

  std::condition_variable work_arrived_;
  std::condition_variable work_done_;
  std::vector<std::thread> threads_;
};

}  // namespace snapstone::io
