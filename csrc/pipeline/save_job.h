// SaveJob: tensors in memory -> slots -> digest -> codec -> one data file, fsynced and closed.
//
// Guarantee: staged() means every source byte is in a slot (or further on) and its digest taken: the sources may
//            change. finished() without an error means the data file is written, fsynced and closed, and chunk_table()
//            describes it. Stored chunks go to the file in chunk order, so the same state gives the same file.
// Base:      a chunk with the digest that the base's record has is not written: the table gets that record.
// Ownership: source memory belongs to the caller and must stay mapped until staged() or finished(), whichever comes
//            first.
// Limits:    at most ring->slot_count() chunks in memory.
// Failure:   OsError of the first failing call; the file is closed and left for the staging directory's owner to
//            discard. Without a base the constructor preallocates a direct file, so a full disk is found before
//            anything is staged; with one the file grows by what turns out to be needed.
#pragma once

#include <cstdint>
#include <memory>
#include <unordered_map>
#include <vector>

#include "base/strided.h"
#include "codec/compress.h"
#include "format/chunk_record.h"
#include "format/layout.h"
#include "io/io_engine.h"
#include "mem/slot_ring.h"
#include "os/file.h"
#include "pipeline/job.h"

namespace snapstone::pipeline {

// Memory of the tensors of a Layout, in its order.
struct SaveSources {
  std::vector<const std::uint8_t*> contiguous;  // row-major memory, or nullptr where `strided` has the tensor
  std::unordered_map<std::uint32_t, StridedView> strided;
};

// What an earlier save stored. The number of its file in a record is that of the new index: 0 is the file that this job
// writes.
struct SaveBase {
  static constexpr std::uint32_t kNoRecord = UINT32_MAX;

  std::vector<format::ChunkRecord> records;
  std::vector<std::uint32_t> references;       // of each record: the one that its codec refers to, or kNoRecord
  std::vector<std::uint32_t> record_of_chunk;  // of each chunk of the layout, or kNoRecord; empty without a base
};

struct SaveOptions {
  io::Rung rung = io::Rung::kBuffered;
  bool compress = false;
  int zstd_level = 3;
  // One per tensor when compressing: floating types get byte planes, others 1.
  std::vector<std::uint8_t> item_bytes = {};
  bool trace = false;
  // Somebody waits for staged(): every lane stages as fast as it can. Otherwise the first lane does the work, and the
  // others join while the device has too little to do, since each core they take is the trainer's.
  bool eager = true;
};

class SaveJob : public Job {
 public:
  SaveJob(std::shared_ptr<const format::Layout> layout, SaveSources sources, os::File file,
          std::shared_ptr<mem::SlotRing> ring, SaveOptions options, SaveBase base = {});

  // True also when the job ended before all was staged: then finished() is true.
  bool wait_staged(std::chrono::milliseconds timeout);
  bool staged() const noexcept { return chunks_staged_.load(std::memory_order_acquire) == layout_->chunks.size(); }
  const std::vector<format::ChunkRecord>& chunk_table() const { return table_; }  // after finished()
  std::uint64_t file_bytes() const noexcept { return file_bytes_; }               // after finished()
  bool direct() const noexcept { return direct_; }

 protected:
  void work(Lane& lane, LaneBooks& books) override;
  void finish() override;
  void abandon() noexcept override;

 private:
  class LaneRun;

  // False when the base has the chunk. `expect_same`: try the digest alone before making the copy.
  bool stage(std::uint64_t chunk, std::uint8_t* slot, bool expect_same, LaneBooks& books);
  void copy_chunk(const format::ChunkPlan& chunk, std::uint8_t* slot, format::ChunkRecord& record, LaneBooks& books);
  const std::uint8_t* contiguous_source(const format::ChunkPlan& chunk) const;  // nullptr: it has to be gathered
  const format::ChunkRecord* base_record(std::uint64_t chunk) const;            // of the same size, or nullptr
  std::uint64_t payload_bytes(std::uint64_t chunk) const;                       // of tensors, without alignment gaps
  void gather_pieces(const format::ChunkPlan& chunk, std::uint8_t* slot) const;
  // Compresses in place; returns the bytes to store.
  std::uint32_t encode(std::uint64_t chunk, std::uint8_t* slot, Lane& lane, LaneBooks& books);
  // Where stored chunks have sizes of their own, they get their places in chunk order once all earlier sizes are known.
  bool places_in_turn() const { return options_.compress || !base_.record_of_chunk.empty(); }
  void announce(std::uint64_t chunk, std::uint32_t stored_bytes);  // 0: the base has it
  bool wait_for_place(std::uint64_t chunk);                        // false when the job stopped
  void reserve_for_placed();

  const std::shared_ptr<const format::Layout> layout_;
  const SaveSources sources_;
  os::File file_;
  const std::shared_ptr<mem::SlotRing> ring_;
  const SaveOptions options_;
  const SaveBase base_;
  const bool direct_;
  std::vector<format::ChunkRecord> table_;
  std::atomic<std::uint64_t> next_chunk_{0};
  std::atomic<std::uint64_t> chunks_staged_{0};
  std::atomic<unsigned> writing_{0};  // requests of all lanes in the kernel
  // Guarded by mutex_:
  std::vector<std::int64_t> announced_;  // by chunk: bytes in the file, or kUnknown
  std::uint64_t next_place_ = 0;         // the first chunk without a place
  std::uint64_t file_bytes_ = 0;
  std::uint64_t reserved_bytes_ = 0;
};

}  // namespace snapstone::pipeline
