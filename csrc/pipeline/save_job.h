// SaveJob: tensors in memory -> slots -> digest -> codec -> one data file, fsynced and closed.
//
// Guarantee: staged() means every source byte is in a slot (or further on): the sources may change. finished() without
//            an error means the data file is written, fsynced and closed, and chunk_table() describes it. Stored chunks
//            have their places in chunk order, so the same state gives the same file.
// Devices:   sources in device memory are read after the mark that enqueue() was given, which comes before the start.
//            snapshot_enqueued() means that a stream which fence()s may change them: the host need not wait for
//            staged().
// Base:      a chunk with the digest that the base's record has is not written: the table gets that record. Others may
//            be stored as the difference from the base's.
// Ownership: source memory belongs to the caller and must stay mapped until staged() or finished(), whichever comes
//            first; on devices until staged(), or finished() and device_drained(), which a lost device prevents for
//            ever.
// Limits:    at most ring->slot_count() chunks in memory.
// Failure:   OsError or CudaError of the first failing call; the file is closed and left for the staging directory's
// owner to
//            discard. Without a base the constructor preallocates a direct file, so a full disk is found before
//            anything is staged; with one the file grows by what turns out to be needed.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "format/chunk_record.h"
#include "format/layout.h"
#include "io/io_engine.h"
#include "mem/slot_ring.h"
#include "os/file.h"
#include "pipeline/chunk_encoder.h"
#include "pipeline/device_stage.h"
#include "pipeline/job.h"
#include "pipeline/save_base.h"
#include "pipeline/save_sources.h"

namespace snapstone::pipeline {

struct SaveOptions {
  io::Rung rung = io::Rung::kBuffered;
  bool compress = false;
  int zstd_level = 3;
  // One per tensor when compressing: floating types get byte planes, others 1.
  std::vector<std::uint8_t> item_bytes = {};
  // Likewise: nonzero where a changed chunk may be stored as the difference from the base's; empty: none. See
  // chunk_encoder.h.
  std::vector<std::uint8_t> xor_tensors = {};
  std::uint64_t keyframe_every = 8;
  bool trace = false;
  // Somebody waits for staged(): every lane stages as fast as it can. Otherwise the first lane does the work, and the
  // others join while the device has too little to do, since each core they take is the trainer's.
  bool eager = true;
  DeviceOptions device = {};
};

class SaveJob : public Job {
 public:
  SaveJob(std::shared_ptr<const format::Layout> layout, SaveSources sources, os::File file,
          std::shared_ptr<mem::SlotRing> ring, SaveOptions options, SaveBase base = {});
  ~SaveJob() override;

  // True also when the job ended before all was staged: then finished() is true.
  bool wait_staged(std::chrono::milliseconds timeout);
  bool staged() const noexcept { return host_staged() && (!device_ || device_->sources_free()); }
  std::uint64_t bytes_staged() const noexcept { return bytes_staged_.load(std::memory_order_relaxed); }  // of tensors

  // With sources on devices, before the start: enqueues as much as there are slots for, and does not wait. What goes
  // wrong fails the job.
  void enqueue(const ProducerMark& mark) noexcept;
  // Everything that reads sources has been enqueued on their device, or done on the host.
  bool snapshot_enqueued() const noexcept { return host_staged() && (!device_ || device_->all_read()); }
  bool wait_snapshot(std::chrono::milliseconds timeout);  // true also when the job ended before
  // Work that `stream` is given from now on runs after its device's sources have been read. std::logic_error before
  // snapshot_enqueued(), unless the job has ended.
  void fence(cuda::Stream& stream);
  bool device_drained() const noexcept { return !device_ || device_->drained(); }  // after finished()
  DeviceStats device_stats() const { return device_ ? device_->stats() : DeviceStats{}; }

  // After finished(): the records of the layout's chunks, then those that they refer to.
  const std::vector<format::ChunkRecord>& chunk_table() const { return table_; }
  // By chunk of the layout, 0 for those that were not encoded; empty when not compressing.
  std::span<const std::uint32_t> encode_us() const;
  std::uint64_t unreadable_references() const { return encoder_ ? encoder_->unreadable_references() : 0; }
  std::uint64_t file_bytes() const noexcept { return file_bytes_; }  // after finished()
  bool direct() const noexcept { return direct_; }

 protected:
  void work(Lane& lane, LaneBooks& books) override;
  void finish() override;
  void abandon() noexcept override;

 private:
  class LaneRun;

  bool host_staged() const noexcept { return chunks_staged_.load(std::memory_order_acquire) == host_chunks_; }
  bool on_device(std::uint64_t chunk) const { return device_ && device_->position(chunk) != DevicePlan::kHostChunk; }
  std::uint64_t chunk_of_claim(std::uint64_t claim) const { return claim_order_.empty() ? claim : claim_order_[claim]; }
  std::unique_ptr<DeviceStage> make_device_stage(DevicePlan plan);
  void order_claims();
  // False when the base has the chunk. `expect_same`: try the digest alone before making the copy.
  bool stage(std::uint64_t chunk, std::uint8_t* slot, bool expect_same, LaneBooks& books);
  // The same for a chunk whose bytes came from a device.
  bool stage_from_device(std::uint64_t chunk, const DeviceStage::Taken& taken, LaneBooks& books);
  void copy_chunk(std::uint64_t chunk, std::uint8_t* slot, format::ChunkRecord& record, LaneBooks& books);
  const std::uint8_t* contiguous_source(std::uint64_t chunk) const;  // nullptr: it has to be gathered
  std::uint64_t payload_bytes(std::uint64_t chunk) const;            // of tensors, without alignment gaps
  void gather_pieces(std::uint64_t chunk, std::uint8_t* slot) const;
  void settle(std::uint64_t chunk, const format::ChunkRecord& record, bool same);
  void announce_staging();
  // Encodes in place; returns the bytes to store.
  std::uint32_t encode(std::uint64_t chunk, std::uint8_t* slot, Lane& lane, LaneBooks& books);
  // Where stored chunks have sizes of their own, they get their places in chunk order once all earlier sizes are known.
  bool places_in_turn() const { return options_.compress || !base_.empty(); }
  void announce(std::uint64_t chunk, std::uint32_t stored_bytes);  // 0: the base has it
  bool wait_for_place(std::uint64_t chunk);                        // false when the job stopped
  void reserve_for_placed();

  const std::shared_ptr<const format::Layout> layout_;
  const SaveSources sources_;
  os::File file_;
  const std::shared_ptr<mem::SlotRing> ring_;
  const SaveOptions options_;
  SaveBase base_;
  std::optional<ChunkEncoder> encoder_;     // when compressing
  std::unique_ptr<DeviceStage> device_;     // when sources are on devices
  std::vector<std::uint32_t> claim_order_;  // empty: the order of chunks
  std::uint64_t host_chunks_ = 0;
  const bool direct_;
  std::vector<format::ChunkRecord> table_;
  std::atomic<std::uint64_t> next_chunk_{0};
  std::atomic<std::uint64_t> chunks_staged_{0};  // of those without bytes on a device
  std::atomic<std::uint64_t> bytes_staged_{0};
  std::atomic<int> announced_staging_{0};  // 1: snapshot_enqueued(), 2: staged()
  std::atomic<unsigned> writing_{0};       // requests of all lanes in the kernel
  // Guarded by mutex_:
  std::vector<std::int64_t> announced_;  // by chunk: bytes in the file, or kUnknown
  std::uint64_t next_place_ = 0;         // the first chunk without a place
  unsigned waiting_for_place_ = 0;
  std::uint64_t file_bytes_ = 0;
  std::uint64_t reserved_bytes_ = 0;
};

}  // namespace snapstone::pipeline
