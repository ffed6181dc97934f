#include "store/replacement.h"

#include <cerrno>
#include <optional>

#include "base/error.h"
#include "os/directory.h"
#include "store/names.h"

namespace snapstone::store {
namespace {

os::Directory open_base(const os::Directory& checkpoint) {
  if (!os::stat_at(checkpoint, kSharedName)) {
    os::make_directory_at(checkpoint, kSharedName);
    os::sync_directory(checkpoint, "repaired_base");
  }
  return os::open_directory_at(checkpoint, kSharedName);
}

// False where files cannot have several names.
bool link_if_there_are_links(const os::Directory& from_parent, const std::string& from, const os::Directory& to_parent,
                             const std::string& to) {
  try {
    os::link_at(from_parent, from, to_parent, to);
    return true;
  } catch (const OsError& error) {
    const int number = error.error_number();
    if (number == EPERM || number == EOPNOTSUPP || number == ENOSYS || number == EMLINK) return false;
    throw;
  }
}

}  // namespace

void replace_file(const Staging& staging, const std::string& source, const os::Directory& checkpoint,
                  const std::string& name, const std::string& aside, const std::optional<Identity>& damaged) {
  const std::string prefix = std::string(kSharedName) + "/";
  const bool in_base = name.starts_with(prefix);
  const std::string component = in_base ? name.substr(prefix.size()) : name;
  const std::optional<os::Directory> base = in_base ? std::optional(open_base(checkpoint)) : std::nullopt;
  const os::Directory& directory = base ? *base : checkpoint;
  const std::optional<os::Entry> there = os::stat_at(directory, component);
  if (damaged && (!there || there->device != damaged->device || there->inode != damaged->inode)) {
    throw OsError(ESTALE, "repair: another file stands there", directory.path + "/" + component);
  }
  if (there) {
    link_if_there_are_links(directory, component, staging.directory(), aside);
  }
  const std::string placed = aside + ".placed";
  const bool linked = link_if_there_are_links(staging.directory(), source, staging.directory(), placed);
  os::rename_at(staging.directory(), linked ? placed : source, directory, component);
  os::sync_directory(directory, "repaired_entry");
}

}  // namespace snapstone::store
