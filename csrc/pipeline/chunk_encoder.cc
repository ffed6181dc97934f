#include "pipeline/chunk_encoder.h"

#include <algorithm>
#include <cstring>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>

#include "base/clock.h"
#include "base/error.h"
#include "base/limits.h"
#include "codec/digest.h"

namespace snapstone::pipeline {
namespace {

constexpr double kDifferencePays = 0.9;
constexpr double kDifferenceIsBest = 1 / 1.7;
constexpr double kKeyframePays = 0.97;

using Size = std::optional<std::uint64_t>;

Size if_below(Size nbytes, double share, std::uint64_t raw_bytes) {
  return nbytes && static_cast<double>(*nbytes) < share * static_cast<double>(raw_bytes) ? nbytes : std::nullopt;
}

EncodedChunk keep(std::span<std::uint8_t> raw, const std::uint8_t* frame, std::uint64_t nbytes, codec::Codec codec) {
  std::memcpy(raw.data(), frame, nbytes);
  return {codec, static_cast<std::uint32_t>(nbytes)};
}

EncodedChunk keep_raw(std::span<const std::uint8_t> raw) {
  return {codec::Codec::kNone, static_cast<std::uint32_t>(raw.size())};
}

}  // namespace

ChunkEncoder::ChunkEncoder(const format::Layout& layout, const SaveBase& base, EncodeOptions options)
    : layout_(layout), base_(base), options_(std::move(options)), encode_us_(layout.chunks.size()) {
  const std::size_t tensors = layout.places.size();
  if (options_.item_bytes.size() != tensors ||
      (!options_.xor_tensors.empty() && options_.xor_tensors.size() != tensors)) {
    throw std::invalid_argument("one item size per tensor is needed when compressing");
  }
  if (options_.keyframe_every < 1 || options_.keyframe_every > format::kChainRecordsMax) {
    throw std::invalid_argument("keyframe_every=" + std::to_string(options_.keyframe_every) +
                                ": must be between 1 and " + std::to_string(format::kChainRecordsMax));
  }
}

EncodedChunk ChunkEncoder::encode(std::uint64_t index, std::uint8_t* slot, std::uint8_t* scratch, LaneBooks& books) {
  const format::ChunkPlan& chunk = layout_.chunks[index];
  const std::uint32_t tensor = layout_.pieces[chunk.first_piece].tensor;
  // Packed chunks mix item sizes, so they get neither byte planes nor differences.
  const bool packed = chunk.piece_count != 1;
  const unsigned item_bytes = packed ? 1 : options_.item_bytes[tensor];
  const bool floats = !packed && !options_.xor_tensors.empty() && options_.xor_tensors[tensor] != 0;
  const std::span<std::uint8_t> raw(slot, chunk.raw_bytes);
  const std::int64_t begin = now_ns();
  std::span<const std::uint8_t> reference;
  if (floats) reference = read_reference(index, raw.size(), scratch, books);
  const std::int64_t read = now_ns();
  const EncodedChunk encoded =
      floats ? encode_floats(raw, reference, item_bytes, scratch) : encode_zstd(raw, item_bytes, scratch);
  const std::int64_t end = now_ns();
  books.add(Stage::kEncode, read, end, chunk.raw_bytes);
  encode_us_[index] = static_cast<std::uint32_t>(std::clamp<std::int64_t>((end - begin) / 1000, 1, UINT32_MAX));
  return encoded;
}

EncodedChunk ChunkEncoder::encode_zstd(std::span<std::uint8_t> raw, unsigned item_bytes, std::uint8_t* scratch) const {
  const codec::Codec codec = codec::zstd_codec_for_item_bytes(item_bytes);
  const Size frame = codec::compress(raw, codec, options_.zstd_level, scratch);
  return frame ? keep(raw, scratch, *frame, codec) : keep_raw(raw);
}

EncodedChunk ChunkEncoder::encode_floats(std::span<std::uint8_t> raw, std::span<const std::uint8_t> reference,
                                         unsigned item_bytes, std::uint8_t* scratch) const {
  std::uint8_t* second = scratch + round_up(raw.size(), kPageBytes);
  const codec::Codec xor_codec = codec::xor_codec_for_item_bytes(item_bytes);
  Size difference;
  if (!reference.empty()) {
    const Size frame = codec::compress(raw, reference, xor_codec, options_.zstd_level, second);
    difference = if_below(frame, kDifferencePays, raw.size());
  }
  if (if_below(difference, kDifferenceIsBest, raw.size())) return keep(raw, second, *difference, xor_codec);
  // The reference has done its work: the keyframe takes its place.
  const codec::Codec codec = codec::zstd_codec_for_item_bytes(item_bytes);
  const Size keyframe = if_below(codec::compress(raw, codec, options_.zstd_level, scratch), kKeyframePays, raw.size());
  if (difference && (!keyframe || *difference < *keyframe)) return keep(raw, second, *difference, xor_codec);
  return keyframe ? keep(raw, scratch, *keyframe, codec) : keep_raw(raw);
}

std::span<const std::uint8_t> ChunkEncoder::read_reference(std::uint64_t index, std::uint64_t raw_bytes,
                                                           std::uint8_t* scratch, LaneBooks& books) {
  const format::ChunkRecord* record = base_.record(index, raw_bytes);
  if (record == nullptr || record->file >= base_.files.size()) return {};
  const ReferenceChain chain = base_.chain();
  const std::uint32_t number = base_.record_of_chunk[index];
  try {
    if (chain.length(number) + 1 > options_.keyframe_every) return {};
    const std::span<const std::uint8_t> raw = chain.read(number, scratch, books);
    const std::int64_t begin = now_ns();
    const bool right = codec::digest(raw) == record->digest;
    books.add(Stage::kDigest, begin, now_ns(), raw.size());
    if (right) return raw;
  } catch (const CorruptError&) {
  } catch (const OsError&) {
  }
  unreadable_references_.fetch_add(1, std::memory_order_relaxed);
  return {};
}

}  // namespace snapstone::pipeline
