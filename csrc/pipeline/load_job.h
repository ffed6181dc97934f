// LoadJob: data files -> slots -> digest check -> codec -> tensor memory. With no targets it is a scrub of every chunk.
//
// Guarantee: a byte reaches its target only from a chunk whose digest matched (unless verification is off). finished()
//            without an error means every target is filled; one on a device, for whoever comes after its fence().
// Ownership: target memory belongs to the caller and must stay mapped until finished(), on devices until settled().
// Devices:   mark() before start() keeps writes to targets behind what a stream of the caller's does with them. Digests
//            are computed by the device where it has kernels and all of a raw chunk's targets; else by the host.
// Limits:    at most kQueueDepth requests per lane in memory, whatever the checkpoint's size, and two chunks of
// scratch.
//            References of chunks are read by the lane that needs them, one after the other.
// Failure:   the first failure ends the job: OsError, or CorruptError naming file and chunk. problems() has wrong
//            chunks with their tables, at most kProblemsMax; with collect_problems all, as the job goes on. The
//            constructor throws std::invalid_argument for a plan that the files or the slots do not fit.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "base/error.h"
#include "codec/digest.h"
#include "io/io_engine.h"
#include "mem/slot_ring.h"
#include "os/file.h"
#include "pipeline/device_landing.h"
#include "pipeline/job.h"
#include "pipeline/load_plan.h"
#include "pipeline/reference_chain.h"
#include "pipeline/target_fence.h"

namespace snapstone::pipeline {

struct LoadOptions {
  io::Rung rung = io::Rung::kBuffered;
  bool verify = true;
  bool check_padding = false;  // bytes between chunks must be zero
  bool collect_problems = false;
  bool trace = false;
  LandingOptions landing = {};
};

struct Problem {
  std::uint32_t table;
  std::uint64_t chunk;
  std::string path;  // of the data file, which several tables may use
  std::string reason;
  std::string expected;
  std::string actual;
};

class LoadJob : public Job {
 public:
  static constexpr std::size_t kProblemsMax = 1000;

  // `files` are in the order that the plan's tables number them. bytes_done() ends at the plan's bytes_needed(), or for
  // chunks without targets at its bytes_read().
  LoadJob(LoadPlan plan, std::vector<os::File> files, std::shared_ptr<mem::SlotRing> ring, LoadOptions options);

  const LoadPlan& plan() const { return plan_; }
  std::vector<Problem> problems() const;

  void mark(std::int32_t ordinal, cuda::StreamHandle stream) { fence_.mark(ordinal, stream); }
  void fence(std::int32_t ordinal, cuda::StreamHandle stream) const { fence_.fence(ordinal, stream); }
  bool settled() const noexcept { return fence_.settled(); }

 protected:
  void work(Lane& lane, LaneBooks& books) override;
  void finish() override { close_files(); }
  void abandon() noexcept override { close_files(); }

 private:
  class LaneRun;

  void close_files() noexcept;  // at once: Python may keep a failed job alive in a traceback

  // The chunk's raw bytes, verified; in `stored` or in scratch of the lane.
  std::span<const std::uint8_t> verified(const ReadChunk& chunk, const std::uint8_t* stored, Lane& lane,
                                         LaneBooks& books);
  ReferenceChain chain(const ReadChunk& chunk) const;
  std::uint8_t* scratch(const ReadChunk& chunk, Lane& lane) const;
  std::span<const std::uint8_t> decode(const ReadChunk& chunk, const std::uint8_t* stored, Lane& lane,
                                       LaneBooks& books);
  void check_digest(const ReadChunk& chunk, std::span<const std::uint8_t> raw, Lane& lane, LaneBooks& books);
  // Throws for the record in the chunk's chain that made it wrong, if that is another one.
  void blame_reference(const ReadChunk& chunk, Lane& lane, LaneBooks& books) const;
  void check_padding(const ReadChunk& chunk, const std::uint8_t* stored) const;
  // To targets on the host. Returns the bytes that reached them.
  std::uint64_t scatter_targets(const ReadChunk& chunk, const std::uint8_t* raw, LaneBooks& books);
  [[noreturn]] void refuse(const ReadChunk& chunk, const codec::Digest& actual);
  CorruptError corrupt(const ReadChunk& chunk, const std::string& reason, std::string expected = {},
                       std::string actual = {}) const;
  void note(const ReadChunk& chunk, const CorruptError& error);

  const LoadPlan plan_;
  std::vector<os::File> files_;
  const std::shared_ptr<mem::SlotRing> ring_;
  const LoadOptions options_;
  std::atomic<std::uint64_t> next_request_{0};
  std::vector<Problem> problems_;  // guarded by mutex_
  TargetFence fence_;
};

}  // namespace snapstone::pipeline
