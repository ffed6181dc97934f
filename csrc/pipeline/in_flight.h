// InFlight: the requests one lane has in the kernel, each with the slot it uses.
//
// Guarantee: the destructor drains, so a slot is never reused or freed while the kernel may still touch it, whatever
//            was thrown.
// Limits:    engine.capacity() requests.
// Failure:   what the engine throws. It is broken() then: after drain(), nobody may use it again.
#pragma once

#include <array>
#include <cstdint>
#include <utility>
#include <vector>

#include "base/clock.h"
#include "io/io_engine.h"
#include "mem/slot_ring.h"
#include "pipeline/job.h"

namespace snapstone::pipeline {

class InFlight {
 public:
  InFlight(io::IoEngine& engine, LaneBooks& books, Stage stage)
      : engine_(engine), books_(books), stage_(stage), entries_(engine.capacity()) {
    for (std::size_t i = entries_.size(); i-- > 0;) free_.push_back(i);
    pending_.reserve(kBatch);
  }
  ~InFlight() { drain(); }
  InFlight(const InFlight&) = delete;
  InFlight& operator=(const InFlight&) = delete;

  std::size_t count() const noexcept { return entries_.size() - free_.size(); }
  bool full() const noexcept { return free_.empty(); }
  bool broken() const noexcept { return broken_; }

  // The caller makes room first: !full().
  void submit(io::Request request, std::uint64_t chunk, mem::Slot slot) {
    const std::size_t index = free_.back();
    request.token = index;
    entries_[index] = {std::move(slot), chunk, now_ns(), request.nbytes};
    free_.pop_back();
    guarded([&] { engine_.submit(request); });
  }

  // done(chunk, slot, error_number) for each request that ended; waits for at least `minimum`.
  template <typename Done>
  void complete(std::size_t minimum, Done done) {
    std::array<io::Completion, kBatch> completions;
    std::size_t ended = 0;
    guarded([&] { ended = engine_.complete(completions, minimum); });
    for (std::size_t i = 0; i < ended; ++i) pending_.push_back(completions[i]);
    while (!pending_.empty()) {
      const io::Completion completion = pending_.back();
      pending_.pop_back();
      Entry entry = take(completion.token);
      books_.add(stage_, entry.begin_ns, now_ns(), entry.nbytes);
      done(entry.chunk, std::move(entry.slot), completion.error_number);
    }
  }

  // Waits for everything and frees the slots; errors of the requests no longer matter. Once, last. If the engine itself
  // is broken, the slots that the kernel may still own are forfeited: losing memory is better than handing it out
  // twice.
  void drain() noexcept {
    if (std::exchange(drained_, true)) return;
    for (const io::Completion& completion : pending_) take(completion.token);
    pending_.clear();
    try {
      while (engine_.in_flight() > 0) {
        std::array<io::Completion, kBatch> completions;
        const std::size_t ended = engine_.complete(completions, 1);
        for (std::size_t i = 0; i < ended; ++i) take(completions[i].token);
      }
    } catch (...) {
      broken_ = true;
      for (Entry& entry : entries_) entry.slot.forfeit();
    }
  }

 private:
  static constexpr std::size_t kBatch = 32;

  struct Entry {
    mem::Slot slot;
    std::uint64_t chunk = 0;
    std::int64_t begin_ns = 0;
    std::uint32_t nbytes = 0;
  };

  template <typename Call>
  void guarded(Call call) {
    try {
      call();
    } catch (...) {
      broken_ = true;
      throw;
    }
  }

  Entry take(std::uint64_t token) {
    free_.push_back(token);
    return std::exchange(entries_[token], Entry{});
  }

  io::IoEngine& engine_;
  LaneBooks& books_;
  const Stage stage_;
  std::vector<Entry> entries_;
  std::vector<std::size_t> free_;
  std::vector<io::Completion> pending_;
  bool broken_ = false;
  bool drained_ = false;
};

}  // namespace snapstone::pipeline
