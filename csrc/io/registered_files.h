// RegisteredFiles: a small table of files that the ring holds, which spares the kernel a look-up per request.
//
// Guarantees: a slot serves a descriptor only while requests use it. The caller keeps a descriptor open exactly that
//             long, so a slot never means another file than the descriptor does. An idle slot is filled anew.
// Ownership:  the kernel holds a reference to each file in the table until forget(), reuse of the slot or the
//             destructor.
// Threads:    the ring's.
// Failure:    none; where the kernel refuses, acquire() says kNone and the descriptor itself serves.
//
// Only for builds with liburing.
#pragma once

#include <array>

#include "io/ring.h"

namespace snapstone::io {

class RegisteredFiles {
 public:
  static constexpr int kNone = -1;

  explicit RegisteredFiles(Ring& ring);
  RegisteredFiles(const RegisteredFiles&) = delete;
  RegisteredFiles& operator=(const RegisteredFiles&) = delete;
  ~RegisteredFiles();  // nothing in flight

  // A slot for `fd`, or kNone; each success is paired with a release().
  int acquire(int fd);
  void release(int slot);
  // Drops the kernel's reference; no request uses `fd`.
  void forget(int fd);

 private:
  struct Slot {
    int fd = -1;
    unsigned users = 0;
  };

  io_uring* ring_;
  std::array<Slot, 8> slots_{};  // a lane works on one or two files at a time
  bool refused_;
};

}  // namespace snapstone::io
