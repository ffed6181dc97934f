#include "store/replacement.h"

#include <algorithm>
#include <cerrno>
#include <optional>
#include <vector>

#include "base/error.h"
#include "os/directory.h"
#include "os/file.h"
#include "store/names.h"

namespace snapstone::store {
namespace {

constexpr std::uint64_t kDigestBytesMax = 4096;

std::vector<std::uint8_t> manifest_digest_in(const os::Directory& checkpoint) {
  try {
    return os::read_file(checkpoint.fd.get(), checkpoint.path, kManifestDigestName, kDigestBytesMax);
  } catch (const OsError& error) {
    if (error.error_number() == ENOENT) return {};
    throw;
  } catch (const CorruptError&) {
    return {};  // larger than any: no checkpoint's
  }
}

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

void replace_file(const Staging& staging, const std::string& source, const std::string& checkpoint_path,
                  std::span<const std::uint8_t> manifest_digest, const std::string& name, const std::string& aside) {
  const os::Directory checkpoint = os::open_directory(checkpoint_path);
  if (!std::ranges::equal(manifest_digest_in(checkpoint), manifest_digest)) {
    throw OsError(ESTALE, "repair: another checkpoint stands there", checkpoint.path);
  }
  const std::string prefix = std::string(kSharedName) + "/";
  const bool in_base = name.starts_with(prefix);
  const std::string component = in_base ? name.substr(prefix.size()) : name;
  const std::optional<os::Directory> base = in_base ? std::optional(open_base(checkpoint)) : std::nullopt;
  const os::Directory& directory = base ? *base : checkpoint;
  if (os::stat_at(directory, component)) {
    link_if_there_are_links(directory, component, staging.directory(), aside);
  }
  const std::string placed = aside + ".placed";
  const bool linked = link_if_there_are_links(staging.directory(), source, staging.directory(), placed);
  os::rename_at(staging.directory(), linked ? placed : source, directory, component);
  os::sync_directory(directory, "repaired_entry");
}

}  // namespace snapstone::store
