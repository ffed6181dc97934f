#include "pipeline/load_plan.h"

#include <algorithm>
#include <tuple>
#include <utility>

#include "base/error.h"
#include "base/limits.h"
#include "format/chunk_table.h"

namespace snapstone::pipeline {
namespace {

// A box that reaches out of the stored shard would be filled in part, or not at all.
void check_box_fits(const BoxTarget& box, const StoredShard& shard, const std::string& path) {
  const std::size_t rank = box.shard_sizes.size();
  std::int64_t nbytes = box.target.item_bytes;
  bool fits = box.box_offsets.size() == rank && box.target.sizes.size() == rank;
  for (std::size_t i = 0; fits && i < rank; ++i) {
    const std::int64_t size = box.shard_sizes[i];
    const std::int64_t part = box.target.sizes[i];
    const std::int64_t offset = box.box_offsets[i];
    fits = part >= 0 && part <= size && offset >= 0 && offset <= size - part &&
           !__builtin_mul_overflow(nbytes, size, &nbytes);
  }
  if (!fits || static_cast<std::uint64_t>(nbytes) != shard.nbytes) {
    throw CorruptError("box does not fit the stored shard", path, static_cast<std::int64_t>(shard.first_chunk),
                       std::to_string(shard.nbytes) + " bytes", std::to_string(nbytes) + " bytes");
  }
}

}  // namespace

template <typename Visit>
void LoadPlan::for_each_piece(const StoredShard& shard, ChunkWindow window, Visit visit) {
  const ChunkTable& table = tables_.at(shard.table);
  const ChunkRecords& records = *table.records;
  if (shard.first_chunk > records.size() || shard.chunk_count > records.size() - shard.first_chunk) {
    throw CorruptError("tensor names chunks that are not in the table", table.path,
                       static_cast<std::int64_t>(shard.first_chunk));
  }
  std::uint64_t done = 0;
  for (std::uint64_t chunk = shard.first_chunk; chunk < shard.first_chunk + shard.chunk_count; ++chunk) {
    const std::uint64_t at = chunk == shard.first_chunk ? shard.at : 0;
    const std::uint64_t raw = records[chunk].raw_bytes;
    if (at >= raw || done == shard.nbytes) break;
    const std::uint64_t nbytes = std::min(raw - at, shard.nbytes - done);
    if (window.holds(chunk)) visit(chunk, static_cast<std::uint32_t>(at), done, done + nbytes);
    done += nbytes;
  }
  if (done != shard.nbytes) {
    throw CorruptError("tensor is longer than its chunks", table.path, static_cast<std::int64_t>(shard.first_chunk),
                       std::to_string(shard.nbytes) + " bytes", std::to_string(done) + " bytes");
  }
}

void LoadPlan::add_contiguous(const StoredShard& shard, std::uint8_t* target, ChunkWindow window, std::int32_t device) {
  for_each_piece(shard, window, [&](std::uint64_t chunk, std::uint32_t at, std::uint64_t begin, std::uint64_t end) {
    bytes_needed_ += end - begin;
    wanted_.push_back({{shard.table, chunk}, {target + begin, -1, at, device, begin, end}, true});
  });
}

void LoadPlan::add_box(const StoredShard& shard, BoxTarget box, ChunkWindow window, std::int32_t device) {
  check_box_fits(box, shard, tables_.at(shard.table).path);
  const auto first = static_cast<std::uint64_t>(box.first_byte());
  const auto last = static_cast<std::uint64_t>(box.last_byte());
  const auto number = static_cast<std::int64_t>(boxes_.size());
  for_each_piece(shard, window, [&](std::uint64_t chunk, std::uint32_t at, std::uint64_t begin, std::uint64_t end) {
    if (begin >= last || end <= first) return;
    const std::int64_t needed =
        box.bytes_before(static_cast<std::int64_t>(end)) - box.bytes_before(static_cast<std::int64_t>(begin));
    if (needed == 0) return;
    bytes_needed_ += static_cast<std::uint64_t>(needed);
    wanted_.push_back({{shard.table, chunk}, {nullptr, number, at, device, begin, end}, true});
  });
  boxes_.push_back(box.collapsed());
}

void LoadPlan::add_all_chunks(std::uint32_t files_max) {
  for (std::uint32_t table = 0; table < tables_.size(); ++table) {
    for (std::uint64_t chunk = 0; chunk < tables_[table].records->size(); ++chunk) {
      if ((*tables_[table].records)[chunk].file < files_max) wanted_.push_back({{table, chunk}, {}, false});
    }
  }
}

void LoadPlan::finish(std::uint64_t request_bytes) {
  const auto place = [this](const Wanted& wanted) {
    return std::make_tuple(file(wanted.chunk), record(wanted.chunk).offset, wanted.chunk.table, wanted.chunk.chunk);
  };
  std::stable_sort(wanted_.begin(), wanted_.end(),
                   [&](const Wanted& a, const Wanted& b) { return place(a) < place(b); });
  for (Wanted& wanted : wanted_) {
    const bool same =
        !chunks_.empty() && chunks_.back().table == wanted.chunk.table && chunks_.back().chunk == wanted.chunk.chunk;
    if (!same) {
      const format::ChunkRecord& stored = record(wanted.chunk);
      raw_bytes_max_ = std::max<std::uint64_t>(raw_bytes_max_, stored.raw_bytes);
      wanted.chunk.first_target = targets_.size();
      chunks_.push_back(wanted.chunk);
      add_request(chunks_.size() - 1, request_bytes);
    }
    if (wanted.has_target) {
      targets_.push_back(wanted.target);
      add_device(wanted.target.device);
      ++chunks_.back().target_count;
    }
  }
  wanted_ = {};
  for (const ReadRequest& request : requests_) {
    request_bytes_max_ = std::max(request_bytes_max_, request.nbytes);
    bytes_read_ += request.nbytes;
  }
}

std::vector<bool> LoadPlan::files_needed() const {
  std::vector<bool> needed;
  for (const ReadChunk& chunk : chunks_) {
    const ChunkTable& table = tables_[chunk.table];
    const std::size_t referring = table.references ? table.references->size() : 0;
    std::uint64_t at = chunk.chunk;
    while (at < table.records->size()) {
      const std::uint64_t number = std::uint64_t{table.first_file} + (*table.records)[at].file;
      if (needed.size() <= number) needed.resize(number + 1);
      needed[number] = true;
      const std::uint64_t reference = at < referring ? (*table.references)[at] : format::kNoReference;
      at = reference > at ? reference : format::kNoReference;  // ends, whatever the table says
    }
  }
  return needed;
}

void LoadPlan::add_device(std::int32_t device) {
  if (device == kHost) return;
  const auto place = std::lower_bound(devices_.begin(), devices_.end(), device);
  if (place == devices_.end() || *place != device) devices_.insert(place, device);
}

void LoadPlan::add_request(std::uint64_t chunk_index, std::uint64_t request_bytes) {
  const ReadChunk& chunk = chunks_[chunk_index];
  const format::ChunkRecord& stored = record(chunk);
  const std::uint64_t end = stored.offset + round_up(stored.stored_bytes, kPageBytes);
  if (!requests_.empty()) {
    ReadRequest& last = requests_.back();
    const bool near = last.file == file(chunk) && stored.offset <= last.offset + last.nbytes + kGapBytes;
    if (near && end <= last.offset + request_bytes) {
      last.nbytes = std::max(last.nbytes, end - last.offset);
      ++last.chunk_count;
      return;
    }
  }
  requests_.push_back({file(chunk), stored.offset, end - stored.offset, chunk_index, 1});
}

}  // namespace snapstone::pipeline
