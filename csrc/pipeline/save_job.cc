#include "pipeline/save_job.h"

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <deque>
#include <iterator>
#include <optional>
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
constexpr std::chrono::microseconds kDevicePoll{50};
constexpr std::size_t kComingMax = 16;  // chunks of devices that one lane waits for; the rest are for the others
constexpr std::int64_t kUnknown = -1;
constexpr std::uint64_t kReserveBytes = 64 << 20;

}  // namespace

SaveJob::SaveJob(std::shared_ptr<const format::Layout> layout, SaveSources sources, os::File file,
                 std::shared_ptr<mem::SlotRing> ring, SaveOptions options, SaveBase base)
    : Job(options.trace),
      layout_(std::move(layout)),
      sources_(std::move(sources)),
      file_(std::move(file)),
      ring_(std::move(ring)),
      options_(std::move(options)),
      base_(std::move(base)),
      direct_(file_.direct),
      table_(layout_->chunks.size()) {
  if (ring_->slot_bytes() < layout_->chunk_bytes) {
    throw std::invalid_argument("slots of " + std::to_string(ring_->slot_bytes()) + " bytes cannot hold chunks of " +
                                std::to_string(layout_->chunk_bytes));
  }
  base_.check(layout_->chunks.size());
  if (options_.compress) {
    encoder_.emplace(
        *layout_, base_,
        EncodeOptions{options_.zstd_level, options_.item_bytes, options_.xor_tensors, options_.keyframe_every});
  }
  if (DevicePlan plan = make_device_plan(*layout_, sources_); !plan.empty()) {
    device_ = make_device_stage(std::move(plan));
    order_claims();
  }
  host_chunks_ = layout_->chunks.size() - (device_ ? device_->chunk_count() : 0);
  if (places_in_turn()) announced_.assign(layout_->chunks.size(), kUnknown);
  // Buffered writes end in the page cache; on tmpfs reserving would write every page once more.
  if (direct_ && layout_->file_bytes > 0 && base_.empty()) {
    os::preallocate(file_, layout_->file_bytes);
    reserved_bytes_ = layout_->file_bytes;
  }
}

SaveJob::~SaveJob() {
  if (inherited()) device_.release();  // a forked child can neither call the driver nor take locks that its parent held
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
    if (job_.device_) job_.device_->enter();
    while (!job_.stopped()) {
      reap(0);
      if (job_.device_) look_at_device();
      // Raw chunks cost nothing more, so the device is kept busy; compressing waits until nothing can be staged, since
      // a fence may hold.
      while (!job_.options_.compress && can_write() && !in_flight_.full()) write_oldest();
      if (stage_next()) continue;
      if (can_write()) {
        write_oldest();
      } else if (!coming_.empty() || not_yet_) {
        std::this_thread::sleep_for(kDevicePoll);
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
    if (job_.device_) return claim_next();
    if (!spare_) spare_ = job_.ring_->try_acquire();
    if (!spare_) return false;
    const std::uint64_t chunk = job_.next_chunk_.fetch_add(1);
    if (chunk >= job_.layout_->chunks.size()) {
      claimed_all_ = true;
      spare_ = {};
      return false;
    }
    last_was_same_ = !job_.stage(chunk, spare_.data(), last_was_same_, books_);
    if (!last_was_same_) staged_.emplace_back(chunk, std::move(spare_));
    return true;
  }

  // With chunks on devices: claims the next chunk, if it has a slot or this lane has one for it.
  bool claim_next() {
    not_yet_ = false;
    std::uint64_t claim = job_.next_chunk_.load();
    if (claim >= job_.layout_->chunks.size()) {
      claimed_all_ = true;
      spare_ = {};
      return false;
    }
    const std::uint64_t chunk = job_.chunk_of_claim(claim);
    const bool on_device = job_.on_device(chunk);
    DeviceStage::Claim state = DeviceStage::Claim::kNeedsSlot;
    if (on_device) {
      if (coming_.size() >= kComingMax) return false;
      state = job_.device_->claim(job_.device_->position(chunk));
      not_yet_ = state == DeviceStage::Claim::kNotYet;
      if (not_yet_) return false;
    }
    const bool needs_slot = state == DeviceStage::Claim::kNeedsSlot;
    if (needs_slot && !spare_) spare_ = job_.ring_->try_acquire();
    if (needs_slot && !spare_) return false;
    const auto claimed = [&] { return job_.next_chunk_.compare_exchange_strong(claim, claim + 1); };
    if (on_device) {
      const bool got_it =
          needs_slot ? job_.device_->provide(job_.device_->position(chunk), spare_, claimed) : claimed();
      if (got_it) coming_.push_back(chunk);
      return true;
    }
    if (!claimed()) return true;
    last_was_same_ = !job_.stage(chunk, spare_.data(), last_was_same_, books_);
    if (!last_was_same_) hold(chunk, std::move(spare_));
    return true;
  }

  void look_at_device() {
    job_.device_->advance(books_);
    while (!coming_.empty()) {
      const std::uint64_t chunk = coming_.front();
      std::optional<DeviceStage::Taken> taken = job_.device_->take(job_.device_->position(chunk), books_);
      if (!taken) break;
      coming_.pop_front();
      if (job_.stage_from_device(chunk, *taken, books_)) hold(chunk, std::move(taken->slot));
    }
    job_.announce_staging();
  }

  // In the order of chunks, which is not that in which they come from devices and from the host.
  void hold(std::uint64_t chunk, mem::Slot slot) {
    auto at = staged_.end();
    while (at != staged_.begin() && std::prev(at)->first > chunk) --at;
    staged_.emplace(at, chunk, std::move(slot));
  }

  // A chunk whose place depends on chunks before it is not waited for while this lane has one of those.
  bool can_write() const {
    if (staged_.empty()) return false;
    return coming_.empty() || !job_.places_in_turn() || staged_.front().first < coming_.front();
  }

  bool standing_by() const {
    return lane_.number() > 0 && !job_.options_.eager && job_.writing_.load() >= kDeviceBusy &&
           job_.next_chunk_.load() < job_.layout_->chunks.size();
  }

  void write_oldest() {
    auto [chunk, slot] = std::move(staged_.front());
    staged_.pop_front();
    format::ChunkRecord& record = job_.table_[chunk];
    if (job_.options_.compress) job_.announce(chunk, job_.encode(chunk, slot.data(), lane_, books_));
    if (!job_.places_in_turn()) {
      record.offset = job_.layout_->chunks[chunk].offset;
    } else if (!job_.wait_for_place(chunk)) {
      return;
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
  std::deque<std::uint64_t> coming_;  // claimed chunks whose bytes are on their way from a device
  mem::Slot spare_;
  bool claimed_all_ = false;
  bool not_yet_ = false;       // the next chunk waits for its device, and not for a slot
  bool last_was_same_ = true;  // as the chunk before it was, the next one is expected to be
};

void SaveJob::work(Lane& lane, LaneBooks& books) {
  if (next_chunk_.load() < layout_->chunks.size()) LaneRun(*this, lane, books).run();
}

const std::uint8_t* SaveJob::contiguous_source(std::uint64_t chunk) const {
  const std::span<const format::Piece> pieces = pieces_of(*layout_, chunk);
  const std::uint8_t* source = sources_.contiguous[pieces[0].tensor];
  return pieces.size() == 1 && source != nullptr ? source + pieces[0].begin : nullptr;
}

bool SaveJob::stage(std::uint64_t index, std::uint8_t* slot, bool expect_same, LaneBooks& books) {
  const std::uint32_t raw_bytes = layout_->chunks[index].raw_bytes;
  const format::ChunkRecord* base = base_.record(index, raw_bytes);
  const std::uint8_t* source = contiguous_source(index);
  format::ChunkRecord record{};
  record.raw_bytes = record.stored_bytes = raw_bytes;
  bool same = false;
  if (base != nullptr && expect_same && source != nullptr) {
    const std::int64_t begin = now_ns();
    same = codec::digest({source, raw_bytes}) == base->digest;
    books.add(Stage::kDigest, begin, now_ns(), raw_bytes);
  }
  if (!same) {
    copy_chunk(index, slot, record, books);
    same = base != nullptr && record.digest == base->digest;
  }
  settle(index, same ? *base : record, same);
  if (chunks_staged_.fetch_add(1) + 1 == host_chunks_) {
    std::lock_guard lock(mutex_);
    changed_->notify_all();
  }
  return !same;
}

void SaveJob::settle(std::uint64_t index, const format::ChunkRecord& record, bool same) {
  table_[index] = record;
  const std::uint64_t nbytes = payload_bytes(index);
  bytes_staged_.fetch_add(nbytes, std::memory_order_relaxed);
  if (same) progress(nbytes);
  if (same || (places_in_turn() && !options_.compress)) announce(index, same ? 0 : record.stored_bytes);
}

void SaveJob::copy_chunk(std::uint64_t chunk, std::uint8_t* slot, format::ChunkRecord& record, LaneBooks& books) {
  const std::int64_t begin = now_ns();
  if (const std::uint8_t* source = contiguous_source(chunk)) {
    record.digest = codec::copy_and_digest({source, record.raw_bytes}, slot);
    books.add(Stage::kStage, begin, now_ns(), record.raw_bytes);
    return;
  }
  gather_pieces(chunk, slot);
  const std::int64_t gathered = now_ns();
  record.digest = codec::digest({slot, record.raw_bytes});
  books.add(Stage::kStage, begin, gathered, record.raw_bytes);
  books.add(Stage::kDigest, gathered, now_ns(), record.raw_bytes);
}

std::uint64_t SaveJob::payload_bytes(std::uint64_t index) const {
  std::uint64_t nbytes = 0;
  for (const format::Piece& piece : pieces_of(*layout_, index)) nbytes += nbytes_of(piece);
  return nbytes;
}

void SaveJob::gather_pieces(std::uint64_t chunk, std::uint8_t* slot) const {
  const std::span<const format::Piece> pieces = pieces_of(*layout_, chunk);
  for_each_gap(pieces, [&](std::uint64_t at, std::uint64_t nbytes) {
    std::memset(slot + at, 0, nbytes);  // alignment gaps are part of the digest
  });
  for (const format::Piece& piece : pieces) sources_.copy(piece, slot + piece.at);
}

std::uint32_t SaveJob::encode(std::uint64_t index, std::uint8_t* slot, Lane& lane, LaneBooks& books) {
  const EncodedChunk encoded = encoder_->encode(index, slot, lane.scratch(encoder_->scratch_bytes()), books);
  table_[index].codec = static_cast<std::uint16_t>(encoded.codec);
  table_[index].stored_bytes = encoded.stored_bytes;
  return encoded.stored_bytes;
}

std::span<const std::uint32_t> SaveJob::encode_us() const {
  return encoder_ ? std::span<const std::uint32_t>(encoder_->encode_us()) : std::span<const std::uint32_t>();
}

void SaveJob::announce(std::uint64_t chunk, std::uint32_t stored_bytes) {
  std::lock_guard lock(mutex_);
  announced_[chunk] = static_cast<std::int64_t>(round_up(stored_bytes, kPageBytes));
  while (next_place_ < announced_.size() && announced_[next_place_] != kUnknown) {
    if (announced_[next_place_] > 0) table_[next_place_].offset = file_bytes_;
    file_bytes_ += static_cast<std::uint64_t>(announced_[next_place_]);
    ++next_place_;
  }
  reserve_for_placed();
  if (waiting_for_place_ > 0) changed_->notify_all();  // else it would wake whoever waits for the end, chunk by chunk
}

bool SaveJob::wait_for_place(std::uint64_t chunk) {
  std::unique_lock lock(mutex_);
  ++waiting_for_place_;
  changed_->wait(lock, [&] { return next_place_ > chunk || stopped(); });
  --waiting_for_place_;
  return next_place_ > chunk;
}

// Each reservation waits for the writes in flight, so there should be few: the second one takes what the chunks that
// have a place let expect of the rest.
void SaveJob::reserve_for_placed() {
  if (!direct_ || file_bytes_ <= reserved_bytes_) return;
  const std::uint64_t expected = file_bytes_ / next_place_ * announced_.size();
  const std::uint64_t wanted =
      reserved_bytes_ == 0 ? file_bytes_ + kReserveBytes : std::max(file_bytes_ + kReserveBytes, expected);
  std::uint64_t nbytes = std::min(wanted, layout_->file_bytes);
  try {
    os::preallocate(file_, nbytes);
  } catch (const OsError& error) {
    if (nbytes == file_bytes_ || (error.error_number() != ENOSPC && error.error_number() != EDQUOT)) throw;
    nbytes = file_bytes_;
    os::preallocate(file_, nbytes);
  }
  reserved_bytes_ = nbytes;
}

void SaveJob::finish() {
  if (device_) device_->close();
  const std::int64_t begin = now_ns();
  if (!places_in_turn()) {
    file_bytes_ = layout_->file_bytes;
  } else if (reserved_bytes_ > file_bytes_) {
    os::truncate(file_, file_bytes_);
  }
  os::sync(file_, "data");
  file_.fd.close(file_.path);
  base_.append_references(table_);
  base_.files.clear();
  LaneBooks books(0, trace());
  books.add(Stage::kSync, begin, now_ns(), file_bytes_);
  merge(books);
}

void SaveJob::abandon() noexcept {
  if (device_) device_->close();
  file_.fd = os::UniqueFd();
  base_.files.clear();
}

}  // namespace snapstone::pipeline
