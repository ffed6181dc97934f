// SaveJob: tensors in memory -> slots -> digest -> codec -> one data file, fsynced and closed.
//
// Guarantee: staged() means every source byte is in a slot (or further on) and its digest taken: the sources may
//            change. finished() without an error means the data file is written, fsynced and closed, and chunk_table()
//            describes it. Stored chunks go to the file in chunk order, so the same state gives the same file.
// Ownership: source memory belongs to the caller and must stay mapped until staged() or finished(), whichever comes
//            first.
// Limits:    at most ring->slot_count() chunks in memory.
// Failure:   OsError of the first failing call; the file is closed and left for the staging directory's owner to
//            discard. The constructor preallocates a direct file, so a full disk is found before anything is staged.
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
          std::shared_ptr<mem::SlotRing> ring, SaveOptions options);

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

  void stage(std::uint64_t chunk, std::uint8_t* slot, LaneBooks& books);
  std::uint64_t payload_bytes(std::uint64_t chunk) const;  // of tensors, without alignment gaps
  void gather_pieces(const format::ChunkPlan& chunk, std::uint8_t* slot) const;
  // Compresses in place; returns the bytes to store.
  std::uint32_t encode(std::uint64_t chunk, std::uint8_t* slot, Lane& lane, LaneBooks& books);
  // Blocks until all earlier chunks have their place; false when the job stopped.
  bool place(std::uint64_t chunk, std::uint32_t stored_bytes);

  const std::shared_ptr<const format::Layout> layout_;
  const SaveSources sources_;
  os::File file_;
  const std::shared_ptr<mem::SlotRing> ring_;
  const SaveOptions options_;
  const bool direct_;
  std::vector<format::ChunkRecord> table_;
  std::atomic<std::uint64_t> next_chunk_{0};
  std::atomic<std::uint64_t> chunks_staged_{0};
  std::atomic<unsigned> writing_{0};  // requests of all lanes in the kernel
  std::uint64_t next_place_ = 0;      // guarded by mutex_: the chunk whose turn it is
  std::uint64_t file_bytes_ = 0;
};

}  // namespace snapstone::pipeline
