// Whose a file or directory is and who may use it: taken from one, given to another. Same rules as file.h.
#pragma once

#include <string>

#include "os/directory.h"

namespace snapstone::os {

// Owner and group of `model`. OsError if the owner is another one and this process may not give files to it. A group
// that this process may not give is left: returns false.
bool give_owner(int fd, const std::string& path, const Entry& model);
// Owner, group and permissions of `model`, set-user-id and the like only for directories. Without its group, the group
// that it has gets what everybody has. Permissions that this process may not give are left.
void give_owner_and_mode(int fd, const std::string& path, const Entry& model);

}  // namespace snapstone::os
