// Descriptors that a forked child must not keep: in a child of fork() each of them becomes one of /dev/null.
//
// A child (data loader worker) may live as long as the run. With a descriptor of its own it would keep a lock on a
// staging directory after the save's death, the blocks of a checkpoint that was removed, and the memory that a ring has
// pinned; and what it does with its copy of a save, unwinding from an exception for instance, would happen to the save.
// The number stays taken, so that the copy's destructor closes nothing else.
//
// Threads: any; lock-free, so that a fork at any moment finds it whole. A descriptor that another thread opens at that
// very moment may be missed.
// Limits:  descriptors from kPrivateFdsMax on are inherited as ever.
#pragma once

namespace snapstone::os {

constexpr int kPrivateFdsMax = 1 << 16;

void keep_from_children(int fd) noexcept;
// Before the descriptor is closed: its number may be somebody else's right after.
void forget_private(int fd) noexcept;

}  // namespace snapstone::os
