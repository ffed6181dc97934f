// What one process has once, made at the first use; a forked child makes its own. For what holds a mutex: one that
// another thread held at the moment of a fork stays locked in the child for ever.
//
// Ownership: never destroyed, so that threads may use it while the process exits.
// Threads:   any; lock-free. A loser of the race to make it leaks its own.
#pragma once

#include <atomic>
#include <cstdint>

#include "os/process.h"

namespace snapstone::os {

template <class T>
T& per_process() {
  struct Holder {
    std::int64_t process_id;
    T* value;
  };
  static constinit std::atomic<Holder*> holder{nullptr};
  Holder* current = holder.load(std::memory_order_acquire);
  if (current != nullptr && current->process_id == process_id()) return *current->value;
  auto* fresh = new Holder{process_id(), new T()};
  if (holder.compare_exchange_strong(current, fresh)) return *fresh->value;
  return *current->value;
}

}  // namespace snapstone::os
