// check_chunk_table() on any records, files and numbers; what it accepts is within all limits, and a plan of every
// chunk reads nothing outside the files.
#include "format/chunk_table.h"

#include <memory>

#include "base/error.h"
#include "base/limits.h"
#include "codec/compress.h"
#include "fuzz_target.h"
#include "pipeline/load_plan.h"

namespace snapstone {
namespace {

using format::ChunkRecord;
using fuzz::Input;
using fuzz::require;

constexpr std::size_t kRecordsMax = 200;

// Mostly records that could be right, so that mistakes in one field are what is tried.
ChunkRecord take_record(Input& input, std::size_t files) {
  const std::uint8_t kind = input.byte();
  if (kind == 0) return input.raw<ChunkRecord>();
  ChunkRecord record{};
  record.offset = (kind & 1) != 0 ? input.number() : input.below(64) * kPageBytes;
  record.raw_bytes = (kind & 2) != 0 ? static_cast<std::uint32_t>(input.number()) : 4096;
  record.codec = (kind & 4) != 0 ? input.raw<std::uint16_t>() : static_cast<std::uint16_t>(input.below(9));
  record.stored_bytes = record.codec == 0 ? record.raw_bytes : 1 + input.byte();
  if ((kind & 8) != 0) record.stored_bytes = static_cast<std::uint32_t>(input.number());
  record.file = (kind & 16) != 0 ? static_cast<std::uint32_t>(input.number())
                                 : static_cast<std::uint32_t>(input.below(std::max<std::size_t>(files, 1)));
  if ((kind & 32) != 0) record.reserved = input.byte();
  return record;
}

void check_accepted(const std::vector<ChunkRecord>& table, const std::vector<std::uint64_t>& files,
                    std::uint64_t references) {
  for (const ChunkRecord& record : table) {
    require(record.raw_bytes != 0 && record.raw_bytes <= kChunkBytesMax, "raw size within the limit");
    require(record.stored_bytes != 0 && record.stored_bytes <= record.raw_bytes, "stored size within the raw size");
    require(record.file < files.size(), "in a file that exists");
    const std::uint64_t nbytes = files[record.file];
    require(record.offset % kPageBytes == 0 && record.offset <= nbytes && record.stored_bytes <= nbytes - record.offset,
            "inside its file");
    require(record.codec <= 8 && record.reserved == 0, "a codec that is known");
  }
  const std::vector<std::uint32_t> reference_of = format::chunk_references(table, references);
  for (std::size_t i = 0; i < table.size(); ++i) {
    std::uint64_t length = 1;
    for (std::size_t at = i; codec::is_xor_codec(table[at].codec); ++length) {
      const std::uint32_t next = reference_of.at(at);
      require(next > at && next < table.size(), "a reference stands behind what refers to it");
      require(table[next].raw_bytes == table[at].raw_bytes, "a reference has the same raw size");
      at = next;
    }
    require(length <= format::kChainRecordsMax, "chains are short");
  }
}

void check_plan(const std::vector<ChunkRecord>& table, const std::vector<std::uint64_t>& files,
                std::uint64_t references, std::uint64_t request_bytes) {
  pipeline::LoadPlan plan(
      {{std::make_shared<const pipeline::ChunkRecords>(table), 0, "index",
        std::make_shared<const pipeline::ChunkReferences>(format::chunk_references(table, references))}});
  plan.add_all_chunks();
  plan.finish(request_bytes);
  require(plan.chunks().size() == table.size(), "every chunk is read");
  std::uint64_t chunks = 0;
  for (const pipeline::ReadRequest& request : plan.requests()) {
    require(request.offset + request.nbytes <= files.at(request.file), "a request lies inside its file");
    require(request.first_chunk == chunks && request.chunk_count > 0, "requests have the chunks in order");
    for (std::uint64_t i = 0; i < request.chunk_count; ++i, ++chunks) {
      const ChunkRecord& record = plan.record(plan.chunks().at(chunks));
      require(record.offset >= request.offset && record.file == request.file &&
                  record.offset - request.offset + record.stored_bytes <= request.nbytes,
              "a chunk lies inside its request");
    }
    require(request.nbytes <= plan.request_bytes_max(), "no request is larger than a slot");
  }
  require(chunks == table.size(), "every chunk is in a request");
  require(plan.request_bytes_max() <= std::max(request_bytes, kChunkBytesMax), "slots are bounded");
  const std::vector<bool> needed = plan.files_needed();
  require(needed.size() <= files.size(), "no file is needed that does not exist");
  for (const ChunkRecord& record : table) require(needed.at(record.file), "files of all chunks are needed");
}

}  // namespace
}  // namespace snapstone

int snapstone::fuzz::run_input(const std::uint8_t* data, std::size_t size) {
  using namespace snapstone;
  Input input(data, size);
  std::vector<std::uint64_t> files(input.below(4));
  for (std::uint64_t& nbytes : files) nbytes = input.number() * (input.flag() ? kPageBytes : 1);
  const std::uint64_t given_references = input.number();
  const bool count_references = input.flag();
  const std::uint64_t chunk_bytes_max = input.flag() ? kChunkBytesMax : input.number() % (kChunkBytesMax + 1);
  const std::uint64_t request_bytes = input.number() % kChunkBytesMax;
  const std::size_t repeat = 1 + input.below(3) * 40;  // long chains from short inputs
  std::vector<ChunkRecord> table;
  while (!input.empty() && table.size() < kRecordsMax)
    table.insert(table.end(), repeat, take_record(input, files.size()));
  const auto with_xor = static_cast<std::uint64_t>(
      std::ranges::count_if(table, [](const ChunkRecord& record) { return codec::is_xor_codec(record.codec); }));
  const std::uint64_t references = count_references ? with_xor : given_references;
  try {
    format::check_chunk_table(table, files, chunk_bytes_max, "index", references);
  } catch (const CorruptError&) {
    return 0;
  }
  check_accepted(table, files, references);
  check_plan(table, files, references, request_bytes);
  return 0;
}
