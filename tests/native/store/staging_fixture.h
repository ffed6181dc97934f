// A run directory, whole saves in it, and what stands there.
#pragma once

#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <iterator>
#include <span>
#include <string>
#include <vector>

#include "armed_faults.h"
#include "os/directory.h"
#include "store/names.h"
#include "store/staging.h"
#include "temporary_directory.h"

namespace snapstone::store {

using testing::ArmedFaults;
using testing::errno_of;
using testing::TemporaryDirectory;

inline const std::string kSaveId(32, 'a');
inline const std::string kOldSaveId(32, '0');
inline const std::string kFinal = "step-00000001";

inline std::span<const std::uint8_t> bytes_of(const std::string& text) {
  return {reinterpret_cast<const std::uint8_t*>(text.data()), text.size()};
}

class StagingTest : public ::testing::Test {
 protected:
  std::string read(const std::string& name) const {
    std::ifstream stream(run_ / name);
    return {std::istreambuf_iterator<char>(stream), {}};
  }
  bool exists(const std::string& name) const {
    return std::filesystem::exists(std::filesystem::symlink_status(run_ / name));
  }
  std::vector<std::string> names() const {
    std::vector<std::string> result;
    for (const os::Entry& entry : os::list_directory(run_.directory())) result.push_back(entry.name);
    return result;
  }
  bool is_lockable(const std::string& name) const {
    return os::try_lock_exclusive(os::open_directory_at(run_.directory(), name));
  }

  // One whole save, whose files all hold `text`.
  void save(const std::string& save_id, const std::string& text, bool overwrite) const {
    Staging staging = Staging::create(run_.path(), save_id, {os::boot_id()});
    try {
      staging.write_file("rank-00000.data", bytes_of(text));
      staging.sync();
      staging.commit(bytes_of(text), bytes_of(text), kFinal, overwrite);
    } catch (...) {
      staging.discard();
      throw;
    }
  }
  // Text of the checkpoint with the final name; "" when there is none, "broken" when it is not whole.
  std::string checkpoint() const {
    if (!exists(kFinal)) return "";
    const std::string text = read(kFinal + "/" + kManifestName);
    const bool whole = read(kFinal + "/" + kManifestDigestName) == text && read(kFinal + "/rank-00000.data") == text &&
                       !exists(kFinal + "/" + kOwnerName);
    return whole ? text : "broken";
  }

  const TemporaryDirectory run_;
};

}  // namespace snapstone::store
