// Identity of this process, asked in one place.
#pragma once

#include <cstdint>

namespace snapstone::os {

std::uint32_t effective_uid();
std::int64_t process_id();           // changes in a forked child
void block_all_signals();            // for the calling thread: signals belong to the application's threads
void name_thread(const char* name);  // at most 15 characters; shown by top -H and debuggers

}  // namespace snapstone::os
