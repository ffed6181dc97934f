#include "store/names.h"

#include <gtest/gtest.h>

#include <string>

namespace snapstone::store {
namespace {

const std::string kSaveId = "0123456789abcdef0123456789abcdef";

TEST(NamesTest, save_ids_are_32_lower_case_hex_digits) {
  EXPECT_TRUE(is_save_id(kSaveId));
  for (const std::string& text : {std::string(), kSaveId.substr(1), kSaveId + "0", kSaveId.substr(1) + "A",
                                  kSaveId.substr(1) + "g", kSaveId.substr(1) + "/", std::string(32, '\0')}) {
    EXPECT_FALSE(is_save_id(text)) << text;
  }
}

TEST(NamesTest, what_a_save_makes_is_told_from_everything_else) {
  EXPECT_EQ(staging_name(kSaveId), ".staging-" + kSaveId);
  EXPECT_EQ(trash_name(kSaveId), ".trash-" + kSaveId);
  EXPECT_TRUE(is_staging_name(staging_name(kSaveId)));
  EXPECT_TRUE(is_trash_name(trash_name(kSaveId)));
  EXPECT_FALSE(is_staging_name(trash_name(kSaveId)));
  EXPECT_FALSE(is_trash_name(staging_name(kSaveId)));
  for (const std::string& name : {kSaveId, std::string(".staging-"), ".staging-" + kSaveId + "~", "staging-" + kSaveId,
                                  "x.staging-" + kSaveId, std::string("step-00000001"), std::string()}) {
    EXPECT_FALSE(is_staging_name(name)) << name;
    EXPECT_FALSE(is_trash_name(name)) << name;
  }
}

TEST(NamesTest, file_names_are_one_plain_component) {
  for (const std::string& name : {std::string("rank-00000.data"), std::string(kManifestName),
                                  std::string(kManifestDigestName), std::string(128, 'a'), std::string("A_b-1.c")}) {
    EXPECT_TRUE(is_file_name(name)) << name;
  }
  for (const std::string& name :
       {std::string(), std::string("."), std::string(".."), std::string(".hidden"), std::string("a/b"),
        std::string("/a"), std::string("a b"), std::string("a\n"), std::string("a\0b", 3), std::string("\xC3\xA4"),
        std::string("a\\b"), std::string(129, 'a')}) {
    EXPECT_FALSE(is_file_name(name)) << name;
  }
}

}  // namespace
}  // namespace snapstone::store
