#include "pipeline/save_job.h"

#include <cerrno>
#include <cstring>
#include <deque>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>

#include "base/clock.h"
#include "base/error.h"
#include "base/limits.h"
#include "codec/digest.h"
#include "pipeline/engine.h"
#include "pipeline/in_flight.h"

namespace snapstone::pipeline {
namespace {

constexpr std::chrono::milliseconds kSlotPoll{20};
constexpr unsigned kDeviceBusy = 16;  // requests in flight: at 12 GB/s and 1 MiB each they last for 1.4 ms
constexpr std::chrono::microseconds kStandByPoll{500};

}  // namespace

SaveJob::SaveJob(std::shared_ptr<const format::Layout> layout, SaveSources sources, os::File file,
                 std::shared_ptr<mem::SlotRing> ring, SaveOptions options)
    : Job(options.trace),
      layout_(std::move(layout)),
      sources_(std::move(sources)),
      file_(std::move(file)),
      ring_(std::move(ring)),
      options_(std::move(options)),
      direct_(file_.direct),
      table_(layout_->chunks.size()) {
  if (ring_->slot_bytes() < layout_->chunk_bytes) {
    throw std::invalid_argument("slots of " + std::to_string(ring_->slot_bytes()) + " bytes cannot hold chunks of " +
                                std::to_string(layout_->chunk_bytes));
  }
  // Buffered writes end in the page cache; on tmpfs reserving would write every page once more.
  if (direct_ && layout_->file_bytes > 0) os::preallocate(file_, layout_->file_bytes);
}

bool SaveJob::wait_staged(std::chrono::milliseconds timeout) {
  std::unique_lock lock(mutex_);
  return changed_->wait_for(lock, timeout, [this] { return staged() || finished(); });
}

// One lane's share of a save: claims chunks, stages them while slots are free, then encodes and writes what it staged.
class SaveJob::LaneRun {
 public:
  LaneRun(SaveJob& job, Lane& lane, LaneBooks& books)
      : job_(job),
        lane_(lane),
        books_(books),
        engine_(lane.io(job.options_.rung, job.ring_)),
        in_flight_(engine_, books, Stage::kWrite) {}

  void run() {
    while (!job_.stopped()) {
      reap(0);
      // Raw chunks cost nothing more, so the device is kept busy; compressing waits until nothing can be staged, since
      // a fence may hold.
      while (!job_.options_.compress && !staged_.empty() && !in_flight_.full()) write_oldest();
      if (stage_next()) continue;
      if (!staged_.empty()) {
        write_oldest();
      } else if (in_flight_.count() > 0) {
        reap(1);
      } else if (claimed_all_) {
        break;
      } else if (standing_by()) {
        std::this_thread::sleep_for(kStandByPoll);
      } else {
        wait_for_slot();
      }
    }
  }

  ~LaneRun() {
    in_flight_.drain();
    if (in_flight_.broken()) {
      lane_.drop_io(job_.options_.rung);
    } else {
      engine_.forget_file(job_.file_);
    }
  }

 private:
  bool stage_next() {
    if (claimed_all_ || standing_by()) return false;
    if (!spare_) spare_ = job_.ring_->try_acquire();
    if (!spare_) return false;
    const std::uint64_t chunk = job_.next_chunk_.fetch_add(1);
    if (chunk >= job_.layout_->chunks.size()) {
      claimed_all_ = true;
      spare_ = {};
      return false;
    }
    job_.stage(chunk, spare_.data(), books_);
    staged_.emplace_back(chunk, std::move(spare_));
    return true;
  }

  bool standing_by() const {
    return lane_.number() > 0 && !job_.options_.eager && job_.writing_.load() >= kDeviceBusy &&
           job_.next_chunk_.load() < job_.layout_->chunks.size();
  }

  void write_oldest() {
    auto [chunk, slot] = std::move(staged_.front());
    staged_.pop_front();
    format::ChunkRecord& record = job_.table_[chunk];
    if (job_.options_.compress) {
      const std::uint32_t stored = job_.encode(chunk, slot.data(), lane_, books_);
      if (!job_.place(chunk, stored)) return;
    } else {
      record.offset = job_.layout_->chunks[chunk].offset;
    }
    const auto nbytes = static_cast<std::uint32_t>(round_up(record.stored_bytes, kPageBytes));
    std::memset(slot.data() + record.stored_bytes, 0, nbytes - record.stored_bytes);
    if (in_flight_.full()) reap(1);
    const int segment = lane_.fixed_segment(job_.options_.rung, slot.segment());
    const io::Request request{true, &job_.file_, slot.data(), record.offset, nbytes, segment, 0};
    ++job_.writing_;
    in_flight_.submit(request, chunk, std::move(slot));
  }

  void reap(std::size_t minimum) {
    in_flight_.complete(minimum, [this](std::uint64_t chunk, mem::Slot slot, int error_number) {
      const format::ChunkRecord& record = job_.table_[chunk];
      --job_.writing_;
      if (error_number != 0) throw OsError(error_number, "write", job_.file_.path, record.offset, record.stored_bytes);
      slot = {};
      job_.progress(job_.payload_bytes(chunk));
    });
  }

  void wait_for_slot() {
    const std::int64_t begin = now_ns();
    spare_ = job_.ring_->acquire(kSlotPoll);
    books_.add(Stage::kSlotWait, begin, now_ns(), 0);
    if (!spare_ && job_.ring_->slot_count() == 0) throw OsError(ENOMEM, "stage: no slot is left", job_.file_.path);
  }

  SaveJob& job_;
  Lane& lane_;
  LaneBooks& books_;
  io::IoEngine& engine_;
  InFlight in_flight_;
  std::deque<std::pair<std::uint64_t, mem::Slot>> staged_;
  mem::Slot spare_;
  bool claimed_all_ = false;
};

void SaveJob::work(Lane& lane, LaneBooks& books) {
  if (next_chunk_.load() < layout_->chunks.size()) LaneRun(*this, lane, books).run();
}

void SaveJob::stage(std::uint64_t index, std::uint8_t* slot, LaneBooks& books) {
  const format::ChunkPlan& chunk = layout_->chunks[index];
  format::ChunkRecord& record = table_[index];
  record.raw_bytes = record.stored_bytes = chunk.raw_bytes;
  const std::int64_t begin = now_ns();
  const format::Piece& piece = layout_->pieces[chunk.first_piece];
  const std::uint8_t* source = sources_.contiguous[piece.tensor];
  if (chunk.piece_count == 1 && source != nullptr) {
    record.digest = codec::copy_and_digest({source + piece.begin, chunk.raw_bytes}, slot);
    books.add(Stage::kStage, begin, now_ns(), chunk.raw_bytes);
  } else {
    gather_pieces(chunk, slot);
    const std::int64_t gathered = now_ns();
    record.digest = codec::digest({slot, chunk.raw_bytes});
    books.add(Stage::kStage, begin, gathered, chunk.raw_bytes);
    books.add(Stage::kDigest, gathered, now_ns(), chunk.raw_bytes);
  }
  if (chunks_staged_.fetch_add(1) + 1 == layout_->chunks.size()) {
    std::lock_guard lock(mutex_);
    changed_->notify_all();
  }
}

std::uint64_t SaveJob::payload_bytes(std::uint64_t index) const {
  const format::ChunkPlan& chunk = layout_->chunks[index];
  std::uint64_t nbytes = 0;
  for (std::uint32_t i = chunk.first_piece; i < chunk.first_piece + chunk.piece_count; ++i) {
    nbytes += layout_->pieces[i].end - layout_->pieces[i].begin;
  }
  return nbytes;
}

void SaveJob::gather_pieces(const format::ChunkPlan& chunk, std::uint8_t* slot) const {
  std::uint64_t filled = 0;
  for (std::uint32_t i = chunk.first_piece; i < chunk.first_piece + chunk.piece_count; ++i) {
    const format::Piece& piece = layout_->pieces[i];
    std::memset(slot + filled, 0, piece.at - filled);  // alignment gaps are part of the digest
    const std::uint8_t* source = sources_.contiguous[piece.tensor];
    if (source != nullptr) {
      std::memcpy(slot + piece.at, source + piece.begin, piece.end - piece.begin);
    } else {
      gather(sources_.strided.at(piece.tensor), static_cast<std::int64_t>(piece.begin),
             static_cast<std::int64_t>(piece.end), slot + piece.at);
    }
    filled = piece.at + (piece.end - piece.begin);
  }
}

std::uint32_t SaveJob::encode(std::uint64_t index, std::uint8_t* slot, Lane& lane, LaneBooks& books) {
  const format::ChunkPlan& chunk = layout_->chunks[index];
  format::ChunkRecord& record = table_[index];
  const std::int64_t begin = now_ns();
  // Packed chunks mix item sizes, so they get no byte planes.
  const unsigned item_bytes =
      chunk.piece_count == 1 ? options_.item_bytes[layout_->pieces[chunk.first_piece].tensor] : 1;
  const codec::Codec codec = codec::zstd_codec_for_item_bytes(item_bytes);
  std::uint8_t* target = lane.scratch(layout_->chunk_bytes);
  const auto stored = codec::compress({slot, chunk.raw_bytes}, codec, options_.zstd_level, target);
  if (stored) {
    std::memcpy(slot, target, *stored);
    record.codec = static_cast<std::uint16_t>(codec);
    record.stored_bytes = static_cast<std::uint32_t>(*stored);
  }
  books.add(Stage::kEncode, begin, now_ns(), chunk.raw_bytes);
  return record.stored_bytes;
}

bool SaveJob::place(std::uint64_t chunk, std::uint32_t stored_bytes) {
  std::unique_lock lock(mutex_);
  changed_->wait(lock, [&] { return next_place_ == chunk || stopped(); });
  if (stopped()) return false;
  table_[chunk].offset = file_bytes_;
  file_bytes_ += round_up(stored_bytes, kPageBytes);
  ++next_place_;
  changed_->notify_all();
  return true;
}

void SaveJob::finish() {
  const std::int64_t begin = now_ns();
  if (options_.compress) {
    os::truncate(file_, file_bytes_);  // preallocated for the raw size
  } else {
    file_bytes_ = layout_->file_bytes;
  }
  os::sync(file_);
  file_.fd.close(file_.path);
  LaneBooks books(0, trace());
  books.add(Stage::kSync, begin, now_ns(), file_bytes_);
  merge(books);
}

void SaveJob::abandon() noexcept { file_.fd = os::UniqueFd(); }

}  // namespace snapstone::pipeline
