// May this process have an io_uring at all? Asked without risk: a seccomp filter can kill whoever makes the call.
#pragma once

#include <string>

namespace snapstone::io {

// Empty, or why not: "io_uring_setup: EPERM (kernel.io_uring_disabled=2)". Asked once per process; threads: any.
std::string ring_permission();
// An errno of io_uring_setup with its likely cause: "EPERM (kernel.io_uring_disabled=2)".
std::string ring_refusal(int error_number);
// "ENOSPC"; "errno 4242" for one without a name here.
std::string error_name(int error_number);

}  // namespace snapstone::io
