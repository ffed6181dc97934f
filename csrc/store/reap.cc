#include "store/reap.h"

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <optional>

#include "base/error.h"
#include "os/directory.h"
#include "os/file.h"
#include "os/file_system.h"
#include "os/process.h"
#include "store/names.h"

namespace snapstone::store {
namespace {

constexpr std::int64_t kOwnerlessAgeNs = 600'000'000'000;
constexpr std::uint64_t kOwnerBytesMax = 1 << 20;

std::int64_t realtime_ns() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::system_clock::now().time_since_epoch())
      .count();
}

enum class Owners { kThisBoot, kOthers, kUnknown };

Owners owners_of(const os::Directory& staging) {
  try {
    const auto bytes = os::read_file(staging.fd.get(), staging.path, kOwnerName, kOwnerBytesMax);
    const std::string mine = os::boot_id() + "\n";
    if (bytes.empty() || mine.size() == 1 || bytes.size() % mine.size() != 0)
      return bytes.empty() ? Owners::kUnknown : Owners::kOthers;
    for (std::size_t at = 0; at < bytes.size(); at += mine.size()) {
      if (!std::equal(mine.begin(), mine.end(), bytes.begin() + static_cast<std::ptrdiff_t>(at)))
        return Owners::kOthers;
    }
    return Owners::kThisBoot;
  } catch (const std::exception&) {
    return Owners::kUnknown;
  }
}

// Other hosts may write here too: what we do not know by name counts as shared.
bool may_be_shared(const os::FileSystemFacts& facts) { return facts.network || facts.name.starts_with("0x"); }

bool owners_are_dead(const os::Directory& staging, const os::Entry& facts, bool shared) {
  switch (owners_of(staging)) {
    case Owners::kThisBoot:
      return true;
    case Owners::kOthers:
      return !shared;  // a local file system has no other host: those owners ended with an earlier boot
    case Owners::kUnknown:
      // A time in the future is that of a clock that was wrong then or is now: no reason to wait for it.
      return !shared && std::abs(realtime_ns() - facts.modified_ns) > kOwnerlessAgeNs;
  }
  return false;
}

// The staging directory, locked, if nobody alive writes into it. What its name meant when it was listed does not count:
// an overwrite may have given the name to another directory since.
std::optional<os::Directory> lock_if_dead(const os::Directory& parent, const std::string& name, bool shared) {
  os::Directory staging = os::open_directory_at(parent, name);
  if (!os::try_lock_exclusive(staging)) return std::nullopt;
  const os::Entry locked = os::stat_directory(staging);
  const std::optional<os::Entry> named = os::stat_at(parent, name);
  if (!named || locked.inode != named->inode || !owners_are_dead(staging, locked, shared)) return std::nullopt;
  return staging;
}

}  // namespace

std::vector<std::string> reap(const std::string& parent_path) {
  std::vector<std::string> removed;
  const os::Directory parent = os::open_directory(parent_path);
  const bool shared = may_be_shared(os::file_system_facts(parent));
  for (const os::Entry& entry : os::list_directory(parent)) {
    const bool staging = is_staging_name(entry.name);
    if (!entry.is_directory || entry.owner_uid != os::effective_uid() || !(staging || is_trash_name(entry.name)))
      continue;
    try {
      std::optional<os::Directory> held;
      if (staging && !(held = lock_if_dead(parent, entry.name, shared))) continue;
      // An overwrite whose last sync failed leaves the old checkpoint here: the swap of names must be durable first.
      os::sync_directory(parent, "reap");
      os::remove_tree_at(parent, entry.name);
      removed.push_back(entry.name);
    } catch (const OsError&) {
      continue;
    }
  }
  return removed;
}

}  // namespace snapstone::store
