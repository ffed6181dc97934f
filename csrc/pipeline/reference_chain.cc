#include "pipeline/reference_chain.h"

#include <cerrno>
#include <string>

#include "base/clock.h"
#include "base/error.h"
#include "base/limits.h"
#include "codec/compress.h"
#include "codec/digest.h"
#include "format/chunk_table.h"

namespace snapstone::pipeline {
namespace {

void read_pages(const os::File& file, std::uint8_t* target, std::uint64_t nbytes, std::uint64_t offset) {
  try {
    os::pread_full(file.fd.get(), file.path, target, nbytes, offset);
  } catch (const OsError& error) {
    // O_DIRECT refused at transfer time, or after a short count at the end of a file that was cut.
    if (error.error_number() != EINVAL || !file.direct) throw;
    os::drop_direct(file.fd.get());
    os::pread_full(file.fd.get(), file.path, target, nbytes, offset);
  }
}

}  // namespace

std::uint64_t ReferenceChain::scratch_bytes(std::uint64_t raw_bytes) { return 2 * round_up(raw_bytes, kPageBytes); }

std::uint32_t ReferenceChain::reference(std::uint64_t record) const {
  if (!codec::is_xor_codec(records_[record].codec)) return format::kNoReference;
  const std::uint32_t found = record < references_.size() ? references_[record] : format::kNoReference;
  // Later records only: a chain ends, whatever the table says.
  const bool fits =
      found > record && found < records_.size() && records_[found].raw_bytes == records_[record].raw_bytes;
  if (!fits) {
    throw CorruptError("chunk has no reference that fits", path(record), static_cast<std::int64_t>(record));
  }
  return found;
}

const std::string& ReferenceChain::path(std::uint64_t record) const {
  static const std::string unknown;
  const std::uint32_t file = records_[record].file;
  return file < files_.size() ? files_[file].path : unknown;
}

std::uint64_t ReferenceChain::length(std::uint64_t record) const {
  std::uint64_t count = 1;
  for (std::uint64_t at = reference(record); at != format::kNoReference; at = reference(at)) ++count;
  return count;
}

std::span<const std::uint8_t> ReferenceChain::decode(std::uint64_t record, std::span<const std::uint8_t> stored,
                                                     std::uint8_t* scratch, LaneBooks& books) const {
  const std::span<std::uint8_t> raw(scratch, records_[record].raw_bytes);
  decode_one(record, stored, raw, false, books);
  for (std::uint64_t at = reference(record); at != format::kNoReference; at = reference(at)) {
    try {
      decode_one(at, read_stored(at, scratch + round_up(raw.size(), kPageBytes), books), raw, true, books);
    } catch (const CorruptError& error) {
      throw CorruptError("reference chunk " + std::to_string(at) + ": " + error.reason(), error.path(),
                         static_cast<std::int64_t>(record), error.expected(), error.actual());
    }
  }
  return raw;
}

std::span<const std::uint8_t> ReferenceChain::read(std::uint64_t record, std::uint8_t* scratch,
                                                   LaneBooks& books) const {
  std::uint8_t* stored = scratch + round_up(records_[record].raw_bytes, kPageBytes);
  return decode(record, read_stored(record, stored, books), scratch, books);
}

std::uint64_t ReferenceChain::first_wrong(std::uint64_t record, std::uint8_t* scratch, LaneBooks& books) const {
  std::uint64_t wrong = record;
  for (std::uint64_t at = reference(record); at != format::kNoReference; at = reference(at)) {
    if (codec::digest(read(at, scratch, books)) != records_[at].digest) wrong = at;
  }
  return wrong;
}

std::span<const std::uint8_t> ReferenceChain::read_stored(std::uint64_t record, std::uint8_t* target,
                                                          LaneBooks& books) const {
  const format::ChunkRecord& wanted = records_[record];
  if (wanted.file >= files_.size() || wanted.stored_bytes > wanted.raw_bytes) {
    throw CorruptError("chunk record does not fit", path(record), static_cast<std::int64_t>(record));
  }
  const os::File& file = files_[wanted.file];
  const std::uint64_t nbytes = round_up(wanted.stored_bytes, kPageBytes);
  const std::int64_t begin = now_ns();
  try {
    read_pages(file, target, nbytes, wanted.offset);
  } catch (const CorruptError& error) {
    throw CorruptError("file ends before the chunk does", file.path, static_cast<std::int64_t>(record),
                       error.expected(), error.actual());
  }
  books.add(Stage::kRead, begin, now_ns(), nbytes);
  return {target, wanted.stored_bytes};
}

void ReferenceChain::decode_one(std::uint64_t record, std::span<const std::uint8_t> stored, std::span<std::uint8_t> raw,
                                bool onto, LaneBooks& books) const {
  const auto codec = static_cast<codec::Codec>(records_[record].codec);
  const std::int64_t begin = now_ns();
  try {
    if (onto) {
      codec::decompress_xor(stored, codec, raw);
    } else {
      codec::decompress(stored, codec, raw);
    }
  } catch (const CorruptError& error) {
    throw CorruptError(error.reason(), path(record), static_cast<std::int64_t>(record), error.expected(),
                       error.actual());
  }
  books.add(Stage::kDecode, begin, now_ns(), raw.size());
}

}  // namespace snapstone::pipeline
