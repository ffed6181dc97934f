#include "os/directory.h"

#include <dirent.h>
#include <fcntl.h>
#include <stdio.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <memory>

#include "base/error.h"
#include "os/call.h"
#include "os/journal.h"

namespace snapstone::os {
namespace {

constexpr mode_t kDirectoryMode = 0700;
constexpr mode_t kPublicDirectoryMode = 0777;
constexpr mode_t kModeMask = 07777;
// A checkpoint is three levels deep. Each level holds one descriptor and one stack frame, so a hostile tree must not
// choose the depth.
constexpr int kTreeDepthMax = 64;

Directory open_at(int parent_fd, const char* name, int flags, std::string path) {
  Directory directory;
  directory.path = std::move(path);
  directory.fd = UniqueFd(call("open", directory.path,
                               [&] { return ::openat(parent_fd, name, O_RDONLY | O_DIRECTORY | O_CLOEXEC | flags); }));
  if (!directory.fd) {
    throw OsError(errno, "open", directory.path);
  }
  return directory;
}

void unlink_component(const Directory& parent, const std::string& name, bool directory) {
  const char* verb = directory ? "rmdir" : "unlink";
  const std::string path = component_path(verb, parent.path, name);
  const journal::Change change(directory ? journal::Op::kRmdir : journal::Op::kUnlink);
  if (call(verb, path, [&] { return ::unlinkat(parent.fd.get(), name.c_str(), directory ? AT_REMOVEDIR : 0); }) != 0) {
    throw OsError(errno, verb, path);
  }
  change.done({.subject_fd = parent.fd.get(), .name = name});
}

int rename_with_flags(const Directory& parent, const std::string& from, const std::string& to, unsigned flags) {
  const std::string path = component_path("renameat2", parent.path, to);
  component_path("renameat2", parent.path, from);
  const int fd = parent.fd.get();
  const journal::Change change(flags == RENAME_EXCHANGE ? journal::Op::kExchange : journal::Op::kRename);
  if (call("renameat2", path, [&] { return ::renameat2(fd, from.c_str(), fd, to.c_str(), flags); }) != 0) {
    return errno;
  }
  change.done({.subject_fd = fd, .name = from, .other = to});
  return 0;
}

Entry to_entry(const std::string& name, const struct stat& facts) {
  constexpr std::int64_t kNsPerSecond = 1'000'000'000;
  return {.name = name,
          .is_directory = S_ISDIR(facts.st_mode),
          .is_regular = S_ISREG(facts.st_mode),
          .owner_uid = facts.st_uid,
          .owner_gid = facts.st_gid,
          .mode = facts.st_mode & kModeMask,
          .device = facts.st_dev,
          .inode = facts.st_ino,
          .nbytes = static_cast<std::uint64_t>(facts.st_size),
          .modified_ns = facts.st_mtim.tv_sec * kNsPerSecond + facts.st_mtim.tv_nsec};
}

std::vector<std::string> list_names(const Directory& directory) {
  struct CloseDirectory {
    void operator()(DIR* stream) const noexcept { ::closedir(stream); }
  };
  // A descriptor of its own: the position of a listing belongs to the open description.
  Directory own = open_at(directory.fd.get(), ".", 0, directory.path);
  DIR* opened = nullptr;
  if (call("opendir", own.path, [&] { return (opened = ::fdopendir(own.fd.get())) == nullptr ? -1 : 0; }) != 0) {
    throw OsError(errno, "opendir", own.path);
  }
  const std::unique_ptr<DIR, CloseDirectory> stream(opened);
  own.fd.release();
  std::vector<std::string> names;
  for (;;) {
    const struct dirent* found = nullptr;
    const int result = call("readdir", own.path, [&] {
      errno = 0;
      found = ::readdir(stream.get());
      return found == nullptr && errno != 0 ? -1 : 0;
    });
    if (result != 0) {
      throw OsError(errno, "readdir", own.path);
    }
    if (found == nullptr) {
      break;
    }
    std::string name = found->d_name;
    if (name != "." && name != "..") {
      names.push_back(std::move(name));
    }
  }
  std::sort(names.begin(), names.end());
  return names;
}

// ENOENT is success everywhere: another cleaner may be at the same tree.
template <class Function>
void unless_absent(Function&& function) {
  try {
    function();
  } catch (const OsError& error) {
    if (error.error_number() != ENOENT) {
      throw;
    }
  }
}

void remove_tree(const Directory& parent, const std::string& name, int depth) {
  if (depth > kTreeDepthMax) {
    throw OsError(ENAMETOOLONG, "rmdir: tree is too deep", parent.path);
  }
  {
    const Directory tree = open_directory_at(parent, name);
    for (const Entry& entry : list_directory(tree)) {
      unless_absent([&] {
        if (entry.is_directory) {
          remove_tree(tree, entry.name, depth + 1);
        } else {
          unlink_at(tree, entry.name);
        }
      });
    }
  }
  unlink_component(parent, name, true);
}

bool try_lock(const Directory& directory, int operation) {
  directory.fd.keep_from_children();  // a lock belongs to all copies of the descriptor
  if (call("flock", directory.path, [&] { return ::flock(directory.fd.get(), operation | LOCK_NB); }) == 0) {
    return true;
  }
  if (errno == EWOULDBLOCK) {
    return false;
  }
  throw OsError(errno, "flock", directory.path);
}

}  // namespace

Directory open_directory(const std::string& path) { return open_at(AT_FDCWD, path.c_str(), 0, path); }

Directory open_directory_again(int fd, const std::string& path) { return open_at(fd, ".", 0, path); }

Directory open_directory_at(const Directory& parent, const std::string& name) {
  return open_at(parent.fd.get(), name.c_str(), O_NOFOLLOW, component_path("open", parent.path, name));
}

void make_directory_at(const Directory& parent, const std::string& name, bool private_one) {
  const std::string path = component_path("mkdir", parent.path, name);
  const mode_t mode = private_one ? kDirectoryMode : kPublicDirectoryMode;
  const journal::Change change(journal::Op::kMkdir);
  if (call("mkdir", path, [&] { return ::mkdirat(parent.fd.get(), name.c_str(), mode); }) != 0) {
    throw OsError(errno, "mkdir", path);
  }
  change.done({.subject_fd = parent.fd.get(), .name = name});
}

void sync_directory(const Directory& directory, const char* step) {
  if (fault::skipped("sync", step)) return;
  const journal::Change change(journal::Op::kSync);
  const int error_number = call("fsync", directory.path, [&] { return ::fsync(directory.fd.get()); }) == 0 ? 0 : errno;
  change.done({.subject_fd = directory.fd.get(), .error_number = error_number});
  if (error_number != 0) {
    throw OsError(error_number, "fsync", directory.path);
  }
}

void rename_at(const Directory& parent, const std::string& from, const std::string& to) {
  rename_at(parent, from, parent, to);
}

void rename_at(const Directory& from_parent, const std::string& from, const Directory& to_parent,
               const std::string& to) {
  const std::string path = component_path("rename", to_parent.path, to);
  component_path("rename", from_parent.path, from);
  const int from_fd = from_parent.fd.get();
  const int to_fd = to_parent.fd.get();
  const journal::Change change(journal::Op::kRename);
  if (call("rename", path, [&] { return ::renameat(from_fd, from.c_str(), to_fd, to.c_str()); }) != 0) {
    throw OsError(errno, "rename", path);
  }
  change.done({.subject_fd = from_fd, .object_fd = from_fd == to_fd ? -1 : to_fd, .name = from, .other = to});
}

void rename_noreplace(const Directory& parent, const std::string& from, const std::string& to) {
  const int error_number = rename_with_flags(parent, from, to, RENAME_NOREPLACE);
  if (error_number == 0) {
    return;
  }
  const std::string path = parent.path + "/" + to;
  if (error_number != EINVAL && error_number != ENOSYS) {
    throw OsError(error_number, "renameat2", path);
  }
  // No flags here (NFS, some FUSE). Looking first covers files and empty directories, which rename would replace; what
  // appears in between is stopped by rename itself if it is a directory with something in it.
  if (stat_at(parent, to)) {
    throw OsError(EEXIST, "rename", path);
  }
  try {
    rename_at(parent, from, to);
  } catch (const OsError& error) {
    if (error.error_number() == ENOTEMPTY) {
      throw OsError(EEXIST, "rename", path);
    }
    throw;
  }
}

void rename_exchange(const Directory& parent, const std::string& a, const std::string& b) {
  const int error_number = rename_with_flags(parent, a, b, RENAME_EXCHANGE);
  if (error_number != 0) {
    throw OsError(error_number == ENOSYS ? EINVAL : error_number, "renameat2", parent.path + "/" + b);
  }
}

void unlink_at(const Directory& parent, const std::string& name) { unlink_component(parent, name, false); }

void link_at(const Directory& from_parent, const std::string& from, const Directory& to_parent, const std::string& to) {
  const std::string path = component_path("link", to_parent.path, to);
  component_path("link", from_parent.path, from);
  const journal::Change change(journal::Op::kLink);
  const int result = call(
      "link", path, [&] { return ::linkat(from_parent.fd.get(), from.c_str(), to_parent.fd.get(), to.c_str(), 0); });
  if (result != 0) {
    throw OsError(errno, "link", path);
  }
  change.done({.subject_fd = to_parent.fd.get(), .name = from, .other = to});
}

std::vector<Entry> list_directory(const Directory& directory) {
  std::vector<Entry> entries;
  for (const std::string& name : list_names(directory)) {
    if (auto entry = stat_at(directory, name)) {  // gone since readdir: not an entry any more
      entries.push_back(std::move(*entry));
    }
  }
  return entries;
}

std::optional<Entry> stat_at(const Directory& parent, const std::string& name) {
  const std::string path = component_path("stat", parent.path, name);
  struct stat facts{};
  if (call("stat", path, [&] { return ::fstatat(parent.fd.get(), name.c_str(), &facts, AT_SYMLINK_NOFOLLOW); }) == 0) {
    return to_entry(name, facts);
  }
  if (errno == ENOENT) {
    return std::nullopt;
  }
  throw OsError(errno, "stat", path);
}

Entry stat_directory(const Directory& directory) {
  struct stat facts{};
  if (call("fstat", directory.path, [&] { return ::fstat(directory.fd.get(), &facts); }) != 0) {
    throw OsError(errno, "fstat", directory.path);
  }
  return to_entry(".", facts);
}

void remove_tree_at(const Directory& parent, const std::string& name) {
  unless_absent([&] { remove_tree(parent, name, 1); });
}

bool try_lock_shared(const Directory& directory) { return try_lock(directory, LOCK_SH); }

bool try_lock_exclusive(const Directory& directory) { return try_lock(directory, LOCK_EX); }

std::string boot_id() {
  std::string id;
  const UniqueFd fd(::open("/proc/sys/kernel/random/boot_id", O_RDONLY | O_CLOEXEC));
  char text[64];
  const ssize_t count = fd ? ::read(fd.get(), text, sizeof text) : 0;
  for (ssize_t i = 0; i < count; ++i) {
    if ((text[i] >= '0' && text[i] <= '9') || (text[i] >= 'a' && text[i] <= 'f')) {
      id += text[i];
    }
  }
  return id;
}

}  // namespace snapstone::os
