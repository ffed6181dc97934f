// What the file system under a directory is and can do.
#pragma once

#include <cstdint>
#include <string>

#include "os/directory.h"

namespace snapstone::os {

struct FileSystemFacts {
  std::string name;            // "ext4", "xfs", "tmpfs", ... or "0x..." of statfs f_type
  bool memory_backed = false;  // tmpfs, ramfs: O_DIRECT has no meaning
  bool network = false;        // nfs, lustre, fuse, ...: locks and boot ids of other hosts matter
  std::uint64_t device = 0;    // st_dev, key of the probe cache
  std::uint64_t free_bytes = 0;
  std::uint64_t total_bytes = 0;
};
FileSystemFacts file_system_facts(const Directory& directory);

// Alignment that O_DIRECT needs: statx(STATX_DIOALIGN) (Linux 6.1+), else max(4096, st_blksize).
std::uint64_t direct_io_alignment(int fd);

// An unnamed file (O_TMPFILE) or, where that is refused, a created and already unlinked one: for probes that leave
// nothing behind.
struct ProbeFile {
  UniqueFd fd;
  std::string path;
  bool direct = false;
};
ProbeFile open_probe_file(const Directory& directory, bool direct);

// Whether bytes can be shared in a directory, each really tried with two temporary names: OsError where they cannot.
void try_hard_link(const Directory& directory);  // one file with two names
void try_reflink(const Directory& directory);    // two files with the same blocks, by FICLONE

}  // namespace snapstone::os
