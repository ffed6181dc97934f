#include "pipeline/job.h"

#include <utility>

#include "base/error.h"
#include "os/process.h"
#include "pipeline/engine.h"

namespace snapstone::pipeline {

const char* stage_name(Stage stage) {
  static constexpr const char* kNames[kStageCount] = {"stage",         "digest",  "encode",  "write",     "read",
                                                      "decode",        "scatter", "sync",    "slot_wait", "device_copy",
                                                      "device_digest", "gather",  "overflow"};
  return kNames[static_cast<int>(stage)];
}

void StageTotals::add(Stage stage, std::int64_t elapsed_ns, std::uint64_t bytes) {
  const auto i = static_cast<std::size_t>(stage);
  ns[i] += elapsed_ns;
  nbytes[i] += bytes;
  ++count[i];
}

void StageTotals::add(const StageTotals& other) {
  for (std::size_t i = 0; i < kStageCount; ++i) {
    ns[i] += other.ns[i];
    nbytes[i] += other.nbytes[i];
    count[i] += other.count[i];
  }
}

void LaneBooks::add(Stage stage, std::int64_t begin_ns, std::int64_t end_ns, std::uint64_t nbytes) {
  totals_.add(stage, end_ns - begin_ns, nbytes);
  if (trace_) events_.push_back({stage, lane_, begin_ns, end_ns, nbytes});
}

Job::Job(bool trace)
    : changed_(std::make_unique<std::condition_variable>()), trace_(trace), process_id_(os::process_id()) {}

Job::~Job() {
  // Destroying a condition on which a thread waited at the fork would wait for that thread, which the child lacks.
  if (inherited()) changed_.release();
}

bool Job::inherited() const noexcept { return process_id_ != os::process_id(); }

bool Job::wait(std::chrono::milliseconds timeout) {
  std::unique_lock lock(mutex_);
  return changed_->wait_for(lock, timeout, [this] { return finished(); });
}

void Job::rethrow() const {
  std::lock_guard lock(mutex_);
  if (error_) std::rethrow_exception(error_);
}

void Job::cancel() noexcept {
  try {
    throw CancelledError("cancelled");
  } catch (...) {
    fail(std::current_exception());  // without memory for its text it ends with std::bad_alloc
  }
}

StageTotals Job::totals() const {
  std::lock_guard lock(mutex_);
  return totals_;
}

std::vector<TraceEvent> Job::events() const {
  std::lock_guard lock(mutex_);
  return events_;
}

void Job::fail(std::exception_ptr error) noexcept {
  std::lock_guard lock(mutex_);
  if (finished()) return;
  if (!error_) error_ = std::move(error);
  stopped_.store(true, std::memory_order_release);
  changed_->notify_all();
}

void Job::merge(LaneBooks& books) {
  std::lock_guard lock(mutex_);
  totals_.add(books.totals_);
  events_.insert(events_.end(), books.events_.begin(), books.events_.end());
  books = LaneBooks(books.lane_, books.trace_);
}

void Job::run_lane(Lane& lane) noexcept {
  LaneBooks books(lane.number(), trace_);
  try {
    if (!stopped()) work(lane, books);
  } catch (...) {
    fail(std::current_exception());
  }
  try {
    merge(books);
  } catch (...) {
    fail(std::current_exception());
  }
  if (lanes_left_.fetch_sub(1) > 1) return;
  try {
    if (!stopped()) finish();
  } catch (...) {
    fail(std::current_exception());
  }
  if (stopped()) abandon();
  std::lock_guard lock(mutex_);
  finished_.store(true, std::memory_order_release);
  changed_->notify_all();
}

}  // namespace snapstone::pipeline
