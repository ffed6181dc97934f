#include "store/predecessor.h"

#include <utility>

#include "os/ownership.h"
#include "store/names.h"

namespace snapstone::store {

Predecessor::Predecessor(os::Directory directory)
    : directory_(std::move(directory)), facts_(os::stat_directory(directory_)) {
  directory_.fd.keep_from_children();
}

Predecessor Predecessor::open(const std::string& parent_path, const std::string& name) {
  return Predecessor(os::open_directory_at(os::open_directory(parent_path), name));
}

bool Predecessor::is(const std::optional<os::Entry>& entry) const noexcept {
  return entry && entry->inode == facts_.inode && entry->device == facts_.device;
}

void Predecessor::give_owner_to(const os::Directory& directory) const {
  os::give_owner(directory.fd.get(), directory.path, facts_);
}

// As it is now: somebody may have changed it while the copy was made.
void Predecessor::give_owner_and_mode_to(const os::Directory& directory) const {
  os::give_owner_and_mode(directory.fd.get(), directory.path, os::stat_directory(directory_));
}

void Predecessor::give_owner_and_mode_to(const os::File& file, const std::string& name) const {
  std::optional<os::Entry> model = os::stat_at(directory_, name);
  if (!model || !model->is_regular) model = os::stat_at(directory_, kManifestName);
  if (model && model->is_regular) os::give_owner_and_mode(file.fd.get(), file.path, *model);
}

}  // namespace snapstone::store
