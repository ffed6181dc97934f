// LoadPlan: which chunks a load reads, each once, in which requests, and where their bytes go.
//
// Chunks that are neighbours in a file, or nearly, share one request.
//
// Built from items: stored shards and the memory that wants them. Pure arithmetic over chunk tables that
// check_chunk_table() accepted; an item that does not fit its chunks is a CorruptError, so nothing is read or written
// outside the buffers given.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "base/limits.h"
#include "base/strided.h"
#include "format/chunk_record.h"

namespace snapstone::pipeline {

using ChunkRecords = std::vector<format::ChunkRecord>;
using ChunkReferences = std::vector<std::uint32_t>;

// One index file's chunk table; record.file counts from first_file in the job's list of data files. Jobs of the same
// checkpoint share the records, of which there can be millions.
struct ChunkTable {
  std::shared_ptr<const ChunkRecords> records;
  std::uint32_t first_file = 0;
  std::string path;                                        // of the index, for messages
  std::shared_ptr<const ChunkReferences> references = {};  // of format::chunk_references(); null where there are none
};

// A stored shard: `nbytes` of row-major string that begin at byte `at` of chunk `first_chunk` of `table`.
struct StoredShard {
  std::uint32_t table = 0;
  std::uint64_t first_chunk = 0;
  std::uint64_t chunk_count = 0;
  std::uint64_t at = 0;
  std::uint64_t nbytes = 0;
};

// Only the pieces in chunks [first, first + count) of the shard's table.
struct ChunkWindow {
  std::uint64_t first = 0;
  std::uint64_t count = UINT64_MAX;

  bool holds(std::uint64_t chunk) const { return chunk >= first && chunk - first < count; }
};

inline constexpr std::int32_t kHost = -1;  // in place of a device's ordinal

struct ReadTarget {
  std::uint8_t* contiguous = nullptr;  // the piece goes here as it is, or
  std::int64_t box = -1;               // through boxes[box]
  std::uint32_t at = 0;                // where the piece starts in the chunk
  std::int32_t device = kHost;         // whose memory the target is
  std::uint64_t shard_begin = 0;       // bytes [shard_begin, shard_end) of the shard's string
  std::uint64_t shard_end = 0;
};

struct ReadChunk {
  std::uint32_t table = 0;
  std::uint64_t chunk = 0;
  std::uint64_t first_target = 0;
  std::uint64_t target_count = 0;
};

// Bytes [offset, offset + nbytes) of a file, with the chunks in them.
struct ReadRequest {
  std::uint32_t file = 0;
  std::uint64_t offset = 0;
  std::uint64_t nbytes = 0;
  std::uint64_t first_chunk = 0;
  std::uint64_t chunk_count = 0;
};

class LoadPlan {
 public:
  static constexpr std::uint64_t kGapBytes = 64 << 10;  // unwanted bytes that are cheaper to read than to skip

  explicit LoadPlan(std::vector<ChunkTable> tables) : tables_(std::move(tables)) {}

  // The whole shard; `target` is where byte 0 of its string goes, or with a window would go. Targets are addresses of
  // the host, or of the device with the ordinal `device`.
  void add_contiguous(const StoredShard& shard, std::uint8_t* target, ChunkWindow window = {},
                      std::int32_t device = kHost);
  // Part of it, strided.
  void add_box(const StoredShard& shard, BoxTarget box, ChunkWindow window = {}, std::int32_t device = kHost);
  void add_all_chunks(std::uint32_t files_max = UINT32_MAX);  // of each table's first files; no target: verification
  // Sorts chunks by file and offset, groups their targets and lays out the requests: of at most `request_bytes`, or one
  // chunk. Call once, last.
  void finish(std::uint64_t request_bytes = kChunkBytesDefault);

  const ChunkTable& table(std::uint32_t table) const { return tables_[table]; }
  const format::ChunkRecord& record(const ReadChunk& chunk) const {
    return (*tables_[chunk.table].records)[chunk.chunk];
  }
  // By number: whether requests, or references of their chunks, are in the file. As long as the largest number is high.
  std::vector<bool> files_needed() const;
  const std::vector<std::int32_t>& devices() const { return devices_; }  // that have targets, sorted
  std::uint32_t file(const ReadChunk& chunk) const { return tables_[chunk.table].first_file + record(chunk).file; }
  const std::vector<ReadChunk>& chunks() const { return chunks_; }
  const std::vector<ReadRequest>& requests() const { return requests_; }
  const std::vector<ReadTarget>& targets() const { return targets_; }
  std::span<const ReadTarget> targets(const ReadChunk& chunk) const {
    return std::span(targets_).subspan(chunk.first_target, chunk.target_count);
  }
  const BoxTarget& box(std::int64_t box) const { return boxes_[static_cast<std::size_t>(box)]; }
  std::uint64_t request_bytes_max() const { return request_bytes_max_; }
  std::uint64_t raw_bytes_max() const { return raw_bytes_max_; }
  std::uint64_t bytes_needed() const { return bytes_needed_; }
  std::uint64_t bytes_read() const { return bytes_read_; }

 private:
  struct Wanted {
    ReadChunk chunk;
    ReadTarget target;
    bool has_target;
  };

  template <typename Visit>
  void for_each_piece(const StoredShard& shard, ChunkWindow window, Visit visit);
  void add_device(std::int32_t device);
  void add_request(std::uint64_t chunk_index, std::uint64_t request_bytes);

  std::vector<ChunkTable> tables_;
  std::vector<Wanted> wanted_;
  std::vector<ReadChunk> chunks_;
  std::vector<ReadRequest> requests_;
  std::vector<ReadTarget> targets_;
  std::vector<BoxTarget> boxes_;
  std::vector<std::int32_t> devices_;
  std::uint64_t request_bytes_max_ = 0;
  std::uint64_t raw_bytes_max_ = 0;
  std::uint64_t bytes_needed_ = 0;
  std::uint64_t bytes_read_ = 0;
};

}  // namespace snapstone::pipeline
