// Staging: one save's directory, from creation to the commit point.
//
// Guarantee: until commit() renames, no reader sees anything of this save; when commit() returns, the checkpoint is
//            complete and durable under its final name. A crash at any moment leaves the previous state or the
//            committed one, and a `.staging-` or `.trash-` directory at most.
// Ownership: holds the directory open with a shared flock, which tells reap() that the save is alive.
// Threads:   create_file(), write_file() and copy_ranges() from any thread; the rest from one at a time.
// Failure:   OsError. If step 8 is what failed, the new checkpoint is in place but may not survive a crash; with
//            overwrite the old one keeps the staging name, untouched. discard() is best effort and noexcept; after the
//            rename it does nothing.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "os/directory.h"
#include "os/file.h"
#include "store/predecessor.h"
#include "store/shared_files.h"

namespace snapstone::store {

// Bytes of a file that was written before: `source` counts in the list given with it. One past its end means zeros.
struct SourceRange {
  std::uint64_t source;
  std::uint64_t offset;
  std::uint64_t nbytes;
};

class Staging {
 public:
  // The writer that leads: makes the directory and records the boots of all hosts that write into it (see reap.h).
  static Staging create(const std::string& parent_path, const std::string& save_id,
                        const std::vector<std::string>& boot_ids);
  // Every other writer. OsError(ENOENT) while a network file system does not show the directory yet: call again.
  static Staging join(const std::string& parent_path, const std::string& save_id);

  // The lead, before it creates files: commit() puts this save in the place of that checkpoint, whatever `overwrite`
  // says, or throws OsError(ESTALE) if something else stands there, or nothing. OsError(EPERM) if this process may not
  // make files of its owner's.
  void succeed(std::shared_ptr<Predecessor> predecessor);

  const std::string& save_id() const noexcept { return save_id_; }
  const std::string& path() const noexcept { return directory_.path; }
  const os::Directory& directory() const noexcept { return directory_; }

  os::File create_file(const std::string& name, bool direct) const;
  void write_file(const std::string& name, std::span<const std::uint8_t> bytes,
                  const char* step = os::kUnnamedStep) const;  // durable but for the directory entry
  // A file of the ranges' bytes, one range after the other; returns its size. Durable but for the directory entry.
  // Calls `at` with the bytes copied so far, after each 64 MiB at the latest; what it throws ends the copy. On failure
  // the file is removed again.
  std::uint64_t copy_ranges(const std::string& name, std::span<const os::File> sources,
                            std::span<const SourceRange> ranges,
                            const std::function<void(std::uint64_t)>& at = {}) const;
  // Links data files of an earlier checkpoint into `base/`; see shared_files.h.
  void link_shared(const std::string& checkpoint_path, std::span<const std::uint8_t> manifest_digest,
                   std::span<const SharedFile> files);
  // The lead, before it commits: `base/` is what holds these files and nothing else, or is not there without any.
  void keep_shared(std::span<const SharedFile> files);
  // Step 3 of the protocol; `shared` names the files in `base/` that this writer's records use. Another program may
  // have made them (a copy of a checkpoint) and never synced.
  void sync(std::span<const std::string> shared = {}) const;

  // Steps 5 to 8 of the protocol in staging.cc. `final_name` is a component of the parent directory. OsError(EEXIST) if
  // it exists and `overwrite` is false, or if what exists is not a checkpoint. With `read_back` step 6b, too.
  void commit(std::span<const std::uint8_t> manifest, std::span<const std::uint8_t> manifest_digest,
              const std::string& final_name, bool overwrite, bool read_back = false);
  // Any writer that gives up on a silent lead: after it a commit() fails that has not renamed yet. Whoever renames
  // first decides, so look for the checkpoint before (withdrawing a finished exchange trashes the old one) and after.
  void withdraw();
  void discard() noexcept;
  // Gives the lock and the descriptors up; nothing else may follow. path() stays.
  void close() noexcept;

 private:
  Staging(os::Directory parent, os::Directory directory, std::string save_id);
  void open_shared();
  void read_back(const std::string& name, std::span<const std::uint8_t> bytes) const;
  void publish(const std::string& final_name, bool overwrite);
  void publish_in_place(const std::string& final_name);
  [[noreturn]] void put_back(const std::string& final_name);
  void finish_exchange(const std::string& final_name);

  os::Directory parent_;
  os::Directory directory_;
  std::optional<os::Directory> shared_;
  std::shared_ptr<Predecessor> predecessor_;
  std::string save_id_;
  bool published_ = false;  // renamed: what has the staging name now, if anything, is the replaced checkpoint
};

}  // namespace snapstone::store
