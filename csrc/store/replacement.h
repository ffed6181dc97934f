// A file of a committed checkpoint replaced by a repaired one.
//
// A damaged file is never written to: other checkpoints may have it under names of their own. The repaired one is a new
// file of a staging directory, durable before it gets the name by one rename, so that at any moment the name has the
// damaged file or the repaired one. The damaged one gets a name in the staging directory first.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "os/directory.h"

#include "store/staging.h"

namespace snapstone::store {

// The device and inode of a file.
struct Identity {
  std::uint64_t device;
  std::uint64_t inode;
};

// Gives the staging directory's file `source` the name `name` in the checkpoint, a file name or `base/` and one, and
// what had that name before the name `aside` in the staging directory. `source` keeps its name there, too, and can be
// put into other checkpoints; a file system without hard links can do neither, and there `source` moves and nothing is
// kept aside. The checkpoint is a directory that its caller opened before it looked for damage: another one that has
// taken its name since is never touched. With `damaged` what is replaced must be that file: OsError(ESTALE) where
// another repair was faster. When it returns the new name is durable.
void replace_file(const Staging& staging, const std::string& source, const os::Directory& checkpoint,
                  const std::string& name, const std::string& aside, const std::optional<Identity>& damaged);

}  // namespace snapstone::store
