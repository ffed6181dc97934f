#include "os/process.h"

#include <pthread.h>
#include <signal.h>
#include <unistd.h>

namespace snapstone::os {

std::uint32_t effective_uid() { return ::geteuid(); }

std::int64_t process_id() { return ::getpid(); }

void block_all_signals() {
  sigset_t all;
  ::sigfillset(&all);
  ::pthread_sigmask(SIG_BLOCK, &all, nullptr);
}

void name_thread(const char* name) { ::pthread_setname_np(::pthread_self(), name); }

}  // namespace snapstone::os
