// Orphans: objects whose memory a device or the kernel may use for as long as the process lives. They are never
// destroyed, and stay reachable. `why` names the step for tests that leave it out (fault_hook.h, keep/WHY).
//
// Threads: any. Failure: none; without memory to note an object in, it is leaked.
#pragma once

#include <memory>

namespace snapstone::pipeline {

void orphan(std::shared_ptr<void> object, const char* why) noexcept;

}  // namespace snapstone::pipeline
