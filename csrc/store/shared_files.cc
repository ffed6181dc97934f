#include "store/shared_files.h"

#include <algorithm>
#include <cerrno>
#include <optional>

#include "base/error.h"
#include "os/file.h"
#include "store/names.h"

namespace snapstone::store {
namespace {

constexpr std::uint64_t kDigestBytesMax = 4096;

os::Entry checked(const os::Directory& directory, const std::string& name, std::uint64_t nbytes) {
  const std::optional<os::Entry> entry = os::stat_at(directory, name);
  if (!entry) throw OsError(ENOENT, "shared file", directory.path + "/" + name);
  if (!entry->is_regular) throw OsError(EINVAL, "shared file: not a regular file", directory.path + "/" + name);
  if (entry->nbytes != nbytes) {
    throw CorruptError("shared file has the wrong size", directory.path + "/" + name, CorruptError::kNoChunk,
                       std::to_string(nbytes) + " bytes", std::to_string(entry->nbytes) + " bytes");
  }
  return *entry;
}

void link(const os::Directory& source, const SharedFile& file, const os::Directory& target) {
  const os::Entry wanted = checked(source, file.source, file.nbytes);
  try {
    os::link_at(source, file.source, target, file.name);
  } catch (const OsError& error) {
    if (error.error_number() != EEXIST) throw;  // another rank of this save was first
  }
  const os::Entry linked = checked(target, file.name, file.nbytes);
  if (linked.device != wanted.device || linked.inode != wanted.inode) {
    throw OsError(ESTALE, "link: another file has the name", target.path + "/" + file.name);
  }
}

}  // namespace

void link_shared_files(const std::string& checkpoint_path, std::span<const std::uint8_t> manifest_digest,
                       std::span<const SharedFile> files, const os::Directory& target) {
  const os::Directory checkpoint = os::open_directory(checkpoint_path);
  const auto digest = os::read_file(checkpoint.fd.get(), checkpoint.path, kManifestDigestName, kDigestBytesMax);
  if (!std::ranges::equal(digest, manifest_digest)) {
    throw OsError(ESTALE, "link: another checkpoint stands there", checkpoint.path);
  }
  std::optional<os::Directory> base;
  for (const SharedFile& file : files) {
    if (file.in_base && !base) base = os::open_directory_at(checkpoint, kSharedName);
    link(file.in_base ? *base : checkpoint, file, target);
  }
}

bool keep_shared_files(const os::Directory& directory, std::span<const SharedFile> files) {
  bool removed = false;
  for (const os::Entry& entry : os::list_directory(directory)) {
    if (std::ranges::any_of(files, [&](const SharedFile& file) { return file.name == entry.name; })) continue;
    os::unlink_at(directory, entry.name);
    removed = true;
  }
  for (const SharedFile& file : files) checked(directory, file.name, file.nbytes);
  return removed;
}

}  // namespace snapstone::store
