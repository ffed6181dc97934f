#include "store/names.h"

#include <algorithm>

namespace snapstone::store {
namespace {

constexpr std::string_view kStagingPrefix = ".staging-";
constexpr std::string_view kTrashPrefix = ".trash-";

bool is_prefixed_save_id(std::string_view name, std::string_view prefix) {
  return name.starts_with(prefix) && is_save_id(name.substr(prefix.size()));
}

}  // namespace

bool is_save_id(std::string_view text) {
  return text.size() == 32 &&
         std::all_of(text.begin(), text.end(), [](char c) { return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'f'); });
}

std::string staging_name(std::string_view save_id) { return std::string(kStagingPrefix).append(save_id); }

std::string trash_name(std::string_view save_id) { return std::string(kTrashPrefix).append(save_id); }

bool is_staging_name(std::string_view name) { return is_prefixed_save_id(name, kStagingPrefix); }

bool is_trash_name(std::string_view name) { return is_prefixed_save_id(name, kTrashPrefix); }

bool is_file_name(std::string_view name) {
  const auto allowed = [](char c) {
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '.' || c == '_' ||
           c == '-';
  };
  return !name.empty() && name.size() <= 128 && name.front() != '.' && std::all_of(name.begin(), name.end(), allowed);
}

}  // namespace snapstone::store
