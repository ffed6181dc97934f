#include "pipeline/orphans.h"

#include <mutex>
#include <new>
#include <utility>
#include <vector>

#include "base/fault_hook.h"

namespace snapstone::pipeline {

void orphan(std::shared_ptr<void> object, const char* why) noexcept {
  if (fault::skipped("keep", why)) return;
  static std::mutex& mutex = *new std::mutex;
  static auto& orphans = *new std::vector<std::shared_ptr<void>>;
  try {
    const std::lock_guard lock(mutex);
    orphans.push_back(object);
  } catch (...) {
    new (std::nothrow) std::shared_ptr<void>(std::move(object));
  }
}

}  // namespace snapstone::pipeline
