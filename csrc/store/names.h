// Names inside a run directory and inside a checkpoint. Anything that is not one of ours is never opened for writing,
// renamed or removed.
#pragma once

#include <string>
#include <string_view>

namespace snapstone::store {

inline constexpr const char* kManifestName = "MANIFEST.json";
inline constexpr const char* kManifestDigestName = "MANIFEST.xxh128";
inline constexpr const char* kOwnerName = "OWNER";  // only inside a staging directory; removed before the commit
inline constexpr const char* kSharedName = "base";  // directory of shared files, inside a checkpoint

bool is_save_id(std::string_view text);  // 32 lower-case hex digits
std::string staging_name(std::string_view save_id);
std::string trash_name(std::string_view save_id);
bool is_staging_name(std::string_view name);
bool is_trash_name(std::string_view name);
// One path component of [A-Za-z0-9._-], 1 to 128 long, not starting with '.': what a manifest may name.
bool is_file_name(std::string_view name);

}  // namespace snapstone::store
