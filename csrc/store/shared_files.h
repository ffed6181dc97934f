// Shared files: data files of an earlier checkpoint, hard-linked into the staging directory of a later one.
//
// Guarantee: after link_shared_files() each name is the file that the named checkpoint has: the directory is held open,
//            so that a checkpoint which takes its place meanwhile is another directory, and its manifest is the one
//            that the caller has read. The link keeps the bytes, whatever becomes of the earlier checkpoint.
// Failure:   OsError: ESTALE if another checkpoint stands there, EXDEV, EPERM, EOPNOTSUPP or EMLINK where the file
//            system cannot link them, ENOENT if it is being removed. CorruptError for a file of another size.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "os/directory.h"

namespace snapstone::store {

struct SharedFile {
  bool in_base;  // of the earlier checkpoint: the file is a shared one there, too
  std::string source;
  std::string name;  // of the link
  std::uint64_t nbytes;
};

// `manifest_digest`: what the earlier checkpoint's MANIFEST.xxh128 must hold. Another writer may have made a link.
void link_shared_files(const std::string& checkpoint_path, std::span<const std::uint8_t> manifest_digest,
                       std::span<const SharedFile> files, const os::Directory& target);
// Removes every other name, and says whether there was one; OsError(ENOENT), CorruptError if one of the files is not
// there as it should be.
bool keep_shared_files(const os::Directory& directory, std::span<const SharedFile> files);

}  // namespace snapstone::store
