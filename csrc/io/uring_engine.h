// The io_uring rungs: uring-fixed (registered buffers) and uring.
//
// Guarantees: a buffer is given back (in a completion, or by the destructor) only after the kernel is done with it.
// Threads:    the thread that makes the engine makes every call and destroys it; debug builds assert it, and newer
//             kernels answer other threads with EEXIST.
// Limits:     queue_depth requests in flight; segments 0 to 1023 of at most 1 GiB each can be registered buffers.
// Fork:       the ring is not inherited by a child.
#pragma once

#include <memory>

#include "io/io_engine.h"

namespace snapstone::io {

// Throws OsError("io_uring_setup") where the process may not have a ring, ENOSYS where liburing is not built in. A
// uring-fixed engine whose kernel or memlock limit refuses registered buffers works all the same, and its rung() is
// kUring.
std::unique_ptr<IoEngine> make_uring_engine(Rung rung, unsigned queue_depth);

}  // namespace snapstone::io
