// Fault rules for one scope, and the one check that most fault tests end in: which errno came out of a call.
#pragma once

#include <string>

#include "base/error.h"
#include "base/fault_hook.h"

namespace snapstone::testing {

class ArmedFaults {
 public:
  explicit ArmedFaults(const std::string& rules) { fault::arm(rules); }
  ~ArmedFaults() { fault::disarm(); }
  ArmedFaults(const ArmedFaults&) = delete;
  ArmedFaults& operator=(const ArmedFaults&) = delete;
};

// errno of the OsError that `function` throws; 0 when it returns.
template <class Function>
int errno_of(Function&& function) {
  try {
    function();
  } catch (const OsError& error) {
    return error.error_number();
  }
  return 0;
}

}  // namespace snapstone::testing
