// Engine: the process's lanes and staging memory. A lane is one long-lived thread with its own I/O engines; jobs run on
// all lanes, in the order given, and a lane that has nothing left to do in one job goes on to the next.
//
// Ownership: one Engine per process, never destroyed (lanes may be in the kernel at exit).
// Fork:      a child gets a fresh one, since neither threads nor rings nor staging memory survive a fork.
// Limits:    lane_count lanes, kQueueDepth requests in flight each, one slot ring.
// Failure:   instance() throws OsError(EAGAIN) without a single thread and std::invalid_argument for SNAPSTONE_LANES,
//            ring() OsError(ENOMEM), start() std::logic_error for an inherited job. A lane whose I/O engine cannot be
//            built, or breaks, fails the job; the next job gets a new one.
#pragma once

#include <condition_variable>
#include <list>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "io/io_engine.h"
#include "mem/slot_ring.h"
#include "os/per_process.h"
#include "pipeline/job.h"

namespace snapstone::pipeline {

class Lane {
 public:
  explicit Lane(int number);

  int number() const noexcept { return number_; }
  void push(std::list<std::shared_ptr<Job>> jobs) noexcept;
  // On the lane's own thread: the I/O engine of a rung, with the ring's segments registered where the rung has fixed
  // buffers.
  io::IoEngine& io(io::Rung rung, const std::shared_ptr<mem::SlotRing>& ring);
  // Destroys a broken engine, which waits for the kernel; the next io() builds another. Also on the lane's own thread.
  void drop_io(io::Rung rung) noexcept;
  // `segment` if this lane's engine has it registered, else -1: what a Request of that rung may name.
  int fixed_segment(io::Rung rung, int segment) const noexcept;
  // Scratch of at least `nbytes`, kept for the next chunk.
  std::uint8_t* scratch(std::uint64_t nbytes);

 private:
  void loop();

  const int number_;
  std::mutex mutex_;
  std::condition_variable pushed_;
  std::list<std::shared_ptr<Job>> jobs_;
  std::shared_ptr<mem::SlotRing> registered_ring_;
  std::size_t registered_segments_ = 0;
  std::vector<bool> segment_fixed_;
  std::unique_ptr<io::IoEngine> engines_[4];
  os::MappedMemory scratch_;
  std::thread thread_;
};

class Engine {
 public:
  static Engine& instance();

  // A ring whose slots hold `slot_bytes` and which has at least `slots` of them, new ones on `numa_node` if possible. A
  // larger slot size replaces the ring for later jobs.
  std::shared_ptr<mem::SlotRing> ring(std::uint64_t slot_bytes, std::uint64_t slots, int numa_node = os::kAnyNumaNode);
  std::shared_ptr<mem::SlotRing> current_ring();
  void start(const std::shared_ptr<Job>& job);
  int lane_count() const noexcept { return static_cast<int>(lanes_.size()); }

 private:
  friend Engine& os::per_process<Engine>();
  Engine();

  std::mutex mutex_;
  std::shared_ptr<mem::SlotRing> ring_;
  std::vector<std::unique_ptr<Lane>> lanes_;
};

}  // namespace snapstone::pipeline
