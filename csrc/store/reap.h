// reap(): removes what dead saves left in a run directory.
//
// Guarantee: touches only `.staging-<save_id>` and `.trash-<save_id>` directories (by lstat, never a link) of this
//            user. A staging directory goes only when provably dead: its flock can be taken exclusively, so no process
//            of this host writes into it, and every host that does is this one in this boot, or the file system is
//            known to be local to this host. Without a readable OWNER (a crash in the first moments) its time must
//            also be ten minutes from now, before or, of a clock that went wrong, after.
// Failure:   never throws for a leftover that cannot be removed; it stays for the next save.
#pragma once

#include <string>
#include <vector>

namespace snapstone::store {

// Names removed.
std::vector<std::string> reap(const std::string& parent_path);

}  // namespace snapstone::store
