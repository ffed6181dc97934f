// Which rung a directory gets: the best one whose write, fsync and read-back work there, and why better ones were
// passed over.
//
//     uring-fixed -> uring -> threads-direct -> buffered
//
// SNAPSTONE_IO forces one (an unusable forced rung is an error). Memory-backed file systems get `buffered`. Cached by
// st_dev and SNAPSTONE_IO for the life of the process. A directory that admits no probe file (read-only, no permission)
// gets the best rung whose engine can be built: engines drop O_DIRECT where a file refuses it. A directory in which no
// rung works gets `buffered` with all reasons, and the work itself reports the error; neither verdict is cached.
//
// Threads: any; a probe holds up the others.
// Failure: OsError (statfs refused, forced rung unusable), std::invalid_argument (SNAPSTONE_IO names no rung).
#pragma once

#include <string>
#include <vector>

#include "io/io_engine.h"
#include "os/directory.h"

namespace snapstone::io {

struct RungChoice {
  Rung rung = Rung::kBuffered;
  bool forced = false;
  std::vector<std::string> reasons;  // one line per rung passed over: "uring: io_uring_setup: EPERM (...)"
};

RungChoice choose_rung(const os::Directory& directory);
// One attempt: empty when the rung works in this directory, else the reason in one line.
std::string try_rung(const os::Directory& directory, Rung rung);
bool uring_compiled_in();

}  // namespace snapstone::io
