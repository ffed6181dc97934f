#include "base/error.h"

#include <utility>

namespace snapstone {
namespace {

// "pwrite /run/rank-00000.data (offset 4096, 512 bytes)"; std::system_error appends ": No space left on device".
std::string describe_call(const std::string& verb, const std::string& path, std::uint64_t offset,
                          std::uint64_t nbytes) {
  std::string text = verb;
  if (!path.empty()) {
    text += " " + path;
  }
  if (offset != 0 || nbytes != 0) {
    text += " (offset " + std::to_string(offset) + ", " + std::to_string(nbytes) + " bytes)";
  }
  return text;
}

// "rank-00000.data: digest differs (chunk 7, expected ab.., actual cd..)"
std::string describe_damage(const std::string& reason, const std::string& path, std::int64_t chunk,
                            const std::string& expected, const std::string& actual) {
  std::string details;
  const auto add = [&details](const std::string& detail) { details += (details.empty() ? "" : ", ") + detail; };
  if (chunk != CorruptError::kNoChunk) {
    add("chunk " + std::to_string(chunk));
  }
  if (!expected.empty()) {
    add("expected " + expected);
  }
  if (!actual.empty()) {
    add("actual " + actual);
  }
  std::string text = path.empty() ? reason : path + ": " + reason;
  return details.empty() ? text : text + " (" + details + ")";
}

}  // namespace

OsError::OsError(int error_number, std::string verb, std::string path, std::uint64_t offset, std::uint64_t nbytes)
    : std::system_error(error_number, std::generic_category(), describe_call(verb, path, offset, nbytes)),
      verb_(std::move(verb)),
      path_(std::move(path)),
      offset_(offset),
      nbytes_(nbytes) {}

CorruptError::CorruptError(std::string reason, std::string path, std::int64_t chunk, std::string expected,
                           std::string actual)
    : std::runtime_error(describe_damage(reason, path, chunk, expected, actual)),
      reason_(std::move(reason)),
      path_(std::move(path)),
      chunk_(chunk),
      expected_(std::move(expected)),
      actual_(std::move(actual)) {}

}  // namespace snapstone
