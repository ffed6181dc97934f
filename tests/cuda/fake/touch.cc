// Says whose memory it was when the host touches what it must not, before the process dies of it as it would have.
#include <signal.h>
#include <unistd.h>

#include <cstring>

#include "call.h"

namespace fakecuda {
namespace {

struct sigaction previous[2];
constexpr int kSignals[2] = {SIGSEGV, SIGBUS};

void say(const char* text) { [[maybe_unused]] const auto ignored = ::write(STDERR_FILENO, text, std::strlen(text)); }

void touched(int signal, siginfo_t* info, void*) {
  World& world = World::get();
  const auto address = reinterpret_cast<std::uint64_t>(info->si_addr);
  // The lock may be held by whoever died here: what is read is right as long as nothing else goes on.
  if (world.memory != nullptr && world.memory->is_device(address)) {
    say("fakecuda: the host touched device memory\n");
  } else if (world.host != nullptr && world.host->guards(address)) {
    say("fakecuda: the host touched memory that a copy is in flight to or from\n");
  }
  // The instruction runs again, and meets whoever was here before.
  ::sigaction(signal, &previous[signal == kSignals[0] ? 0 : 1], nullptr);
}

}  // namespace

void watch_touches() {
  struct sigaction action{};
  action.sa_sigaction = touched;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  for (int i = 0; i < 2; ++i) ::sigaction(kSignals[i], &action, &previous[i]);
}

}  // namespace fakecuda
