// Directories: the calls a commit is made of. Same rules as file.h: seam first, EINTR loop, OsError.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "os/file.h"
#include "os/unique_fd.h"

namespace snapstone::os {

struct Directory {
  UniqueFd fd;
  std::string path;
};

Directory open_directory(const std::string& path);                // O_DIRECTORY; follows links: the user's own path
Directory open_directory_again(int fd, const std::string& path);  // the one that `fd` has open; `path` for errors
Directory open_directory_at(const Directory& parent, const std::string& name);  // O_DIRECTORY|O_NOFOLLOW
// mkdirat, 0700 or for others too as the umask says; EEXIST throws.
void make_directory_at(const Directory& parent, const std::string& name, bool private_one = true);
// fsync; `step` as for sync().
void sync_directory(const Directory& directory, const char* step = kUnnamedStep);
void rename_at(const Directory& parent, const std::string& from, const std::string& to);  // renameat: replaces
void rename_at(const Directory& from_parent, const std::string& from, const Directory& to_parent,
               const std::string& to);
// RENAME_NOREPLACE where the file system has it. Elsewhere plain rename, which cannot replace a non-empty directory.
// EEXIST or ENOTEMPTY (reported as EEXIST) when `to` is there.
void rename_noreplace(const Directory& parent, const std::string& from, const std::string& to);
void rename_exchange(const Directory& parent, const std::string& a,
                     const std::string& b);  // RENAME_EXCHANGE; EINVAL where absent
void unlink_at(const Directory& parent, const std::string& name);
void link_at(const Directory& from_parent, const std::string& from, const Directory& to_parent, const std::string& to);

struct Entry {
  std::string name;
  bool is_directory;  // by lstat: false for a symbolic link to one
  bool is_regular;
  std::uint32_t owner_uid;
  std::uint32_t owner_gid;
  std::uint32_t mode;  // the lower twelve bits
  std::uint64_t device;
  std::uint64_t inode;
  std::uint64_t nbytes;
  std::int64_t modified_ns;  // CLOCK_REALTIME of the file server
};
std::vector<Entry> list_directory(const Directory& directory);                   // without "." and ".."; sorted by name
std::optional<Entry> stat_at(const Directory& parent, const std::string& name);  // lstat; nullopt if absent
Entry stat_directory(const Directory& directory);                                // fstat; the name is "."

// Removes a directory tree by descriptors (openat O_NOFOLLOW, unlinkat): never leaves the tree, never follows a link.
void remove_tree_at(const Directory& parent, const std::string& name);

// flock on the directory itself. try_lock_* return false when another open description holds a conflicting lock.
bool try_lock_shared(const Directory& directory);
bool try_lock_exclusive(const Directory& directory);

// Identity of this boot of this host, as a hex digest (never the host name itself); empty when unknown.
std::string boot_id();

}  // namespace snapstone::os
