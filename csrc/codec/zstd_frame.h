// One zstd frame per chunk, nothing before or after it. A build without libzstd refuses it: UnsupportedError.
#pragma once

#include <cstdint>
#include <optional>
#include <span>

namespace snapstone::codec {

bool zstd_compiled_in();

// `target` holds source.size() bytes; nullopt when the frame would not be smaller than its source.
std::optional<std::uint64_t> compress_zstd_frame(std::span<const std::uint8_t> source, int level, std::uint8_t* target);
// CorruptError (path empty) unless `stored` is one frame of exactly raw.size() bytes, with a window no larger.
void decompress_zstd_frame(std::span<const std::uint8_t> stored, std::span<std::uint8_t> raw);

}  // namespace snapstone::codec
