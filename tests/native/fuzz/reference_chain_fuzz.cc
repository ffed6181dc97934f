// Chains of chunks with xor codecs in a file of any bytes, by a table that was accepted and by references that nobody
// checked: a record's raw bytes, or a typed error; nothing outside the scratch, and no chain without an end.
#include "pipeline/reference_chain.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdlib>
#include <memory>
#include <optional>

#include "base/error.h"
#include "base/limits.h"
#include "codec/compress.h"
#include "codec/digest.h"
#include "format/chunk_table.h"
#include "fuzz_target.h"

namespace snapstone {
namespace {

using codec::Codec;
using format::ChunkRecord;
using fuzz::Bytes;
using fuzz::Input;
using fuzz::require;

constexpr std::uint32_t kRawBytesMax = 6000;

struct Free {
  void operator()(std::uint8_t* memory) const { std::free(memory); }
};

os::File& data_file() {
  static os::File file{os::UniqueFd(memfd_create("fuzz", MFD_CLOEXEC)), "rank-00000.data", false};
  return file;
}

// A sound table and its file: the records' raw bytes differ a little.
struct Sound {
  std::vector<ChunkRecord> table;
  std::vector<Bytes> raw;
  Bytes file;
  bool whole = true;  // false where a difference did not compress, which leaves one reference too many

  explicit Sound(Input& input) {
    const std::uint64_t links = input.below(6);
    const std::uint64_t plain = 1 + input.below(3);
    const auto nbytes = 1 + static_cast<std::uint32_t>(input.below(kRawBytesMax));
    const std::uint8_t seed = input.byte();
    for (std::uint64_t i = 0; i < links + plain; ++i) {
      raw.push_back(fuzz::pattern(nbytes, seed));
      raw.back()[input.raw<std::uint16_t>() % nbytes] ^= input.byte();
      ChunkRecord record{};
      record.raw_bytes = record.stored_bytes = nbytes;
      if (i < links) record.codec = static_cast<std::uint16_t>(5 + input.below(4));
      table.push_back(record);
    }
    const std::vector<std::uint32_t> references = format::chunk_references(table, links);
    for (std::size_t i = 0; i < table.size(); ++i) store(i, references.empty() ? format::kNoReference : references[i]);
  }

 private:
  void store(std::size_t i, std::uint32_t reference) {
    ChunkRecord& record = table[i];
    record.offset = file.size();
    record.digest = codec::digest(raw[i]);
    Bytes stored(raw[i].size());
    std::optional<std::uint64_t> nbytes;
    if (reference != format::kNoReference) {
      const auto codec = static_cast<Codec>(record.codec);
      nbytes = codec::compress(raw[i], raw[reference], codec, 1, stored.data());
      if (!nbytes) record.codec = 0;
      whole = whole && nbytes.has_value();
    }
    if (!nbytes) stored = raw[i];
    record.stored_bytes = static_cast<std::uint32_t>(nbytes.value_or(stored.size()));
    stored.resize(round_up(record.stored_bytes, kPageBytes));
    file.insert(file.end(), stored.begin(), stored.end());
  }
};

// Returns whether anything was changed.
bool damage(Input& input, Sound& sound) {
  const std::uint64_t changes = input.below(4);
  for (std::uint64_t i = 0; i < changes; ++i) {
    ChunkRecord& record = sound.table[input.below(sound.table.size())];
    switch (input.below(8)) {
      case 0:
        record.offset = input.flag() ? input.number() : input.below(16) * kPageBytes;
        break;
      case 1:
        record.stored_bytes = static_cast<std::uint32_t>(input.number());
        break;
      case 2:
        record.raw_bytes = static_cast<std::uint32_t>(input.number() % kRawBytesMax);
        break;
      case 3:
        record.codec = static_cast<std::uint16_t>(input.below(10));
        break;
      case 4:
        record.file = input.byte();
        break;
      case 5:
        sound.file.resize(input.raw<std::uint16_t>() % (sound.file.size() + 1));
        break;
      default:
        if (!sound.file.empty()) sound.file[input.raw<std::uint32_t>() % sound.file.size()] ^= input.byte();
    }
  }
  return changes != 0;
}

void put(const Bytes& bytes) {
  const int fd = data_file().fd.get();
  require(ftruncate(fd, static_cast<off_t>(bytes.size())) == 0, "the file can be cut");
  require(pwrite(fd, bytes.data(), bytes.size(), 0) == static_cast<ssize_t>(bytes.size()), "the file can be written");
}

void read_all(const Sound& sound, std::span<const std::uint32_t> references, bool sound_as_made) {
  const pipeline::ReferenceChain chain(sound.table, references, std::span(&data_file(), 1));
  const std::uint64_t scratch_bytes = pipeline::ReferenceChain::scratch_bytes(kRawBytesMax);
  const std::unique_ptr<std::uint8_t, Free> scratch(
      static_cast<std::uint8_t*>(std::aligned_alloc(kPageBytes, scratch_bytes)));
  pipeline::LaneBooks books(0, false);
  for (std::uint64_t i = 0; i < sound.table.size(); ++i) {
    try {
      require(chain.length(i) <= sound.table.size(), "a chain ends");
      const std::span<const std::uint8_t> raw = chain.read(i, scratch.get(), books);
      require(raw.size() == sound.table[i].raw_bytes, "all of the raw bytes");
      const bool same = std::ranges::equal(raw, sound.raw[i]);
      require(same || !sound_as_made, "sound chains are decoded");
      if (!same) require(chain.first_wrong(i, scratch.get(), books) >= i, "the wrong record is in the chain");
    } catch (const CorruptError&) {
      require(!sound_as_made, "sound chains are not refused");
    } catch (const OsError&) {
      require(!sound_as_made, "sound chains can be read");
    }
  }
}

}  // namespace
}  // namespace snapstone

int snapstone::fuzz::run_input(const std::uint8_t* data, std::size_t size) {
  using namespace snapstone;
  Input input(data, size);
  Sound sound(input);
  const bool damaged = damage(input, sound);
  const auto references = static_cast<std::uint64_t>(
      std::ranges::count_if(sound.table, [](const ChunkRecord& r) { return codec::is_xor_codec(r.codec); }));
  put(sound.file);
  const std::uint64_t files[] = {sound.file.size()};
  try {
    format::check_chunk_table(sound.table, files, kRawBytesMax, "index", references);
    read_all(sound, format::chunk_references(sound.table, references), !damaged && sound.whole);
  } catch (const CorruptError&) {
    require(damaged || !sound.whole, "a sound table is accepted");
  }
  std::vector<std::uint32_t> unchecked(input.below(9));
  for (std::uint32_t& reference : unchecked) reference = static_cast<std::uint32_t>(input.number());
  for (ChunkRecord& record : sound.table) record.raw_bytes = std::min(record.raw_bytes, kRawBytesMax);
  read_all(sound, unchecked, false);
  return 0;
}
