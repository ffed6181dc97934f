#include "pipeline/load_job.h"

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>

#include "base/clock.h"
#include "base/limits.h"
#include "codec/compress.h"
#include "codec/digest.h"
#include "pipeline/engine.h"
#include "pipeline/in_flight.h"

namespace snapstone::pipeline {
namespace {

constexpr std::chrono::milliseconds kSlotPoll{20};
constexpr std::chrono::microseconds kDevicePoll{50};

}  // namespace

LoadJob::LoadJob(LoadPlan plan, std::vector<os::File> files, std::shared_ptr<mem::SlotRing> ring, LoadOptions options)
    : Job(options.trace), plan_(std::move(plan)), files_(std::move(files)), ring_(std::move(ring)), options_(options) {
  if (plan_.request_bytes_max() > ring_->slot_bytes()) {
    throw std::invalid_argument("slots of " + std::to_string(ring_->slot_bytes()) + " bytes cannot hold requests of " +
                                std::to_string(plan_.request_bytes_max()));
  }
  const bool fits =
      std::ranges::all_of(plan_.chunks(), [this](const ReadChunk& c) { return plan_.file(c) < files_.size(); });
  if (!fits) {
    throw std::invalid_argument("the plan names more data files than the " + std::to_string(files_.size()) + " given");
  }
}

void LoadJob::close_files() noexcept {
  for (os::File& file : files_) file.fd = os::UniqueFd();
}

std::vector<Problem> LoadJob::problems() const {
  std::lock_guard lock(mutex_);
  return problems_;
}

// One lane's share of a load: keeps reads in flight, takes in what arrives.
class LoadJob::LaneRun {
 public:
  LaneRun(LoadJob& job, Lane& lane, LaneBooks& books)
      : job_(job),
        lane_(lane),
        books_(books),
        engine_(lane.io(job.options_.rung, job.ring_)),
        in_flight_(engine_, books, Stage::kRead) {
    for (const std::int32_t device : job.plan_.devices()) {
      landings_.push_back(std::make_unique<DeviceLanding>(
          job.plan_, device, job.options_.landing, job.fence_, books,
          [&job](const ReadChunk& chunk, const codec::Digest& actual) { job.refuse(chunk, actual); }));
    }
  }

  ~LaneRun() {
    in_flight_.drain();
    if (in_flight_.broken()) {
      lane_.drop_io(job_.options_.rung);
    } else {
      for (const os::File& file : job_.files_) engine_.forget_file(file);
    }
  }

  void run() {
    // Each segment once in the life of the ring; without, copies would be slow and hold the lane.
    if (!landings_.empty()) job_.ring_->register_with(cuda::Device::of(landings_.front()->ordinal()));
    while (!job_.stopped()) {
      while (!in_flight_.full() && read_next()) {
      }
      const bool landing = busy();
      const bool arrived = in_flight_.count() > 0 && take_in_arrived(landing ? 0 : 1);
      if (landing && !arrived) flush();
      if ((landing && advance()) || arrived) continue;
      if (landing) {
        std::this_thread::sleep_for(kDevicePoll);
      } else if (claimed_all_) {
        break;
      } else {
        wait_for_slot();
      }
    }
    if (job_.stopped()) return;
    for (const auto& landing : landings_) landing->end();
  }

 private:
  bool read_next() {
    if (claimed_all_) return false;
    if (!spare_) spare_ = job_.ring_->try_acquire();
    if (!spare_) return false;
    const std::uint64_t index = job_.next_request_.fetch_add(1);
    if (index >= job_.plan_.requests().size()) {
      claimed_all_ = true;
      spare_ = {};
      return false;
    }
    const ReadRequest& wanted = job_.plan_.requests()[index];
    const int segment = lane_.fixed_segment(job_.options_.rung, spare_.segment());
    const io::Request request{false,
                              &job_.files_[wanted.file],
                              spare_.data(),
                              wanted.offset,
                              static_cast<std::uint32_t>(wanted.nbytes),
                              segment,
                              0};
    in_flight_.submit(request, index, std::move(spare_));
    return true;
  }

  // Waits for at least `minimum` of them; true if there were any.
  bool take_in_arrived(std::size_t minimum) {
    bool any = false;
    in_flight_.complete(minimum, [&](std::uint64_t index, mem::Slot slot, int error_number) {
      any = true;
      const ReadRequest& request = job_.plan_.requests()[index];
      // Shared, where devices may read from it for a while.
      SharedSlot shared = landings_.empty() ? nullptr : std::make_shared<mem::Slot>(std::move(slot));
      const mem::Slot& held = shared ? *shared : slot;
      for (std::uint64_t i = request.first_chunk; i < request.first_chunk + request.chunk_count; ++i) {
        take_in_chunk(job_.plan_.chunks()[i], request, held, shared, error_number);
      }
      if (job_.plan_.targets().empty()) job_.progress(request.nbytes);
      // The device gets its next request now, not after the whole batch.
      if (shared == nullptr) {
        spare_ = std::move(slot);
      } else if (shared.use_count() == 1) {
        spare_ = std::move(*shared);
      }
      read_next();
    });
    return any;
  }

  void take_in_chunk(const ReadChunk& chunk, const ReadRequest& request, const mem::Slot& slot,
                     const SharedSlot& shared, int error_number) {
    const format::ChunkRecord& record = job_.plan_.record(chunk);
    const os::File& file = job_.files_[request.file];
    const std::uint8_t* const stored = slot.data() + (record.offset - request.offset);
    std::span<const std::uint8_t> raw;
    DeviceLanding* verifier = nullptr;
    try {
      if (error_number == io::Completion::kEndOfFile) throw job_.corrupt(chunk, "file ends before the chunk does");
      if (error_number != 0) throw OsError(error_number, "read", file.path, record.offset, record.stored_bytes);
      verifier = verifier_of(chunk);
      if (verifier == nullptr) raw = job_.verified(chunk, stored, lane_, books_);
    } catch (const CorruptError& error) {
      job_.note(chunk, error);
      if (!job_.options_.collect_problems) throw;
      return;
    }
    if (verifier != nullptr) {
      land(*verifier, {&chunk, stored, shared, true});
    } else {
      job_.progress(job_.scatter_targets(chunk, raw.data(), books_));
      land_verified(chunk, raw, raw.data() == stored ? shared : nullptr);
    }
  }

  // The landing on the device that computes the chunk's digest; null: the host does.
  DeviceLanding* verifier_of(const ReadChunk& chunk) {
    if (landings_.empty() || !job_.options_.verify || job_.options_.collect_problems) return nullptr;
    if (static_cast<codec::Codec>(job_.plan_.record(chunk).codec) != codec::Codec::kNone) return nullptr;
    const std::span<const ReadTarget> targets = job_.plan_.targets(chunk);
    const std::int32_t device = targets.empty() ? kHost : targets.front().device;
    const bool alone = std::ranges::all_of(targets, [&](const ReadTarget& each) { return each.device == device; });
    if (device == kHost || !alone) return nullptr;
    const auto found = std::ranges::find_if(landings_, [&](const auto& each) { return each->ordinal() == device; });
    return (*found)->can_verify() ? found->get() : nullptr;
  }

  void land_verified(const ReadChunk& chunk, std::span<const std::uint8_t> raw, const SharedSlot& shared) {
    for (const auto& landing : landings_) {
      const bool wanted = std::ranges::any_of(
          job_.plan_.targets(chunk), [&](const ReadTarget& each) { return each.device == landing->ordinal(); });
      if (wanted) land(*landing, {&chunk, raw.data(), shared, false});
    }
  }

  void land(DeviceLanding& landing, const Arrived& arrived) {
    while (!landing.add(arrived)) {
      if (job_.stopped()) throw CancelledError("stopped");
      if (!advance()) std::this_thread::sleep_for(kDevicePoll);
    }
  }

  // Nothing has arrived just now that could join a batch.
  void flush() {
    for (const auto& landing : landings_) landing->flush(in_flight_.count() == 0);
  }

  bool advance() {
    bool moved = false;
    for (const auto& landing : landings_) {
      moved = landing->advance() || moved;
      job_.progress(landing->take_placed());
    }
    return moved;
  }

  bool busy() const {
    return std::ranges::any_of(landings_, [](const auto& landing) { return landing->busy(); });
  }

  void wait_for_slot() {
    const std::int64_t begin = now_ns();
    spare_ = job_.ring_->acquire(kSlotPoll);
    books_.add(Stage::kSlotWait, begin, now_ns(), 0);
    if (!spare_ && job_.ring_->slot_count() == 0) throw OsError(ENOMEM, "read: no slot is left", "");
  }

  LoadJob& job_;
  Lane& lane_;
  LaneBooks& books_;
  io::IoEngine& engine_;
  InFlight in_flight_;
  std::vector<std::unique_ptr<DeviceLanding>> landings_;  // of the plan's devices
  mem::Slot spare_;
  bool claimed_all_ = false;
};

void LoadJob::work(Lane& lane, LaneBooks& books) {
  if (next_request_.load() < plan_.requests().size()) LaneRun(*this, lane, books).run();
}

std::span<const std::uint8_t> LoadJob::verified(const ReadChunk& chunk, const std::uint8_t* stored, Lane& lane,
                                                LaneBooks& books) {
  if (options_.check_padding) check_padding(chunk, stored);
  const std::span<const std::uint8_t> raw = decode(chunk, stored, lane, books);
  if (options_.verify) check_digest(chunk, raw, lane, books);
  return raw;
}

ReferenceChain LoadJob::chain(const ReadChunk& chunk) const {
  const ChunkTable& table = plan_.table(chunk.table);
  std::span<const std::uint32_t> references;
  if (table.references) references = *table.references;
  return ReferenceChain(*table.records, references, std::span<const os::File>(files_).subspan(table.first_file));
}

std::uint8_t* LoadJob::scratch(const ReadChunk& chunk, Lane& lane) const {
  const std::uint64_t nbytes = ReferenceChain::scratch_bytes(plan_.raw_bytes_max());
  return lane.scratch(plan_.table(chunk.table).references ? nbytes : nbytes / 2);
}

std::span<const std::uint8_t> LoadJob::decode(const ReadChunk& chunk, const std::uint8_t* stored, Lane& lane,
                                              LaneBooks& books) {
  const format::ChunkRecord& record = plan_.record(chunk);
  if (static_cast<codec::Codec>(record.codec) == codec::Codec::kNone) return {stored, record.raw_bytes};
  return chain(chunk).decode(chunk.chunk, {stored, record.stored_bytes}, scratch(chunk, lane), books);
}

void LoadJob::check_digest(const ReadChunk& chunk, std::span<const std::uint8_t> raw, Lane& lane, LaneBooks& books) {
  const std::int64_t begin = now_ns();
  const codec::Digest actual = codec::digest(raw);
  books.add(Stage::kDigest, begin, now_ns(), raw.size());
  const codec::Digest& expected = plan_.record(chunk).digest;
  if (actual == expected) return;
  // A scrub decodes each record of the chain on its own.
  if (!options_.collect_problems && codec::is_xor_codec(plan_.record(chunk).codec)) blame_reference(chunk, lane, books);
  throw corrupt(chunk, "digest mismatch", codec::hex(expected), codec::hex(actual));
}

void LoadJob::blame_reference(const ReadChunk& chunk, Lane& lane, LaneBooks& books) const {
  const ReadChunk wrong{chunk.table, chain(chunk).first_wrong(chunk.chunk, scratch(chunk, lane), books)};
  if (wrong.chunk != chunk.chunk) {
    throw CorruptError("reference chunk " + std::to_string(wrong.chunk) + ": digest mismatch",
                       files_[plan_.file(wrong)].path, static_cast<std::int64_t>(chunk.chunk),
                       codec::hex(plan_.record(wrong).digest));
  }
}

void LoadJob::check_padding(const ReadChunk& chunk, const std::uint8_t* stored) const {
  const format::ChunkRecord& record = plan_.record(chunk);
  const std::uint8_t* end = stored + round_up(record.stored_bytes, kPageBytes);
  if (std::any_of(stored + record.stored_bytes, end, [](std::uint8_t byte) { return byte != 0; })) {
    throw corrupt(chunk, "padding after the chunk is not zero");
  }
}

std::uint64_t LoadJob::scatter_targets(const ReadChunk& chunk, const std::uint8_t* raw, LaneBooks& books) {
  const std::int64_t start = now_ns();
  std::uint64_t taken = 0;
  for (const ReadTarget& target : plan_.targets(chunk)) {
    if (target.device != kHost) continue;
    if (target.contiguous != nullptr) {
      std::memcpy(target.contiguous, raw + target.at, target.shard_end - target.shard_begin);
      taken += target.shard_end - target.shard_begin;
    } else {
      const auto begin = static_cast<std::int64_t>(target.shard_begin);
      const auto end = static_cast<std::int64_t>(target.shard_end);
      taken += static_cast<std::uint64_t>(scatter(raw + target.at, begin, end, plan_.box(target.box)));
    }
  }
  if (taken > 0) books.add(Stage::kScatter, start, now_ns(), taken);
  return taken;
}

void LoadJob::refuse(const ReadChunk& chunk, const codec::Digest& actual) {
  const CorruptError error =
      corrupt(chunk, "digest mismatch", codec::hex(plan_.record(chunk).digest), codec::hex(actual));
  note(chunk, error);
  throw error;
}

CorruptError LoadJob::corrupt(const ReadChunk& chunk, const std::string& reason, std::string expected,
                              std::string actual) const {
  return CorruptError(reason, files_[plan_.file(chunk)].path, static_cast<std::int64_t>(chunk.chunk),
                      std::move(expected), std::move(actual));
}

void LoadJob::note(const ReadChunk& chunk, const CorruptError& error) {
  std::lock_guard lock(mutex_);
  if (problems_.size() < kProblemsMax) {
    problems_.push_back({chunk.table, chunk.chunk, error.path(), error.reason(), error.expected(), error.actual()});
  }
}

}  // namespace snapstone::pipeline
