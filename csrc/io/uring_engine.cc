// A request's life:
//   1. submit() takes a Transfer and queues an SQE: queued_.
//   2. enter() hands queued SQEs to the kernel, a few at a time: in_kernel_. The buffer is the kernel's.
//   3. reap() takes the CQE, and settle() reads its result: delivered, or queued again with what is left (back to 1).
// in_flight() = queued_ + in_kernel_ at every return. The destructor forgets step 1 and waits for step 2.
#include "io/uring_engine.h"

#include <cerrno>

#include "base/error.h"

#if SNAPSTONE_HAVE_LIBURING

#include <liburing.h>
#include <sys/uio.h>

#include <algorithm>
#include <cassert>
#include <chrono>
#include <optional>
#include <thread>
#include <vector>

#include "base/fault_hook.h"
#include "base/limits.h"
#include "io/registered_files.h"
#include "io/ring.h"
#include "os/journal.h"

namespace snapstone::io {
namespace {

// SQEs per system call while the device has work; an idle device gets each at once.
constexpr unsigned kSubmitBatch = 4;
// A sparse table, one pointer each: 64 GiB of slots in segments of kSegmentBytes.
constexpr unsigned kSegmentsMax = 1024;
constexpr std::uint64_t kRegisteredBytesMax = 1ull << 30;  // the kernel's limit of one registered buffer
constexpr unsigned kEagerRetries = 8;                      // after so many EINTR and EAGAIN each waits kBackoff first
constexpr std::chrono::milliseconds kBackoff{1};

struct Transfer {
  Request request;
  std::uint32_t done = 0;  // bytes that need no further transfer
  unsigned retries = 0;    // EINTR and EAGAIN since the last progress
  int file_slot = RegisteredFiles::kNone;
  bool direct_dropped = false;  // EINVAL already cost this file its O_DIRECT
  bool blocking = false;        // EAGAIN came back: a kernel worker issues it, and may block
};

struct Segment {
  const std::uint8_t* data = nullptr;
  std::uint64_t nbytes = 0;
};

class UringEngine final : public IoEngine {
 public:
  UringEngine(Rung rung, unsigned queue_depth);
  UringEngine(const UringEngine&) = delete;
  UringEngine& operator=(const UringEngine&) = delete;
  ~UringEngine() override;

  Rung rung() const override;
  unsigned capacity() const override { return static_cast<unsigned>(transfers_.size()); }
  unsigned in_flight() const override { return queued_ + in_kernel_; }
  void submit(const Request& request) override;
  std::size_t complete(std::span<Completion> completions, std::size_t minimum) override;
  bool register_segment(int segment, std::uint8_t* data, std::uint64_t nbytes) override;
  void forget_file(const os::File& file) override;

 private:
  void check_owner() const { assert(std::this_thread::get_id() == owner_); }
  void queue(std::uint32_t index);
  void enter(unsigned minimum);
  bool make_room(unsigned& attempts);
  std::size_t reap(std::span<Completion> completions);
  std::optional<int> settle(Transfer& transfer, int result);
  bool retry_is_left(Transfer& transfer);
  bool is_registered(const Request& request) const;
  void drain() noexcept;

  [[maybe_unused]] const std::thread::id owner_ = std::this_thread::get_id();
  Ring ring_;
  RegisteredFiles files_;
  std::vector<Transfer> transfers_;  // by user_data
  std::vector<std::uint32_t> free_;  // indexes into transfers_
  std::vector<Segment> segments_;    // by segment number; data == nullptr: not registered
  unsigned queued_ = 0;              // SQEs that the kernel has not seen
  unsigned in_kernel_ = 0;           // requests that the kernel owns, and CQEs not yet taken
  bool buffers_registered_ = false;
  bool any_segment_refused_ = false;
  bool broken_ = false;  // io_uring_enter failed for good: completions may be missing
};

UringEngine::UringEngine(Rung rung, unsigned queue_depth) : ring_(queue_depth), files_(ring_), transfers_(queue_depth) {
  // So that an SQE is always free, and the CQ (twice as large) never overflows.
  assert(queue_depth > 0 && queue_depth <= ring_.get()->sq.ring_entries);
  free_.reserve(queue_depth);
  for (std::uint32_t index = queue_depth; index > 0; --index) {
    free_.push_back(index - 1);
  }
  if (rung == Rung::kUringFixed) {
    buffers_registered_ = io_uring_register_buffers_sparse(ring_.get(), kSegmentsMax) == 0;
  }
}

UringEngine::~UringEngine() {
  check_owner();
  drain();
  if (buffers_registered_) {
    // Closing the ring would do it later, in a kernel worker; the memlock budget is wanted back now.
    io_uring_unregister_buffers(ring_.get());
  }
}

Rung UringEngine::rung() const {
  return buffers_registered_ && (!any_segment_refused_ || !segments_.empty()) ? Rung::kUringFixed : Rung::kUring;
}

void UringEngine::submit(const Request& request) {
  check_owner();
  assert(!free_.empty() && request.file != nullptr && request.buffer != nullptr && request.nbytes > 0);
  const std::uint32_t index = free_.back();
  free_.pop_back();
  transfers_[index] = Transfer{};
  transfers_[index].request = request;
  queue(index);
  if (queued_ >= kSubmitBatch || in_kernel_ == 0) {
    enter(0);
  }
}

std::size_t UringEngine::complete(std::span<Completion> completions, std::size_t minimum) {
  check_owner();
  assert(minimum <= in_flight() && minimum <= completions.size());
  if (in_flight() == 0) {
    return 0;
  }
  std::size_t count = 0;
  do {
    enter(static_cast<unsigned>(minimum - count));
    count += reap(completions.subspan(count));
  } while (count < minimum);
  if (queued_ > 0) {
    enter(0);  // what reap() queued again
  }
  return count;
}

bool UringEngine::register_segment(int segment, std::uint8_t* data, std::uint64_t nbytes) {
  check_owner();
  assert(segment >= 0 && data != nullptr);
  if (!buffers_registered_ || segment >= static_cast<int>(kSegmentsMax) || nbytes > kRegisteredBytesMax) {
    return false;
  }
  const auto number = static_cast<unsigned>(segment);
  const iovec buffer{data, nbytes};
  const int result = io_uring_register_buffers_update_tag(ring_.get(), number, &buffer, nullptr, 1);
  if (result == 1) {
    segments_.resize(std::max<std::size_t>(segments_.size(), number + 1));
    segments_[number] = Segment{data, nbytes};
    return true;
  }
  switch (-result) {
    case ENOMEM:      // RLIMIT_MEMLOCK, one budget for all processes of a user; or no memory for the bookkeeping
    case EPERM:       // a security policy forbids to lock memory
    case EOPNOTSUPP:  // memory of a device driver or of a file
    case EFAULT:      // not mapped all the way
    default:          // each costs a little speed and nothing else
      any_segment_refused_ = true;
      return false;
  }
}

void UringEngine::forget_file(const os::File& file) {
  check_owner();
  files_.forget(file.fd.get());
}

bool UringEngine::is_registered(const Request& request) const {
  if (request.segment < 0 || static_cast<std::size_t>(request.segment) >= segments_.size()) {
    return false;
  }
  const Segment& segment = segments_[static_cast<std::size_t>(request.segment)];
  if (segment.data == nullptr) {
    return false;
  }
  assert(request.buffer >= segment.data && request.buffer + request.nbytes <= segment.data + segment.nbytes);
  return true;
}

// Queues an SQE for the part of a request that is not done yet.
void UringEngine::queue(std::uint32_t index) {
  Transfer& transfer = transfers_[index];
  const Request& request = transfer.request;
  const int fd = request.file->fd.get();
  if (transfer.file_slot == RegisteredFiles::kNone) {
    transfer.file_slot = files_.acquire(fd);
  }
  const bool registered_file = transfer.file_slot != RegisteredFiles::kNone;
  const int file = registered_file ? transfer.file_slot : fd;
  std::uint8_t* const buffer = request.buffer + transfer.done;
  const std::uint32_t nbytes = request.nbytes - transfer.done;
  const std::uint64_t offset = request.offset + transfer.done;
  io_uring_sqe* const sqe = io_uring_get_sqe(ring_.get());
  assert(sqe != nullptr);
  if (is_registered(request)) {
    request.write ? io_uring_prep_write_fixed(sqe, file, buffer, nbytes, offset, request.segment)
                  : io_uring_prep_read_fixed(sqe, file, buffer, nbytes, offset, request.segment);
  } else {
    request.write ? io_uring_prep_write(sqe, file, buffer, nbytes, offset)
                  : io_uring_prep_read(sqe, file, buffer, nbytes, offset);
  }
  const unsigned flags = (registered_file ? IOSQE_FIXED_FILE : 0) | (transfer.blocking ? IOSQE_ASYNC : 0);
  io_uring_sqe_set_flags(sqe, flags);
  io_uring_sqe_set_data64(sqe, index);
  ++queued_;
}

// Submits what is queued and waits for `minimum` CQEs. With DEFER_TASKRUN nothing reaches the CQ outside a call that
// asks for events, so minimum == 0 asks too. May return with SQEs still queued when completions have to be reaped
// first.
void UringEngine::enter(unsigned minimum) {
  for (unsigned attempts = 0;;) {
    const fault::Outcome outcome = fault::point("io_uring_enter", "");
    const int result = outcome.error_number != 0 ? -outcome.error_number
                       : minimum > 0             ? io_uring_submit_and_wait(ring_.get(), minimum)
                                                 : io_uring_submit_and_get_events(ring_.get());
    if (result >= 0) {
      queued_ -= static_cast<unsigned>(result);
      in_kernel_ += static_cast<unsigned>(result);
      return;
    }
    switch (-result) {
      case EINTR:  // a signal came first; nothing was submitted, so the same call again
        continue;
      case EAGAIN:  // no memory for a request just now: completions give some back
      case EBUSY:   // completions wait for room in the CQ: reap, then again
        if (make_room(attempts)) {
          return;
        }
        if (attempts < kTransientRetriesMax) {
          continue;
        }
        break;
      case EBADR:       // the kernel had no memory to keep a completion: a request will never be answered
      case ENXIO:       // the ring is being torn down
      case EEXIST:      // SINGLE_ISSUER: called by another thread, or in a forked child
      case EBADF:       // the ring's descriptor was closed by somebody else
      case EOPNOTSUPP:  // ... and its number reused
      case EBADFD:      // the ring is disabled
      case EFAULT:      // bad arguments
      case EINVAL:
      default:
        break;
    }
    broken_ = true;
    throw OsError(-result, "io_uring_enter", "");
  }
}

// After EAGAIN or EBUSY: true when there are completions to reap; false after a pause, with none to wait for.
bool UringEngine::make_room(unsigned& attempts) {
  if (io_uring_cq_ready(ring_.get()) > 0) {
    return true;
  }
  io_uring_cqe* cqe = nullptr;
  if (in_kernel_ > 0 && io_uring_wait_cqe(ring_.get(), &cqe) == 0) {
    return true;
  }
  ++attempts;
  std::this_thread::sleep_for(kBackoff);
  return false;
}

std::size_t UringEngine::reap(std::span<Completion> completions) {
  std::size_t count = 0;
  io_uring_cqe* cqe = nullptr;
  while (count < completions.size() && io_uring_cq_ready(ring_.get()) > 0 &&
         io_uring_peek_cqe(ring_.get(), &cqe) == 0) {
    // Before io_uring_cqe_seen(): afterwards the entry is the kernel's again.
    const auto index = static_cast<std::uint32_t>(cqe->user_data);
    const int result = cqe->res;
    io_uring_cqe_seen(ring_.get(), cqe);
    --in_kernel_;
    Transfer& transfer = transfers_[index];
    const std::optional<int> error_number = settle(transfer, result);
    if (!error_number.has_value()) {
      queue(index);
      continue;
    }
    if (transfer.file_slot != RegisteredFiles::kNone) {
      files_.release(transfer.file_slot);
    }
    completions[count++] = Completion{transfer.request.token, *error_number};
    free_.push_back(index);
  }
  return count;
}

// What a CQE means for its request: the error number to deliver (0: all done), or nothing: queue the rest again.
std::optional<int> UringEngine::settle(Transfer& transfer, int result) {
  const Request& request = transfer.request;
  const fault::Outcome outcome = fault::point(request.write ? "uring_write" : "uring_read", request.file->path.c_str());
  if (outcome.error_number != 0) {
    result = -outcome.error_number;
  } else if (result > 0) {
    result = static_cast<int>(std::min<std::uint64_t>(static_cast<std::uint64_t>(result), outcome.limit_nbytes));
  }
  if (result > 0) {
    if (request.write) {
      const os::journal::Change change(os::journal::Op::kWrite);
      change.done({.subject_fd = request.file->fd.get(),
                   .offset = request.offset + transfer.done,
                   .bytes = {request.buffer + transfer.done, static_cast<std::size_t>(result)}});
    }
    const std::uint32_t end = transfer.done + static_cast<std::uint32_t>(result);
    // O_DIRECT takes up again at the last whole page: a few bytes twice rather than an unaligned rest.
    const auto page_end = static_cast<std::uint32_t>(end / kPageBytes * kPageBytes);
    const bool rewind = request.file->direct && end < request.nbytes && page_end > transfer.done;
    transfer.done = rewind ? page_end : end;
    transfer.retries = 0;
    return transfer.done == request.nbytes ? std::optional<int>(0) : std::nullopt;
  }
  if (result == 0) {
    return request.write ? ENOSPC : Completion::kEndOfFile;  // a write that takes nothing has no room
  }
  switch (-result) {
    case EINTR:  // a signal or a stopped kernel worker: nothing was transferred
      return retry_is_left(transfer) ? std::nullopt : std::optional<int>(EINTR);
    case EAGAIN:  // it would have had to block the submitter (large O_DIRECT, no free tag): a kernel worker may block
      transfer.blocking = true;
      return retry_is_left(transfer) ? std::nullopt : std::optional<int>(EAGAIN);
    case EINVAL:  // O_DIRECT refused at transfer time: alignment, or a file system that only says so now
      if (!request.file->direct || transfer.direct_dropped) {
        return EINVAL;
      }
      transfer.direct_dropped = true;
      os::drop_direct(request.file->fd.get());
      return std::nullopt;
    case ECANCELED:   // the submitting thread is going away, or the ring is
    case EFAULT:      // the buffer, or the registered one, is not what it was
    case EBADF:       // the file was closed or opened the other way
    case EOPNOTSUPP:  // the file has no such operation
    case EIO:         // the device; also EREMOTEIO, ENODATA, EILSEQ and their like
    case ENOSPC:      // also EDQUOT and EFBIG
    default:          // the caller's decision: a failed write is not repeated on the same file
      return -result;
  }
}

bool UringEngine::retry_is_left(Transfer& transfer) {
  ++transfer.retries;
  if (transfer.retries > kEagerRetries) {
    std::this_thread::sleep_for(kBackoff);
  }
  return transfer.retries <= kTransientRetriesMax;
}

// Queued SQEs are never submitted: waiting calls here carry none.
void UringEngine::drain() noexcept {
  while (in_kernel_ > 0) {
    io_uring_cqe* cqe = nullptr;
    // A broken ring may have lost completions, each of a finished request: silence means that all are finished.
    __kernel_timespec silence{.tv_sec = 10, .tv_nsec = 0};
    const int result =
        broken_ ? io_uring_wait_cqe_timeout(ring_.get(), &cqe, &silence) : io_uring_wait_cqe(ring_.get(), &cqe);
    if (result == 0) {
      io_uring_cqe_seen(ring_.get(), cqe);
      --in_kernel_;
    } else if (result == -EBADR) {
      broken_ = true;
    } else if (result != -EINTR && result != -EAGAIN && result != -EBUSY) {
      return;  // ETIME after silence, or a ring that answers nothing at all
    }
  }
}

}  // namespace

std::unique_ptr<IoEngine> make_uring_engine(Rung rung, unsigned queue_depth) {
  return std::make_unique<UringEngine>(rung, queue_depth);
}

}  // namespace snapstone::io

#else

namespace snapstone::io {

std::unique_ptr<IoEngine> make_uring_engine(Rung /*rung*/, unsigned /*queue_depth*/) {
  throw OsError(ENOSYS, "io_uring_setup: built without liburing", "");
}

}  // namespace snapstone::io

#endif
