// Ring: one io_uring, set up with the best flags that this kernel knows, torn down by the destructor.
//
// Threads: with Linux 6.0 and later only the thread that made it may use it (SINGLE_ISSUER); others get EEXIST.
// Fork:    a child inherits neither the memory of the ring nor its descriptor.
// Failure: the constructor throws OsError("io_uring_setup").
//
// Only for builds with liburing.
#pragma once

#include <liburing.h>

namespace snapstone::io {

class Ring {
 public:
  explicit Ring(unsigned entries);
  Ring(const Ring&) = delete;
  Ring& operator=(const Ring&) = delete;
  ~Ring();

  io_uring* get() noexcept { return &ring_; }

 private:
  int setup(unsigned entries, unsigned flags) noexcept;

  io_uring ring_{};
};

}  // namespace snapstone::io
