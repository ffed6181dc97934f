// Job: one save or load that the lanes of an Engine work on together.
//
// Guarantee: finished() turns true exactly once, after every lane has left the job and nothing of it is in the kernel;
//            success or the first failure stands then. First failure wins: it stops submission, each lane drains what
//            it has in flight and leaves. cancel() is a failure like any other, and nothing once the job has finished.
// Ownership: lanes hold the job by shared_ptr; buffers, files and sources named by the job must outlive finished().
// Threads:   run_lane() on the lanes; the rest from any thread.
// Fork:      a child has no lanes: it may drop a job that it inherited, and nothing else.
#pragma once

#include <array>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>
#include <vector>

namespace snapstone::pipeline {

class Lane;

// What a stage of the pipeline cost, added up over lanes.
// Those of devices last from the call that enqueues the first of their work until its end is known.
enum class Stage : int {
  kStage = 0,
  kDigest,
  kEncode,
  kWrite,
  kRead,
  kDecode,
  kScatter,
  kSync,
  kSlotWait,
  kDeviceCopy,
  kDeviceDigest,
  kGather,
  kOverflow
};
inline constexpr int kStageCount = 13;
const char* stage_name(Stage stage);

struct StageTotals {
  std::array<std::int64_t, kStageCount> ns{};
  std::array<std::uint64_t, kStageCount> nbytes{};
  std::array<std::uint64_t, kStageCount> count{};

  void add(Stage stage, std::int64_t elapsed_ns, std::uint64_t bytes);
  void add(const StageTotals& other);
};

struct TraceEvent {
  Stage stage;
  int lane;
  std::int64_t begin_ns;
  std::int64_t end_ns;
  std::uint64_t nbytes;
};

// One lane's own books during a job: no sharing until the lane leaves.
class LaneBooks {
 public:
  LaneBooks(int lane, bool trace) : lane_(lane), trace_(trace) {}
  void add(Stage stage, std::int64_t begin_ns, std::int64_t end_ns, std::uint64_t nbytes);

 private:
  friend class Job;
  int lane_;
  bool trace_;
  StageTotals totals_;
  std::vector<TraceEvent> events_;
};

class Job {
 public:
  explicit Job(bool trace);
  virtual ~Job();
  Job(const Job&) = delete;
  Job& operator=(const Job&) = delete;

  // Waits at most `timeout`; true when finished. rethrow() then throws the first failure, if any.
  bool wait(std::chrono::milliseconds timeout);
  bool started() const noexcept { return started_; }
  bool finished() const noexcept { return finished_.load(std::memory_order_acquire); }
  void rethrow() const;
  void cancel() noexcept;
  bool inherited() const noexcept;  // from the process that forked this one

  StageTotals totals() const;
  std::vector<TraceEvent> events() const;
  std::uint64_t bytes_done() const noexcept { return bytes_done_.load(std::memory_order_relaxed); }

  // Called by the engine: once before the lanes get the job, then by each lane.
  void expect_lanes(int lanes) noexcept {
    lanes_left_ = lanes;
    started_ = true;
  }
  void run_lane(Lane& lane) noexcept;

 protected:
  virtual void work(Lane& lane, LaneBooks& books) = 0;  // may throw after draining its own in-flight requests
  virtual void finish() {}                              // on the last lane to leave, if nothing failed; may throw
  virtual void abandon() noexcept {}                    // on the last lane to leave, if something failed
  void fail(std::exception_ptr error) noexcept;
  bool stopped() const noexcept { return stopped_.load(std::memory_order_acquire); }
  void progress(std::uint64_t nbytes) noexcept { bytes_done_.fetch_add(nbytes, std::memory_order_relaxed); }
  bool trace() const noexcept { return trace_; }
  void merge(LaneBooks& books);

  mutable std::mutex mutex_;
  std::unique_ptr<std::condition_variable> changed_;

 private:
  const bool trace_;
  const std::int64_t process_id_;
  std::atomic<bool> stopped_{false};
  std::atomic<bool> started_{false};
  std::atomic<bool> finished_{false};
  std::atomic<int> lanes_left_{0};
  std::atomic<std::uint64_t> bytes_done_{0};
  std::exception_ptr error_;
  StageTotals totals_;
  std::vector<TraceEvent> events_;
};

}  // namespace snapstone::pipeline
