// The journal: every change that csrc/os/ and csrc/io/ make to a file system, in the order in which it happened, for
// tests that ask what a crash at any moment would have left (tests/crash).
//
// Off (always, outside tests): one relaxed load and a predictable branch. On: each change and its record are one step,
// in all processes that append to the same file, under a lock of that file. Only what succeeded is recorded, and syncs
// that failed. Writes are recorded with their bytes, those of io_uring when they complete.
//
// A record is a RecordHead, the two names, the bytes; in the byte order of the machine.
// Threads: any. A fork records nothing until it calls start() itself.
#pragma once

#include <atomic>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>

namespace snapstone::os::journal {

enum class Op : std::uint32_t {
  kMark = 0,       // name: what the test says of this moment
  kCreate = 1,     // subject: directory, name; object: the file
  kMkdir = 2,      // subject: directory, name; object: the new one
  kUnlink = 3,     // subject: directory, name
  kRmdir = 4,      // subject: directory, name
  kRename = 5,     // subject: directory, name -> other
  kExchange = 6,   // subject: directory, name <-> other
  kLink = 7,       // subject: directory, other; object: the file
  kWrite = 8,      // subject: file, offset, bytes
  kAllocate = 9,   // subject: file, offset: its size at least
  kTruncate = 10,  // subject: file, offset: its size
  kSync = 11,      // subject: file or directory; error
};

struct RecordHead {
  std::uint32_t op;
  std::uint32_t process;
  std::uint64_t subject;  // inode numbers
  std::uint64_t object;
  std::uint64_t offset;
  std::uint64_t nbytes;
  std::uint32_t error_number;
  std::uint16_t name_nbytes;
  std::uint16_t other_nbytes;
};
static_assert(sizeof(RecordHead) == 48);

extern std::atomic<bool> on;

// Appends to the file at `path` until stop(). Throws OsError.
void start(const std::string& path);
void stop();
void mark(const std::string& text);

// One change: made before the call, it holds the lock until it goes; done() after a success records the call.
class Change {
 public:
  explicit Change(Op op) : op_(op), held_(on.load(std::memory_order_relaxed)) {
    if (held_) [[unlikely]] {
      hold();
    }
  }
  Change(const Change&) = delete;
  Change& operator=(const Change&) = delete;
  ~Change() {
    if (held_) [[unlikely]] {
      release();
    }
  }

  struct Facts {
    int subject_fd = -1;
    int object_fd = -1;
    std::string_view name = {};
    std::string_view other = {};
    std::uint64_t offset = 0;
    std::span<const std::uint8_t> bytes = {};
    int error_number = 0;
  };
  // Keeps errno.
  void done(const Facts& facts) const {
    if (held_) [[unlikely]] {
      append(facts);
    }
  }
  bool recording() const noexcept { return held_; }

 private:
  void hold();
  void release() noexcept;
  void append(const Facts& facts) const;

  Op op_;
  bool held_;
};

}  // namespace snapstone::os::journal
