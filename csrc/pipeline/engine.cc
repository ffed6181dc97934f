#include "pipeline/engine.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <new>
#include <stdexcept>
#include <string>
#include <system_error>
#include <utility>

#include "base/error.h"
#include "base/limits.h"
#include "os/process.h"

namespace snapstone::pipeline {
namespace {

int lane_count_wanted() {
  if (const char* text = std::getenv("SNAPSTONE_LANES")) {
    const int count = std::atoi(text);
    if (count >= 1 && count <= 64) return count;
    throw std::invalid_argument("SNAPSTONE_LANES=" + std::string(text) + ": must be between 1 and 64");
  }
  return static_cast<int>(std::clamp(std::thread::hardware_concurrency(), 1u, 2u));
}

}  // namespace

Lane::Lane(int number) : number_(number), thread_([this] { loop(); }) { thread_.detach(); }

void Lane::push(std::list<std::shared_ptr<Job>> jobs) noexcept {
  std::lock_guard lock(mutex_);
  jobs_.splice(jobs_.end(), jobs);
  pushed_.notify_one();
}

void Lane::loop() {
  os::block_all_signals();
  os::name_thread(("snapstone-" + std::to_string(number_)).c_str());
  while (true) {
    std::shared_ptr<Job> job;
    {
      std::unique_lock lock(mutex_);
      pushed_.wait(lock, [this] { return !jobs_.empty(); });
      job = std::move(jobs_.front());
      jobs_.pop_front();
    }
    job->run_lane(*this);
  }
}

io::IoEngine& Lane::io(io::Rung rung, const std::shared_ptr<mem::SlotRing>& ring) {
  if (registered_ring_ != ring) {
    // Registered buffers pin the old ring's pages: the engines that hold them go with it.
    for (auto& engine : engines_) engine.reset();
    registered_ring_ = ring;
    registered_segments_ = 0;
  }
  auto& engine = engines_[static_cast<int>(rung)];
  if (!engine) {
    engine = io::make_engine(rung, kQueueDepth);
    if (rung == io::Rung::kUringFixed) registered_segments_ = 0;
  }
  if (rung == io::Rung::kUringFixed) {
    const std::vector<mem::Segment> segments = ring->segments();
    segment_fixed_.resize(segments.size());
    for (; registered_segments_ < segments.size(); ++registered_segments_) {
      const mem::Segment& segment = segments[registered_segments_];
      segment_fixed_[registered_segments_] =
          engine->register_segment(static_cast<int>(registered_segments_), segment.data, segment.nbytes);
    }
  }
  return *engine;
}

void Lane::drop_io(io::Rung rung) noexcept { engines_[static_cast<int>(rung)].reset(); }

int Lane::fixed_segment(io::Rung rung, int segment) const noexcept {
  const bool fixed = rung == io::Rung::kUringFixed && static_cast<std::size_t>(segment) < segment_fixed_.size() &&
                     segment_fixed_[static_cast<std::size_t>(segment)];
  return fixed ? segment : -1;
}

std::uint8_t* Lane::scratch(std::uint64_t nbytes) {
  if (scratch_.nbytes() < nbytes) scratch_ = os::MappedMemory(nbytes);
  return scratch_.data();
}

Engine& Engine::instance() {
  struct Holder {
    std::int64_t process_id;
    Engine* engine;
  };
  static std::atomic<Holder*> holder{nullptr};
  Holder* current = holder.load(std::memory_order_acquire);
  if (current != nullptr && current->process_id == os::process_id()) return *current->engine;
  // Lock-free, since a lock may have been held by another thread at the moment of a fork. A loser of the race leaks an
  // idle engine.
  auto* fresh = new Holder{os::process_id(), new Engine()};
  if (holder.compare_exchange_strong(current, fresh)) return *fresh->engine;
  return *holder.load(std::memory_order_acquire)->engine;
}

Engine::Engine() {
  const int count = lane_count_wanted();
  lanes_.reserve(static_cast<std::size_t>(count));  // a lane that has begun to run is never destroyed
  try {
    for (int i = 0; i < count; ++i) lanes_.push_back(std::make_unique<Lane>(i));
  } catch (const std::system_error& error) {
    // Fewer lanes than wanted are slower, none is the end.
    if (lanes_.empty()) throw OsError(error.code().value(), "pthread_create", "");
  } catch (const std::bad_alloc&) {
    if (lanes_.empty()) throw;
  }
}

std::shared_ptr<mem::SlotRing> Engine::ring(std::uint64_t slot_bytes, std::uint64_t slots, int numa_node) {
  std::shared_ptr<mem::SlotRing> ring;
  {
    std::lock_guard lock(mutex_);
    if (!ring_ || ring_->slot_bytes() < slot_bytes) ring_ = std::make_shared<mem::SlotRing>(slot_bytes);
    ring = ring_;
  }
  ring->reserve(slots, numa_node);  // touches every page: outside the lock, so that other jobs can start meanwhile
  return ring;
}

std::shared_ptr<mem::SlotRing> Engine::current_ring() {
  std::lock_guard lock(mutex_);
  return ring_;
}

void Engine::start(const std::shared_ptr<Job>& job) {
  if (job->inherited()) throw std::logic_error("a job belongs to the process that made it, and this one was forked");
  // Allocated first: all lanes get the job or none.
  std::vector<std::list<std::shared_ptr<Job>>> shares(lanes_.size());
  for (auto& share : shares) share.push_back(job);
  // Under the lock all lanes get jobs in the same order: a job never waits on one lane for a later job that waits on
  // another.
  std::lock_guard lock(mutex_);
  job->expect_lanes(lane_count());
  for (std::size_t i = 0; i < lanes_.size(); ++i) lanes_[i]->push(std::move(shares[i]));
}

}  // namespace snapstone::pipeline
