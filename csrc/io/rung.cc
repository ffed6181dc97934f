// A probe of one rung in one directory:
//   1. io_uring only: ask for a ring in a child process first, because some sandboxes kill the caller instead of
//   refusing;
//   2. make the engine, and for uring-fixed register the buffers;
//   3. write one block to a file without a name, fsync it, read it back, compare;
//   4. check that O_DIRECT is still set: an engine drops it quietly when a transfer is refused.
// Any failure at all is a reason to pass the rung over. Nothing is left in the directory.
#include "io/rung.h"

#include <fcntl.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cerrno>
#include <cstdlib>
#include <map>
#include <mutex>
#include <new>
#include <span>
#include <utility>

#include "base/error.h"
#include "base/limits.h"
#include "io/ring_permission.h"
#include "os/file.h"
#include "os/file_system.h"
#include "os/memory.h"

namespace snapstone::io {
namespace {

constexpr std::array<Rung, 4> kLadder = {Rung::kUringFixed, Rung::kUring, Rung::kThreadsDirect, Rung::kBuffered};
constexpr unsigned kProbeQueueDepth = 4;

// Two page-aligned blocks: what is written, and what is read back.
class Blocks {
 public:
  explicit Blocks(std::uint64_t block_nbytes)
      : block_nbytes_(block_nbytes),
        data_(static_cast<std::uint8_t*>(::operator new(2 * block_nbytes, std::align_val_t{block_nbytes}))) {
    std::uint64_t state = 0x9E3779B97F4A7C15;  // any bytes but a constant, which a hole or stale page could match
    for (std::uint64_t i = 0; i < block_nbytes; ++i) {
      state = state * 6364136223846793005 + 1442695040888963407;
      data_[i] = static_cast<std::uint8_t>(state >> 56);
    }
    std::fill_n(data_ + block_nbytes, block_nbytes, std::uint8_t{0});
  }
  Blocks(const Blocks&) = delete;
  Blocks& operator=(const Blocks&) = delete;
  ~Blocks() { ::operator delete(data_, std::align_val_t{block_nbytes_}); }

  std::uint8_t* source() noexcept { return data_; }
  std::uint8_t* target() noexcept { return data_ + block_nbytes_; }
  std::uint64_t block_nbytes() const noexcept { return block_nbytes_; }
  bool equal() const noexcept { return std::equal(data_, data_ + block_nbytes_, data_ + block_nbytes_); }

 private:
  std::uint64_t block_nbytes_;  // a power of two
  std::uint8_t* data_;
};

// Empty when all bytes of the block were transferred.
std::string transfer_block(IoEngine& engine, const os::File& file, std::uint8_t* buffer, std::uint64_t nbytes,
                           bool write) {
  Request request;
  request.write = write;
  request.file = &file;
  request.buffer = buffer;
  request.nbytes = static_cast<std::uint32_t>(nbytes);
  request.segment = engine.rung() == Rung::kUringFixed ? 0 : -1;
  engine.submit(request);
  Completion completion;
  engine.complete(std::span(&completion, 1), 1);
  if (completion.error_number == 0) {
    return {};
  }
  const std::string verb = write ? "write: " : "read: ";
  return verb +
         (completion.error_number == Completion::kEndOfFile ? "end of file" : error_name(completion.error_number));
}

std::string exercise(const os::Directory& directory, Rung rung) {
  os::ProbeFile probe = os::open_probe_file(directory, rung_is_direct(rung));
  if (rung_is_direct(rung) && !probe.direct) {
    return "O_DIRECT: EINVAL (the file system has none)";
  }
  const os::File file{std::move(probe.fd), std::move(probe.path), probe.direct};
  Blocks blocks(std::bit_ceil(std::max(kPageBytes, os::direct_io_alignment(file.fd.get()))));  // outlives the engine
  const std::unique_ptr<IoEngine> engine = make_engine(rung, kProbeQueueDepth);
  if (rung == Rung::kUringFixed && !engine->register_segment(0, blocks.source(), 2 * blocks.block_nbytes())) {
    return "io_uring_register: no registered buffers (RLIMIT_MEMLOCK, or a kernel before 5.19)";
  }
  std::string reason = transfer_block(*engine, file, blocks.source(), blocks.block_nbytes(), true);
  if (reason.empty()) {
    os::sync(file, "probe");
    reason = transfer_block(*engine, file, blocks.target(), blocks.block_nbytes(), false);
  }
  engine->forget_file(file);
  if (!reason.empty()) {
    return reason;
  }
  if (!blocks.equal()) {
    return "read: not the bytes that were written";
  }
  if (rung_is_direct(rung) && (::fcntl(file.fd.get(), F_GETFL) & O_DIRECT) == 0) {
    return "O_DIRECT: EINVAL (the file system refuses it at the first transfer)";
  }
  return {};
}

std::string describe(const OsError& error) {
  if (error.verb().starts_with("io_uring_setup")) {
    return error.verb() + ": " + ring_refusal(error.error_number());
  }
  return error.verb() + ": " + error_name(error.error_number());
}

// What is known about a rung before any file is touched.
std::string refuse_early(Rung rung) {
  if (!rung_is_uring(rung)) {
    return {};
  }
  if (!uring_compiled_in()) {
    return "io_uring_setup: built without liburing";
  }
  const std::uint64_t limit_bytes = os::memlock_limit_bytes();
  if (rung == Rung::kUringFixed && limit_bytes < kSegmentBytes) {
    return "RLIMIT_MEMLOCK: " + std::to_string(limit_bytes) + " bytes, less than one segment of " +
           std::to_string(kSegmentBytes) + " (raise ulimit -l)";
  }
  return ring_permission();
}

// Empty when an engine of this rung can be built; for directories in which no probe file can be made.
std::string try_engine(Rung rung) {
  if (std::string reason = refuse_early(rung); !reason.empty()) {
    return reason;
  }
  try {
    make_engine(rung, kProbeQueueDepth);
    return {};
  } catch (const OsError& error) {
    return describe(error);
  }
}

bool admits_no_file(const os::Directory& directory) {
  try {
    os::open_probe_file(directory, false);
    return false;
  } catch (const OsError& error) {
    return error.error_number() == EROFS || error.error_number() == EACCES || error.error_number() == EPERM;
  }
}

struct Verdict {
  RungChoice choice;
  bool lasting = true;  // holds for every directory of this file system
};

Verdict force(const os::Directory& directory, const std::string& name) {
  Verdict verdict;
  verdict.choice.rung = rung_from_name(name);
  verdict.choice.forced = true;
  verdict.lasting = !admits_no_file(directory);
  const std::string reason =
      verdict.lasting ? try_rung(directory, verdict.choice.rung) : try_engine(verdict.choice.rung);
  if (!reason.empty()) {
    throw OsError(EOPNOTSUPP, "SNAPSTONE_IO=" + name + " does not work: " + reason, directory.path);
  }
  return verdict;
}

Verdict climb_down(const os::Directory& directory, const os::FileSystemFacts& facts) {
  Verdict verdict;
  const bool probe = !admits_no_file(directory);
  for (const Rung rung : kLadder) {
    std::string reason;
    if (facts.memory_backed && rung_is_direct(rung)) {
      reason = facts.name + " keeps files in memory, where O_DIRECT has no meaning";
    } else {
      reason = probe ? try_rung(directory, rung) : try_engine(rung);
    }
    if (reason.empty()) {
      verdict.choice.rung = rung;
      verdict.lasting = probe;
      return verdict;
    }
    verdict.choice.reasons.push_back(std::string(rung_name(rung)) + ": " + reason);
  }
  verdict.choice.rung = Rung::kBuffered;
  verdict.lasting = false;
  return verdict;
}

}  // namespace

bool uring_compiled_in() {
#if SNAPSTONE_HAVE_LIBURING
  return true;
#else
  return false;
#endif
}

std::string try_rung(const os::Directory& directory, Rung rung) {
  if (std::string reason = refuse_early(rung); !reason.empty()) {
    return reason;
  }
  try {
    return exercise(directory, rung);
  } catch (const OsError& error) {
    return describe(error);
  } catch (const std::bad_alloc&) {
    return "ENOMEM";
  }
}

RungChoice choose_rung(const os::Directory& directory) {
  static std::mutex mutex;
  static std::map<std::pair<std::uint64_t, std::string>, RungChoice> verdicts;

  const char* const value = std::getenv("SNAPSTONE_IO");
  const std::string forced = value == nullptr ? "" : value;
  const os::FileSystemFacts facts = os::file_system_facts(directory);
  const std::lock_guard lock(mutex);
  const auto key = std::pair(facts.device, forced);
  if (const auto found = verdicts.find(key); found != verdicts.end()) {
    return found->second;
  }
  const Verdict verdict = forced.empty() ? climb_down(directory, facts) : force(directory, forced);
  if (verdict.lasting) {
    verdicts.emplace(key, verdict.choice);
  }
  return verdict.choice;
}

}  // namespace snapstone::io
