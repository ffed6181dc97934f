// Which of raw bytes, frame and difference a chunk is stored as, by how much of it compresses.
#include "pipeline/chunk_encoder.h"

#include "pipeline/pipeline_fixture.h"

namespace snapstone::pipeline {
namespace {

using codec::Codec;

class ChunkEncoderTest : public PipelineTest {
 protected:
  static constexpr std::uint32_t kRawBytes = 60000;

  // `share` of a chunk in bytes.
  static std::size_t part(double share) { return static_cast<std::size_t>(share * kRawBytes); }
  Bytes noise(std::size_t nbytes) {
    Bytes bytes(nbytes);
    for (std::uint8_t& byte : bytes) byte = static_cast<std::uint8_t>(random_());
    return bytes;
  }
  // A frame of it is `share` of the raw size.
  Bytes compressible(double share) {
    Bytes bytes = noise(part(share));
    bytes.resize(kRawBytes);
    return bytes;
  }
  // The difference from the result is `share` of the raw size.
  Bytes reference_of(const Bytes& raw, double share) {
    Bytes reference = raw;
    for (std::size_t i = kRawBytes - part(share); i < kRawBytes; ++i)
      reference[i] = static_cast<std::uint8_t>(random_());
    return reference;
  }

  // Codec of the chunk; what is stored is decoded and compared.
  Codec encode(const Bytes& raw, const Bytes& reference, bool floats = true) {
    format::Layout layout = format::make_layout(Sizes{kPackThresholdBytes}, kTestChunkBytes);
    layout.chunks[0].raw_bytes = kRawBytes;
    SaveBase base;
    if (!reference.empty()) base = base_with(reference);
    EncodeOptions options{.zstd_level = 1, .item_bytes = {1}};
    if (floats) options.xor_tensors = {1};
    ChunkEncoder encoder(layout, base, options);
    const os::MappedMemory scratch(encoder.scratch_bytes());
    Bytes slot = raw;
    LaneBooks books(0, false);
    const EncodedChunk encoded = encoder.encode(0, slot.data(), scratch.data(), books);
    slot.resize(encoded.stored_bytes);
    Bytes decoded(kRawBytes);
    codec::decompress(slot, encoded.codec, decoded);
    if (codec::is_xor_codec(static_cast<std::uint16_t>(encoded.codec))) codec::xor_into(reference, decoded);
    EXPECT_EQ(decoded, raw);
    EXPECT_GT(encoder.encode_us()[0], 0u);
    EXPECT_EQ(encoder.unreadable_references(), 0u);
    return encoded.codec;
  }

 private:
  SaveBase base_with(const Bytes& reference) {
    const std::string name = std::to_string(saved_++);
    Bytes file = reference;
    file.resize(round_up(file.size(), kPageBytes));
    os::write_durably(os::create_file(directory_.fd(), directory_.path(), name, false), file);
    SaveBase base;
    base.records = {{0, kRawBytes, kRawBytes, 1, 0, 0, codec::digest(reference)}};
    base.references = {SaveBase::kNoRecord};
    base.record_of_chunk = {0};
    base.files.resize(1);
    base.files.push_back(os::open_for_read(directory_.fd(), directory_.path(), name, false));
    return base;
  }

  int saved_ = 0;
};

TEST_F(ChunkEncoderTest, a_frame_pays_below_97_percent_where_differences_are_stored_and_always_elsewhere) {
  EXPECT_EQ(encode(compressible(0.98), {}), Codec::kNone);
  EXPECT_EQ(encode(compressible(0.95), {}), Codec::kZstd);
  EXPECT_EQ(encode(compressible(0.98), {}, false), Codec::kZstd);
  EXPECT_EQ(encode(compressible(1), {}, false), Codec::kNone);
}

TEST_F(ChunkEncoderTest, a_difference_pays_below_90_percent) {
  const Bytes raw = noise(kRawBytes);
  EXPECT_EQ(encode(raw, reference_of(raw, 0.85)), Codec::kXorZstd);
  EXPECT_EQ(encode(raw, reference_of(raw, 0.93)), Codec::kNone);
  EXPECT_EQ(encode(raw, noise(kRawBytes)), Codec::kNone);
  EXPECT_EQ(encode(raw, reference_of(raw, 0.1), false), Codec::kNone) << "not a floating-point tensor";
  const Bytes half = compressible(0.95);
  EXPECT_EQ(encode(half, reference_of(half, 0.93)), Codec::kZstd);
}

TEST_F(ChunkEncoderTest, the_smaller_of_difference_and_keyframe_is_stored) {
  const Bytes raw = compressible(0.75);
  EXPECT_EQ(encode(raw, reference_of(raw, 0.7)), Codec::kXorZstd);
  EXPECT_EQ(encode(raw, reference_of(raw, 0.8)), Codec::kZstd);
}

TEST_F(ChunkEncoderTest, from_a_ratio_of_1_7_on_the_difference_is_taken_unasked) {
  const Bytes raw = compressible(0.3);
  EXPECT_EQ(encode(raw, reference_of(raw, 0.55)), Codec::kXorZstd);
  EXPECT_EQ(encode(raw, reference_of(raw, 0.65)), Codec::kZstd);
  EXPECT_EQ(encode(raw, raw), Codec::kXorZstd) << "no difference at all";
}

}  // namespace
}  // namespace snapstone::pipeline
