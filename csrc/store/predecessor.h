// The checkpoint that another one with the same content is to replace, and it alone: what `compact` reads.
//
// Guarantee: held open, so that its inode is nobody else's: whatever has taken its place since is told from it.
// Threads:   any, but for close().
// Failure:   OsError.
#pragma once

#include <optional>
#include <string>

#include "os/directory.h"
#include "os/file.h"

namespace snapstone::store {

class Predecessor {
 public:
  // Before anything of it is read. Never through a link in the place of the checkpoint.
  static Predecessor open(const std::string& parent_path, const std::string& name);

  const os::Directory& directory() const noexcept { return directory_; }
  bool is(const std::optional<os::Entry>& entry) const noexcept;

  // What replaces it gets its owner and permissions (os/ownership.h says what is refused), and so does each file: those
  // of the file with that name, or of the manifest.
  void give_owner_to(const os::Directory& directory) const;
  void give_owner_and_mode_to(const os::Directory& directory) const;
  void give_owner_and_mode_to(const os::File& file, const std::string& name) const;

  // Gives the descriptor and its lock up; nothing else may follow.
  void close() noexcept { directory_.fd = os::UniqueFd(); }

 private:
  explicit Predecessor(os::Directory directory);

  os::Directory directory_;
  os::Entry facts_;
};

}  // namespace snapstone::store
