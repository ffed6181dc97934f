// The commit protocol, on every rank and on the leading rank (rank 0). A crash in steps 1 to 6 leaves a staging
// directory that reap() removes later; what the other steps leave is said with them.
//
//   1. lead: mkdir `.staging-<save_id>` (0700), flock it shared, write OWNER.
//      all, with a base: hard-link its data files into `base/`, so that it may go meanwhile.
//   2. all:  create data and index files O_EXCL|O_NOFOLLOW, write, fsync each once, close.
//   3. all:  fsync the files in `base/` that it uses: a base that was copied may never have been synced; fsync `base/`
//            and the staging directory: the entries of step 2 are durable.
//   4. all:  vote; any error or silence ends the save here and the lead discards.
//   5. lead: unlink what is in `base/` and not used, and fsync it then; check the rest; write MANIFEST.json and
//      MANIFEST.xxh128, fsync each; unlink OWNER. With a predecessor: its permissions for the directory.
//   6. lead: fsync the staging directory.
//  6b. lead, if asked to: read both manifest files past the page cache, and compare. (All ranks have done so with their
//      files between 3 and 4.)
//   7. lead: rename to the final name. THE COMMIT POINT. A crash leaves the old state or the committed one.
//            absent target: renameat2(RENAME_NOREPLACE). overwrite: renameat2(RENAME_EXCHANGE), so the old checkpoint
//            takes the staging name and either name order is a complete checkpoint. The old one is flocked before, so
//            that nobody reaps it while the exchange is not durable.
//            in the place of a predecessor (`compact`): the exchange alone, under an exclusive flock of it, when it
//            still stands there. What took its place all the same goes back, by an exchange too, and the save fails.
//            A rank that has not heard of this step by the deadline withdraws: it renames the staging directory to
//            `.trash-<save_id>`, and the lead's rename fails. Whoever renames first decides for all ranks.
//   8. lead: fsync the parent directory: the commit is durable; only now is success reported.
//   9. lead, overwrite: rename the old checkpoint to `.trash-<save_id>`, remove it. A crash leaves either, and reap()
//            removes it later.
#include "store/staging.h"

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <thread>
#include <utility>

#include "base/error.h"
#include "os/copy.h"
#include "store/names.h"

namespace snapstone::store {
namespace {

std::span<const std::uint8_t> as_bytes(const std::string& text) {
  return {reinterpret_cast<const std::uint8_t*>(text.data()), text.size()};
}

constexpr int kLockAttemptsMax = 2000;
constexpr std::chrono::milliseconds kLockPause{5};

// Another process's reap() holds the lock exclusively while it looks at the directory: without the second try this save
// would go on unlocked, and the next reap() would take it for dead.
//
// Lustre mounted without -o flock, and some FUSE file systems, have no locks. There reap() cannot take the exclusive
// one either, so it leaves every staging directory alone. ENOLCK is another matter: locks exist, and a later reap()
// may get one.
void lock_if_there_are_locks(const os::Directory& directory, bool (*try_lock)(const os::Directory&)) {
  try {
    for (int attempt = 0; attempt < kLockAttemptsMax; ++attempt) {
      if (try_lock(directory)) return;
      std::this_thread::sleep_for(kLockPause);
    }
  } catch (const OsError& error) {
    if (error.error_number() == ENOSYS || error.error_number() == EOPNOTSUPP) return;
    throw;
  }
  throw OsError(EWOULDBLOCK, "flock", directory.path);
}

// Best effort: neither staging nor trash is ever read as a checkpoint, and a later reap() tries again. Not synced, for
// the same reason.
void remove_quietly(const os::Directory& parent, const std::string& name) noexcept {
  try {
    os::remove_tree_at(parent, name);
  } catch (...) {
  }
}

constexpr const char* kAnotherStands = "replace: what was read does not stand there any more";

// Between two calls of `at`; also bounds how long one call of the kernel holds up an interrupt.
constexpr std::uint64_t kCopyBytesMax = 64ull << 20;

// Ranges that follow each other in one source as one, so that the kernel is entered once for them.
std::vector<SourceRange> merge_neighbours(std::span<const SourceRange> ranges) {
  std::vector<SourceRange> merged;
  for (const SourceRange& range : ranges) {
    if (!merged.empty() && merged.back().source == range.source &&
        merged.back().offset + merged.back().nbytes == range.offset) {
      merged.back().nbytes += range.nbytes;
    } else if (range.nbytes != 0) {
      merged.push_back(range);
    }
  }
  return merged;
}

}  // namespace

Staging::Staging(os::Directory parent, os::Directory directory, std::string save_id)
    : parent_(std::move(parent)), directory_(std::move(directory)), save_id_(std::move(save_id)) {
  // A forked child that unwinds from its copy of the save must not discard it.
  parent_.fd.keep_from_children();
  directory_.fd.keep_from_children();
}

Staging Staging::create(const std::string& parent_path, const std::string& save_id,
                        const std::vector<std::string>& boot_ids) {
  os::Directory parent = os::open_directory(parent_path);
  const std::string name = staging_name(save_id);
  std::string owners;
  for (const std::string& boot_id : boot_ids) owners += boot_id + "\n";
  os::make_directory_at(parent, name);
  try {
    os::Directory directory = os::open_directory_at(parent, name);
    lock_if_there_are_locks(directory, os::try_lock_shared);
    // Not synced: without a readable OWNER reap() goes by the directory's age.
    os::write_file(directory.fd.get(), directory.path, kOwnerName, as_bytes(owners));
    std::string id = save_id;  // before `parent` is moved from: removing the directory needs it
    return Staging(std::move(parent), std::move(directory), std::move(id));
  } catch (...) {
    remove_quietly(parent, name);
    throw;
  }
}

Staging Staging::join(const std::string& parent_path, const std::string& save_id) {
  os::Directory parent = os::open_directory(parent_path);
  os::Directory directory = os::open_directory_at(parent, staging_name(save_id));
  lock_if_there_are_locks(directory, os::try_lock_shared);
  return Staging(std::move(parent), std::move(directory), save_id);
}

void Staging::succeed(std::shared_ptr<Predecessor> predecessor) {
  // Now, and not when everything is copied: this is what may be refused. The directory stays private until step 5.
  predecessor->give_owner_to(directory_);
  predecessor_ = std::move(predecessor);
}

os::File Staging::create_file(const std::string& name, bool direct) const {
  os::File file = os::create_file(directory_.fd.get(), directory_.path, name, direct);
  if (predecessor_) predecessor_->give_owner_and_mode_to(file, name);
  return file;
}

void Staging::write_file(const std::string& name, std::span<const std::uint8_t> bytes, const char* step) const {
  os::write_durably(create_file(name, false), bytes, step);
}

std::uint64_t Staging::copy_ranges(const std::string& name, std::span<const os::File> sources,
                                   std::span<const SourceRange> ranges,
                                   const std::function<void(std::uint64_t)>& at) const {
  std::uint64_t total = 0;
  for (const SourceRange& range : ranges) total += range.nbytes;
  os::File file = create_file(name, false);
  try {
    os::preallocate(file, total);
    std::uint64_t done = 0;
    for (const auto& [source, offset, nbytes] : merge_neighbours(ranges)) {
      if (source == sources.size()) {
        done += nbytes;
        os::truncate(file, done);
        continue;
      }
      for (std::uint64_t copied = 0; copied < nbytes;) {
        const std::uint64_t count = std::min(nbytes - copied, kCopyBytesMax);
        os::copy_range(sources[source], offset + copied, file, done, count);
        copied += count;
        done += count;
        if (at) at(done);
      }
    }
    os::sync(file, "copied");
    file.fd.close(file.path);
  } catch (...) {
    try {
      os::unlink_at(directory_, name);
    } catch (const OsError&) {
      // discard() takes it away with the directory.
    }
    throw;
  }
  return total;
}

void Staging::open_shared() {
  if (shared_) return;
  try {
    os::make_directory_at(directory_, kSharedName);
  } catch (const OsError& error) {
    if (error.error_number() != EEXIST) throw;
  }
  shared_ = os::open_directory_at(directory_, kSharedName);
}

void Staging::link_shared(const std::string& checkpoint_path, std::span<const std::uint8_t> manifest_digest,
                          std::span<const SharedFile> files) {
  open_shared();
  link_shared_files(checkpoint_path, manifest_digest, files, *shared_);
}

void Staging::keep_shared(std::span<const SharedFile> files) {
  if (files.empty()) {
    shared_.reset();
    os::remove_tree_at(directory_, kSharedName);
    return;
  }
  open_shared();
  if (keep_shared_files(*shared_, files)) os::sync_directory(*shared_, "shared_kept");
}

void Staging::sync(std::span<const std::string> shared) const {
  for (const std::string& name : shared) {
    if (!shared_) throw OsError(ENOENT, "fsync", directory_.path + "/" + kSharedName + "/" + name);
    os::sync(os::open_for_read(shared_->fd.get(), shared_->path, name, false), "shared_file");
  }
  if (shared_) os::sync_directory(*shared_, "shared_entries");
  os::sync_directory(directory_, "entries");
}

void Staging::commit(std::span<const std::uint8_t> manifest, std::span<const std::uint8_t> manifest_digest,
                     const std::string& final_name, bool overwrite, bool read_back) {
  write_file(kManifestName, manifest, "manifest");
  write_file(kManifestDigestName, manifest_digest, "manifest_digest");
  os::unlink_at(directory_, kOwnerName);
  if (predecessor_) predecessor_->give_owner_and_mode_to(directory_);
  os::sync_directory(directory_, "manifest_entries");
  if (read_back) {
    this->read_back(kManifestName, manifest);
    this->read_back(kManifestDigestName, manifest_digest);
  }
  publish(final_name, overwrite);
}

void Staging::read_back(const std::string& name, std::span<const std::uint8_t> bytes) const {
  const std::vector<std::uint8_t> actual =
      os::read_file(directory_.fd.get(), directory_.path, name, bytes.size(), true);
  if (!std::ranges::equal(actual, bytes)) {
    throw CorruptError("read back after it was synced, it is not what was written", directory_.path + "/" + name,
                       CorruptError::kNoChunk);
  }
}

void Staging::publish(const std::string& final_name, bool overwrite) {
  if (predecessor_) {
    publish_in_place(final_name);
    return;
  }
  const std::string staging = staging_name(save_id_);
  std::string final_path = parent_.path + "/" + final_name;
  if (!overwrite || !os::stat_at(parent_, final_name)) {
    os::rename_noreplace(parent_, staging, final_name);
    published_ = true;
    directory_.path = std::move(final_path);
    os::sync_directory(parent_, "commit");
    return;
  }
  const os::Directory old = os::open_directory_at(parent_, final_name);
  if (!os::stat_at(old, kManifestName)) {
    throw OsError(EEXIST, "overwrite (not a checkpoint, so not replaced)", final_path);
  }
  lock_if_there_are_locks(old, os::try_lock_shared);
  os::rename_exchange(parent_, staging, final_name);
  published_ = true;
  finish_exchange(final_name);
}

void Staging::publish_in_place(const std::string& final_name) {
  const std::string staging = staging_name(save_id_);
  // A save that replaces it holds the lock shared: it has exchanged when this returns, or exchanges later, and then
  // what it replaces is this one. The rest is for what replaces without the lock.
  lock_if_there_are_locks(predecessor_->directory(), os::try_lock_exclusive);
  const auto stands = [&](const std::string& name) { return predecessor_->is(os::stat_at(parent_, name)); };
  const std::string final_path = parent_.path + "/" + final_name;
  if (!stands(final_name)) throw OsError(ESTALE, kAnotherStands, final_path);
  try {
    os::rename_exchange(parent_, staging, final_name);
  } catch (const OsError& error) {
    if (error.error_number() != ENOENT || os::stat_at(parent_, final_name)) throw;
    throw OsError(ESTALE, kAnotherStands, final_path);
  }
  published_ = true;
  if (!stands(staging)) put_back(final_name);
  finish_exchange(final_name);
}

// The exchange took something else than the predecessor: it goes back. When what is taken out then is not what was put
// there before, a newer one came in between, and goes back in turn: what was put there is what that one replaced. A
// crash before this is durable leaves what moved in under the staging name; no save does, since it waits for the lock.
void Staging::put_back(const std::string& final_name) {
  const std::string staging = staging_name(save_id_);
  const auto taken = [&] {
    const std::optional<os::Entry> entry = os::stat_at(parent_, staging);
    if (!entry) throw OsError(ENOENT, "stat", parent_.path + "/" + staging);
    return *entry;
  };
  os::Entry put = os::stat_directory(directory_);
  for (os::Entry last = taken();;) {
    os::rename_exchange(parent_, staging, final_name);
    os::Entry next = taken();
    if (next.inode == put.inode && next.device == put.device) break;
    put = std::exchange(last, std::move(next));
  }
  os::sync_directory(parent_, "exchange");
  published_ = false;
  throw OsError(ESTALE, kAnotherStands, parent_.path + "/" + final_name);
}

// Steps 8 and 9.
void Staging::finish_exchange(const std::string& final_name) {
  const std::string staging = staging_name(save_id_);
  const std::string trash = trash_name(save_id_);
  directory_.path = parent_.path + "/" + final_name;
  os::sync_directory(parent_, "exchange");
  // The new checkpoint is committed and durable: from here on nothing is a failure.
  try {
    os::rename_at(parent_, staging, trash);
  } catch (...) {
    return;
  }
  remove_quietly(parent_, trash);
}

void Staging::close() noexcept {
  shared_.reset();
  predecessor_.reset();
  directory_.fd = os::UniqueFd();
  parent_.fd = os::UniqueFd();
}

void Staging::withdraw() {
  try {
    os::rename_at(parent_, staging_name(save_id_), trash_name(save_id_));
  } catch (const OsError& error) {
    if (error.error_number() != ENOENT) throw;  // committed, discarded, or withdrawn by another rank
  }
}

void Staging::discard() noexcept {
  if (published_) return;
  try {
    const std::string staging = staging_name(save_id_);
    remove_quietly(parent_, staging);
    // A writer that has not heard yet may have made a file meanwhile. Without its OWNER, what is left of the directory
    // would be nobody's for minutes; under the other name the next reap() removes it.
    const std::string trash = trash_name(save_id_);
    os::rename_at(parent_, staging, trash);
    remove_quietly(parent_, trash);
  } catch (...) {
    // Gone, as it should be; or there is no memory for its name, and a later reap() removes it.
  }
}

}  // namespace snapstone::store
