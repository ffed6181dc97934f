// IoEngine: reads and writes of page-aligned buffers at page-aligned offsets, many in flight. Knows no tensors.
//
// Ownership: from submit() until its completion is returned, the buffer belongs to the kernel (or to an engine thread);
//            the caller neither reads, writes nor frees it. ~IoEngine gives up what has not reached the kernel and
//            waits for the rest.
// Threads:   one thread creates an engine, makes every call and destroys it (io_uring: SINGLE_ISSUER).
// Limits:    at most capacity() requests in flight; submit() beyond that is a programming error (assert).
// Failure:   the result of a request is in its Completion; short transfers, EINTR and EAGAIN are resubmitted inside
// (the
//            last two kTransientRetriesMax times in a row at most). submit() and complete() throw OsError only when the
//            engine itself is broken (io_uring_enter refusing for good).
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>

#include "os/file.h"

namespace snapstone::io {

// EINTR and EAGAIN without progress; then the error is delivered.
inline constexpr unsigned kTransientRetriesMax = 1000;

enum class Rung : int { kUringFixed = 0, kUring = 1, kThreadsDirect = 2, kBuffered = 3 };
const char* rung_name(Rung rung);              // "uring-fixed", "uring", "threads-direct", "buffered"
Rung rung_from_name(const std::string& name);  // std::invalid_argument names the choices
inline bool rung_is_direct(Rung rung) { return rung != Rung::kBuffered; }
inline bool rung_is_uring(Rung rung) { return rung == Rung::kUringFixed || rung == Rung::kUring; }

struct Request {
  bool write = false;
  const os::File* file = nullptr;  // outlives the request; EINVAL on a direct file drops O_DIRECT and retries
  std::uint8_t* buffer = nullptr;
  std::uint64_t offset = 0;
  std::uint32_t nbytes = 0;
  int segment = -1;         // registered buffer that holds `buffer`, or -1
  std::uint64_t token = 0;  // returned in the completion
};

struct Completion {
  std::uint64_t token = 0;
  int error_number = 0;  // 0: all bytes were transferred; kEndOfFile: the file ended before that
  static constexpr int kEndOfFile = -1;
};

class IoEngine {
 public:
  virtual ~IoEngine() = default;
  virtual Rung rung() const = 0;
  virtual unsigned capacity() const = 0;
  virtual unsigned in_flight() const = 0;
  virtual void submit(const Request& request) = 0;
  // Fills `completions` with what is done; waits until at least `minimum` are (0: returns at once).
  // minimum <= in_flight().
  virtual std::size_t complete(std::span<Completion> completions, std::size_t minimum) = 0;
  // Makes [data, data + nbytes) a registered buffer named `segment`; false where that is not possible (memlock):
  // requests then use -1.
  virtual bool register_segment(int segment, std::uint8_t* data, std::uint64_t nbytes) = 0;
  // Drops what the engine keeps of a file with nothing in flight. Its owner calls this before closing the file, so that
  // close() is the last reference and nothing but the owner keeps the file alive.
  virtual void forget_file(const os::File& /*file*/) {}
};

// Builds the engine of a rung; throws OsError when this process cannot have it (io_uring forbidden).
std::unique_ptr<IoEngine> make_engine(Rung rung, unsigned queue_depth);

}  // namespace snapstone::io
