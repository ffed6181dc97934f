// Every allocation of a save's directory work fails once: std::bad_alloc, nothing left but what reap() removes, and the
// previous checkpoint as it was.
#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <iterator>
#include <new>
#include <string>
#include <vector>

#include "failing_allocations.h"
#include "os/process.h"
#include "store/names.h"
#include "store/reap.h"
#include "store/staging.h"
#include "temporary_directory.h"

namespace snapstone::store {
namespace {

constexpr std::uint64_t kAllocationsMax = 2000;
const std::string kFinal = "step-00000001";

std::span<const std::uint8_t> bytes_of(const std::string& text) {
  return {reinterpret_cast<const std::uint8_t*>(text.data()), text.size()};
}

class StoreAllocationTest : public ::testing::Test {
 protected:
  void save(const std::string& save_id, const std::string& text) {
    Staging staging = Staging::create(run_.path(), save_id, {os::boot_id()});
    try {
      const Staging other = Staging::join(run_.path(), save_id);
      other.write_file("rank-00000.data", bytes_of(text));
      staging.sync();
      staging.commit(bytes_of(text), bytes_of(text), kFinal, true, true);
    } catch (...) {
      staging.discard();
      throw;
    }
  }
  std::string checkpoint() const {
    std::ifstream stream(run_ / (kFinal + "/" + kManifestName));
    return {std::istreambuf_iterator<char>(stream), {}};
  }
  std::vector<std::string> leftovers() const {
    std::vector<std::string> names;
    for (const os::Entry& entry : os::list_directory(run_.directory())) {
      if (entry.name != kFinal) names.push_back(entry.name);
    }
    return names;
  }
  std::size_t open_files() const { return os::list_directory(os::open_directory("/proc/self/fd")).size(); }

  // In memory where that can be: an fsync there costs microseconds.
  const testing::TemporaryDirectory run_{::access("/dev/shm", W_OK) == 0 ? "/dev/shm" : ::testing::TempDir()};
};

TEST_F(StoreAllocationTest, any_failing_allocation_of_a_commit) {
  const std::string old_text = "old";
  const std::string new_text = "new";
  save(std::string(32, '0'), old_text);
  const std::size_t files = open_files();
  std::uint64_t nth = 1;
  for (bool reached = true; reached; ++nth) {
    ASSERT_LT(nth, kAllocationsMax);
    SCOPED_TRACE("allocation " + std::to_string(nth));
    const std::string save_id(32, 'a');
    bool refused = false;
    {
      const FailingAllocation failing(nth);
      try {
        save(save_id, new_text);
      } catch (const std::bad_alloc&) {
        refused = true;
      }
      reached = FailingAllocation::reached();
    }
    ASSERT_EQ(open_files(), files);
    if (!refused) {
      ASSERT_EQ(checkpoint(), new_text);
    } else {
      ASSERT_TRUE(checkpoint() == old_text || checkpoint() == new_text);
    }
    for (const std::string& name : leftovers()) {
      std::filesystem::last_write_time(run_ / name,
                                       std::filesystem::file_time_type::clock::now() - std::chrono::hours(24));
    }
    reap(run_.path());
    ASSERT_EQ(leftovers(), std::vector<std::string>());
    save(save_id, old_text);
    ASSERT_EQ(checkpoint(), old_text);
  }
  EXPECT_GE(nth, 30u);
}

TEST_F(StoreAllocationTest, a_save_that_fails_before_its_commit_leaves_nothing) {
  std::uint64_t nth = 1;
  for (bool reached = true; reached; ++nth) {
    ASSERT_LT(nth, kAllocationsMax);
    SCOPED_TRACE("allocation " + std::to_string(nth));
    {
      const FailingAllocation failing(nth);
      try {
        Staging staging = Staging::create(run_.path(), std::string(32, 'a'), {os::boot_id()});
        reached = FailingAllocation::reached();
        FailingAllocation::stop();
        staging.discard();
      } catch (const std::bad_alloc&) {
        reached = true;
      }
    }
    ASSERT_EQ(leftovers(), std::vector<std::string>());
  }
  EXPECT_GE(nth, 5u);
}

TEST_F(StoreAllocationTest, discarding_survives_a_lack_of_memory) {
  for (std::uint64_t nth = 1; nth < 50; ++nth) {
    Staging staging = Staging::create(run_.path(), std::string(32, 'b'), {os::boot_id()});
    {
      const FailingAllocation failing(nth, true);
      staging.discard();
    }
    staging.close();
    for (const std::string& name : leftovers()) std::filesystem::remove_all(run_ / name);
  }
}

TEST_F(StoreAllocationTest, any_failing_allocation_of_a_reap) {
  std::uint64_t nth = 1;
  for (bool reached = true; reached; ++nth) {
    ASSERT_LT(nth, kAllocationsMax);
    SCOPED_TRACE("allocation " + std::to_string(nth));
    std::filesystem::create_directories(run_ / (trash_name(std::string(32, 'c')) + "/base"));
    std::ofstream(run_ / (trash_name(std::string(32, 'c')) + "/base/file")) << "text";
    const std::size_t files = open_files();
    {
      const FailingAllocation failing(nth);
      try {
        reap(run_.path());
      } catch (const std::bad_alloc&) {
      }
      reached = FailingAllocation::reached();
    }
    ASSERT_EQ(open_files(), files);
    reap(run_.path());
    ASSERT_EQ(leftovers(), std::vector<std::string>());
  }
  EXPECT_GE(nth, 8u);
}

}  // namespace
}  // namespace snapstone::store
