#if SNAPSTONE_HAVE_LIBURING

#include "io/registered_files.h"

#include <cassert>

namespace snapstone::io {

RegisteredFiles::RegisteredFiles(Ring& ring)
    : ring_(ring.get()), refused_(io_uring_register_files_sparse(ring_, static_cast<unsigned>(slots_.size())) != 0) {}

RegisteredFiles::~RegisteredFiles() {
  if (!refused_) {
    io_uring_unregister_files(ring_);  // closing the ring would do it later, in a kernel worker
  }
}

int RegisteredFiles::acquire(int fd) {
  if (refused_) {
    return kNone;
  }
  int idle = kNone;
  for (int slot = 0; slot < static_cast<int>(slots_.size()); ++slot) {
    Slot& candidate = slots_[static_cast<std::size_t>(slot)];
    if (candidate.users > 0 && candidate.fd == fd) {
      ++candidate.users;
      return slot;
    }
    if (candidate.users == 0 && (idle == kNone || candidate.fd == fd)) {
      idle = slot;
    }
  }
  if (idle == kNone) {
    return kNone;
  }
  slots_[static_cast<std::size_t>(idle)] = Slot{};
  if (io_uring_register_files_update(ring_, static_cast<unsigned>(idle), &fd, 1) != 1) {
    return kNone;  // the descriptor itself serves, or gets the request its EBADF
  }
  slots_[static_cast<std::size_t>(idle)] = Slot{fd, 1};
  return idle;
}

void RegisteredFiles::release(int slot) {
  assert(slots_[static_cast<std::size_t>(slot)].users > 0);
  --slots_[static_cast<std::size_t>(slot)].users;
}

void RegisteredFiles::forget(int fd) {
  for (unsigned slot = 0; slot < slots_.size(); ++slot) {
    if (fd >= 0 && slots_[slot].fd == fd) {
      assert(slots_[slot].users == 0);
      const int empty = -1;
      io_uring_register_files_update(ring_, slot, &empty, 1);
      slots_[slot] = Slot{};
    }
  }
}

}  // namespace snapstone::io

#endif
