// A file of a committed checkpoint replaced by a repaired one.
//
// A damaged file is never written to: other checkpoints may have it under names of their own. The repaired one is a new
// file of a staging directory, durable before it gets the name by one rename, so that at any moment the name has the
// damaged file or the repaired one. The damaged one gets a name in the staging directory first.
#pragma once

#include <cstdint>
#include <span>
#include <string>

#include "store/staging.h"

namespace snapstone::store {

// Gives the staging directory's file `source` the name `name` in the checkpoint, a file name or `base/` and one, and
// what had that name before the name `aside` in the staging directory. `source` keeps its name there, too, and can be
// put into other checkpoints; a file system without hard links can do neither, and there `source` moves and nothing is
// kept aside. `manifest_digest` is what the checkpoint's MANIFEST.xxh128 holds, empty when it has none or one of more
// than 4096 bytes: OsError(ESTALE) where another checkpoint has taken the place. When it returns the new name is
// durable.
void replace_file(const Staging& staging, const std::string& source, const std::string& checkpoint_path,
                  std::span<const std::uint8_t> manifest_digest, const std::string& name, const std::string& aside);

}  // namespace snapstone::store
