#include "format/chunk_table.h"

#include <gtest/gtest.h>

#include <functional>
#include <limits>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "base/error.h"
#include "base/limits.h"
#include "codec/compress.h"

namespace snapstone::format {
namespace {

constexpr std::uint64_t kChunkBytes = 1ull << 20;
constexpr std::uint32_t kMax32 = std::numeric_limits<std::uint32_t>::max();
const std::vector<std::uint64_t> kFiles = {4 * kChunkBytes, 2 * kPageBytes};

ChunkRecord good_record() {
  ChunkRecord record{};
  record.offset = kPageBytes;
  record.stored_bytes = record.raw_bytes = 5000;
  return record;
}

// The reason of the CorruptError for a table whose third of four records is `record`; empty when it is accepted.
std::string reason_for(const ChunkRecord& record) {
  const std::vector<ChunkRecord> table = {good_record(), good_record(), record, good_record()};
  try {
    check_chunk_table(table, kFiles, kChunkBytes, "rank-00000.index");
  } catch (const CorruptError& error) {
    EXPECT_EQ(error.path(), "rank-00000.index");
    EXPECT_EQ(error.chunk(), 2);
    return error.reason();
  }
  return {};
}

std::string reason_after(const std::function<void(ChunkRecord&)>& change) {
  ChunkRecord record = good_record();
  change(record);
  return reason_for(record);
}

TEST(ChunkTableTest, good_tables_are_accepted) {
  EXPECT_NO_THROW(check_chunk_table({}, {}, kChunkBytes, "index"));
  EXPECT_EQ(reason_for(good_record()), "");
  EXPECT_EQ(reason_after([](ChunkRecord& r) { r.raw_bytes = r.stored_bytes = kChunkBytes; }), "");
  EXPECT_EQ(reason_after([](ChunkRecord& r) { r.offset = 4 * kChunkBytes - 2 * kPageBytes; }), "") << "up to the end";
  EXPECT_EQ(reason_after([](ChunkRecord& r) { r.file = 1, r.offset = 0; }), "");
  for (const auto codec : {codec::Codec::kZstd, codec::Codec::kZstdPlanes8}) {
    EXPECT_EQ(reason_after([codec](ChunkRecord& r) {
                r.codec = static_cast<std::uint16_t>(codec);
                r.stored_bytes = 1;
              }),
              "");
  }
}

TEST(ChunkTableTest, the_reserved_field_is_zero) {
  EXPECT_EQ(reason_after([](ChunkRecord& r) { r.reserved = 1; }), "chunk record: reserved field is not zero");
}

TEST(ChunkTableTest, unknown_codecs_are_refused) {
  EXPECT_EQ(reason_after([](ChunkRecord& r) { r.codec = 9; }), "chunk record: unknown codec");
  EXPECT_EQ(reason_after([](ChunkRecord& r) { r.codec = 0xFFFF; }), "chunk record: unknown codec");
}

TEST(ChunkTableTest, raw_sizes_are_bounded) {
  const char* const reason = "chunk record: raw size out of range";
  EXPECT_EQ(reason_after([](ChunkRecord& r) { r.raw_bytes = r.stored_bytes = 0; }), reason);
  EXPECT_EQ(reason_after([](ChunkRecord& r) { r.raw_bytes = r.stored_bytes = kChunkBytes + 1; }), reason);
  EXPECT_EQ(reason_after([](ChunkRecord& r) { r.raw_bytes = kMax32; }), reason);
}

TEST(ChunkTableTest, stored_sizes_are_at_most_the_raw_size) {
  const char* const reason = "chunk record: stored size out of range";
  EXPECT_EQ(reason_after([](ChunkRecord& r) { r.stored_bytes = 0; }), reason);
  EXPECT_EQ(reason_after([](ChunkRecord& r) { r.stored_bytes = r.raw_bytes + 1; }), reason);
  EXPECT_EQ(reason_after([](ChunkRecord& r) {
              r.codec = 1;
              r.stored_bytes = kMax32;
            }),
            reason);
}

TEST(ChunkTableTest, without_a_codec_the_sizes_are_equal) {
  EXPECT_EQ(reason_after([](ChunkRecord& r) { --r.stored_bytes; }),
            "chunk record: stored and raw size differ without a codec");
}

TEST(ChunkTableTest, offsets_are_aligned) {
  for (const std::uint64_t off : {1ull, 64ull, 512ull, 4095ull}) {
    EXPECT_EQ(reason_after([off](ChunkRecord& r) { r.offset += off; }), "chunk record: offset is not aligned") << off;
  }
}

TEST(ChunkTableTest, files_exist) {
  EXPECT_EQ(reason_after([](ChunkRecord& r) { r.file = 2; }), "chunk record: no such file");
  EXPECT_EQ(reason_after([](ChunkRecord& r) { r.file = kMax32; }), "chunk record: no such file");
}

TEST(ChunkTableTest, chunks_lie_inside_their_file) {
  const char* const reason = "chunk record: reaches past the end of its file";
  EXPECT_EQ(reason_after([](ChunkRecord& r) { r.offset = 4 * kChunkBytes; }), reason);
  EXPECT_EQ(reason_after([](ChunkRecord& r) { r.offset = 4 * kChunkBytes - kPageBytes; }), reason) << "by its padding";
  EXPECT_EQ(reason_after([](ChunkRecord& r) { r.file = 1; }), reason);
  EXPECT_EQ(reason_after([](ChunkRecord& r) { r.offset = ~std::uint64_t{0} / kPageBytes * kPageBytes; }), reason);
}

ChunkRecord xor_record(std::uint32_t raw_bytes = 5000) {
  ChunkRecord record = good_record();
  record.codec = static_cast<std::uint16_t>(codec::Codec::kXorZstd);
  record.raw_bytes = raw_bytes;
  record.stored_bytes = 1;
  return record;
}

ChunkRecord plain_record(std::uint32_t raw_bytes = 5000) {
  ChunkRecord record = good_record();
  record.stored_bytes = record.raw_bytes = raw_bytes;
  return record;
}

// What is wrong with a table and at which of its records; -1 is the table as a whole, "" that it is accepted.
std::pair<std::string, std::int64_t> table_problem(const std::vector<ChunkRecord>& table, std::uint64_t references) {
  try {
    check_chunk_table(table, kFiles, kChunkBytes, "index", references);
  } catch (const CorruptError& error) {
    return {error.reason(), error.chunk()};
  }
  return {"", 0};
}

// One chunk, with so many references in a row that a chain has `records`.
std::vector<ChunkRecord> chain(std::size_t records) {
  std::vector<ChunkRecord> table(records, xor_record());
  table.back() = plain_record();
  return table;
}

TEST(ChunkTableTest, the_xor_records_in_order_have_the_references_in_order) {
  const std::vector<ChunkRecord> table = {xor_record(100),   plain_record(),  xor_record(200),
                                          plain_record(100), xor_record(200), plain_record(200)};
  EXPECT_EQ(table_problem(table, 3).first, "");
  const std::vector<std::uint32_t> expected = {3, kNoReference, 4, kNoReference, 5, kNoReference};
  EXPECT_EQ(chunk_references(table, 3), expected);
  EXPECT_TRUE(chunk_references(std::vector<ChunkRecord>{plain_record()}, 0).empty());
}

TEST(ChunkTableTest, there_are_as_many_references_as_xor_records) {
  const std::string reason = "chunk table: references are not as many as chunks with an xor codec";
  EXPECT_EQ(table_problem({xor_record(), plain_record()}, 1).first, "");
  for (const std::uint64_t references : {std::uint64_t{0}, std::uint64_t{2}, std::uint64_t{3}, ~std::uint64_t{0}}) {
    EXPECT_EQ(table_problem({xor_record(), plain_record()}, references), std::pair(reason, std::int64_t{-1}));
  }
  EXPECT_EQ(table_problem({}, 1).first, reason);
}

TEST(ChunkTableTest, more_references_than_records_are_refused) {
  const std::vector<ChunkRecord> table = {xor_record(), plain_record()};
  for (const std::uint64_t references : {std::uint64_t{3}, ~std::uint64_t{0}}) {
    try {
      chunk_references(table, references);
      FAIL() << references;
    } catch (const std::invalid_argument& error) {
      EXPECT_STREQ(error.what(), "more references than chunks");
    }
  }
}

TEST(ChunkTableTest, a_reference_stands_behind_what_refers_to_it) {
  const std::string reason = "chunk record: its reference does not stand behind it";
  EXPECT_EQ(table_problem({xor_record()}, 1), std::pair(reason, std::int64_t{0})) << "itself";
  EXPECT_EQ(table_problem({plain_record(), xor_record(), xor_record()}, 2).first, reason);
  EXPECT_EQ(table_problem({xor_record(), xor_record(), plain_record()}, 2).first, "");
}

TEST(ChunkTableTest, a_reference_has_the_raw_size_of_what_refers_to_it) {
  EXPECT_EQ(table_problem({xor_record(100), plain_record(101)}, 1),
            std::pair(std::string("chunk record: its reference has another raw size"), std::int64_t{0}));
}

TEST(ChunkTableTest, chains_are_bounded) {
  EXPECT_EQ(table_problem(chain(kChainRecordsMax), kChainRecordsMax - 1).first, "");
  EXPECT_EQ(table_problem(chain(kChainRecordsMax + 1), kChainRecordsMax),
            std::pair(std::string("chunk record: too many references in a chain"), std::int64_t{0}));
  EXPECT_EQ(table_problem(chain(1000), 999).second, 1000 - 1 - std::int64_t{kChainRecordsMax});
}

}  // namespace
}  // namespace snapstone::format
