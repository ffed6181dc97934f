// ReferenceChain: the raw bytes of any record of a chunk table, also where codecs refer from record to record.
//
// A chunk with an xor codec is the difference from its reference, which may be a difference itself. The chain ends in a
// record without a reference. Differences add up in any order, so scratch for two chunks does for any chain.
//
// Ownership: views of a table and of its open files, which must outlive it.
// Threads:   const, any; scratch belongs to one caller at a time.
// Limits:    reads with blocking calls, one stored chunk at a time, into page-aligned scratch of the caller.
// Failure:   CorruptError with the record that was asked for and the file that is wrong; the reason names the reference
//            if the file is a reference's. OsError. Digests are the caller's to compare.
#pragma once

#include <cstdint>
#include <span>
#include <string>

#include "format/chunk_record.h"
#include "os/file.h"
#include "pipeline/job.h"

namespace snapstone::pipeline {

class ReferenceChain {
 public:
  // `references`: of each record, as format::chunk_references() gives them; empty when there are none. `files`: what
  // record.file counts in; those that chains lie in are open.
  ReferenceChain(std::span<const format::ChunkRecord> records, std::span<const std::uint32_t> references,
                 std::span<const os::File> files)
      : records_(records), references_(references), files_(files) {}

  // The record that `record` refers to, or format::kNoReference.
  std::uint32_t reference(std::uint64_t record) const;
  // Records in the chain that begins with `record`, itself included.
  std::uint64_t length(std::uint64_t record) const;

  // Bytes of scratch for records of up to `raw_bytes`. decode() of a record without a reference needs only half of it.
  static std::uint64_t scratch_bytes(std::uint64_t raw_bytes);
  // The raw bytes of a record whose stored bytes are there; reads those of its references. The result is in `scratch`.
  std::span<const std::uint8_t> decode(std::uint64_t record, std::span<const std::uint8_t> stored,
                                       std::uint8_t* scratch, LaneBooks& books) const;
  // Reads the record, too.
  std::span<const std::uint8_t> read(std::uint64_t record, std::uint8_t* scratch, LaneBooks& books) const;

  // For a record that decoded to wrong bytes: the innermost in its chain whose bytes are not those of its digest, or
  // the record itself.
  std::uint64_t first_wrong(std::uint64_t record, std::uint8_t* scratch, LaneBooks& books) const;

 private:
  const std::string& path(std::uint64_t record) const;  // of its file; empty if that is not there
  std::span<const std::uint8_t> read_stored(std::uint64_t record, std::uint8_t* target, LaneBooks& books) const;
  // Writes to `raw`, or with `onto` XORs to it.
  void decode_one(std::uint64_t record, std::span<const std::uint8_t> stored, std::span<std::uint8_t> raw, bool onto,
                  LaneBooks& books) const;

  std::span<const format::ChunkRecord> records_;
  std::span<const std::uint32_t> references_;
  std::span<const os::File> files_;
};

}  // namespace snapstone::pipeline
