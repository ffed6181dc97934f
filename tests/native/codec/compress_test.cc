#include "codec/compress.h"

#include <gtest/gtest.h>
#include <zstd.h>

#include <cmath>
#include <cstring>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "base/error.h"
#include "seed.h"

namespace snapstone::codec {
namespace {

using Bytes = std::vector<std::uint8_t>;
constexpr Codec kZstdCodecs[] = {Codec::kZstd, Codec::kZstdPlanes2, Codec::kZstdPlanes4, Codec::kZstdPlanes8};
constexpr Codec kXorCodecs[] = {Codec::kXorZstd, Codec::kXorZstdPlanes2, Codec::kXorZstdPlanes4,
                                Codec::kXorZstdPlanes8};

// Weights as training leaves them: small values around zero, so that exponents repeat and mantissas do not.
Bytes weights(std::size_t count, std::uint64_t salt) {
  std::mt19937_64 random(testing::seed() + salt);
  std::normal_distribution<float> normal(0.0f, 0.02f);
  Bytes bytes(count * sizeof(float));
  for (std::size_t i = 0; i < count; ++i) {
    const float value = normal(random);
    std::memcpy(bytes.data() + i * sizeof value, &value, sizeof value);
  }
  return bytes;
}

Bytes noise(std::size_t nbytes) {
  std::mt19937_64 random(testing::seed());
  Bytes bytes(nbytes);
  for (std::uint8_t& byte : bytes) {
    byte = static_cast<std::uint8_t>(random());
  }
  return bytes;
}

Bytes compressed(const Bytes& raw, Codec codec, int level = 1) {
  Bytes target(raw.size());
  const auto nbytes = compress(raw, codec, level, target.data());
  target.resize(nbytes.value_or(0));
  return target;
}

// One optimiser step later: a relative change of about 1e-3, that is in the low bytes.
Bytes trained(const Bytes& before) {
  std::mt19937_64 random(testing::seed() + 17);
  std::normal_distribution<float> normal(1.0f, 1e-3f);
  Bytes bytes = before;
  for (std::size_t i = 0; i + sizeof(float) <= bytes.size(); i += sizeof(float)) {
    float value;
    std::memcpy(&value, bytes.data() + i, sizeof value);
    value *= normal(random);
    std::memcpy(bytes.data() + i, &value, sizeof value);
  }
  return bytes;
}

Bytes compressed_xor(const Bytes& raw, const Bytes& reference, Codec codec, int level = 1) {
  Bytes target(raw.size());
  const auto nbytes = compress(raw, reference, codec, level, target.data());
  target.resize(nbytes.value_or(0));
  return target;
}

// The reason of the refusal; empty when `stored` was accepted.
std::string refusal(const Bytes& stored, std::size_t raw_nbytes, Codec codec = Codec::kZstd) {
  Bytes raw(raw_nbytes);
  try {
    decompress(stored, codec, raw);
  } catch (const CorruptError& error) {
    EXPECT_EQ(error.path(), "");
    return error.reason();
  }
  return "";
}

Bytes zstd_frame(const Bytes& raw, const std::vector<std::pair<ZSTD_cParameter, int>>& parameters = {},
                 const Bytes& dictionary = {}) {
  ZSTD_CCtx* context = ZSTD_createCCtx();
  for (const auto& [parameter, value] : parameters) {
    EXPECT_FALSE(ZSTD_isError(ZSTD_CCtx_setParameter(context, parameter, value)));
  }
  if (!dictionary.empty()) {
    EXPECT_FALSE(ZSTD_isError(ZSTD_CCtx_loadDictionary(context, dictionary.data(), dictionary.size())));
  }
  Bytes target(ZSTD_compressBound(raw.size()));
  const std::size_t nbytes = ZSTD_compress2(context, target.data(), target.size(), raw.data(), raw.size());
  EXPECT_FALSE(ZSTD_isError(nbytes));
  target.resize(nbytes);
  ZSTD_freeCCtx(context);
  return target;
}

Bytes operator+(Bytes left, const Bytes& right) {
  left.insert(left.end(), right.begin(), right.end());
  return left;
}

TEST(Codec, numbers_and_names_are_those_of_the_format) {
  EXPECT_EQ(static_cast<int>(Codec::kNone), 0);
  EXPECT_EQ(static_cast<int>(Codec::kZstd), 1);
  EXPECT_EQ(static_cast<int>(Codec::kZstdPlanes2), 2);
  EXPECT_EQ(static_cast<int>(Codec::kZstdPlanes4), 3);
  EXPECT_EQ(static_cast<int>(Codec::kZstdPlanes8), 4);
  EXPECT_EQ(static_cast<int>(Codec::kXorZstd), 5);
  EXPECT_EQ(static_cast<int>(Codec::kXorZstdPlanes2), 6);
  EXPECT_EQ(static_cast<int>(Codec::kXorZstdPlanes4), 7);
  EXPECT_EQ(static_cast<int>(Codec::kXorZstdPlanes8), 8);
  for (std::uint16_t codec = 0; codec < 20; ++codec) {
    EXPECT_EQ(known_codec(codec), codec <= 8);
    EXPECT_EQ(is_xor_codec(codec), codec >= 5 && codec <= 8);
  }
  EXPECT_FALSE(is_xor_codec(65535));
  EXPECT_STREQ(codec_name(Codec::kZstdPlanes4), "zstd-planes4");
  for (const Codec codec : kZstdCodecs) {
    EXPECT_EQ(zstd_codec_for_item_bytes(plane_item_bytes(codec)), codec);
  }
  EXPECT_EQ(zstd_codec_for_item_bytes(16), Codec::kZstd);
  EXPECT_STREQ(codec_name(Codec::kXorZstdPlanes2), "xor-zstd-planes2");
  for (const Codec codec : kXorCodecs) {
    EXPECT_EQ(xor_codec_for_item_bytes(plane_item_bytes(codec)), codec);
  }
  EXPECT_EQ(xor_codec_for_item_bytes(16), Codec::kXorZstd);
}

TEST(Compress, every_codec_gives_back_the_same_bytes) {
  for (const Codec codec : kZstdCodecs) {
    for (const std::size_t nbytes : {256u, 1000u, 4096u, 65537u, 1u << 20}) {
      for (const int level : {-5, 1, 3, 12}) {
        Bytes raw = weights(nbytes / 4 + 1, nbytes);
        std::fill(raw.begin(), raw.begin() + static_cast<std::ptrdiff_t>(nbytes / 2), std::uint8_t{7});
        raw.resize(nbytes);
        const Bytes stored = compressed(raw, codec, level);
        ASSERT_FALSE(stored.empty()) << codec_name(codec) << " " << nbytes;
        ASSERT_LT(stored.size(), raw.size());
        Bytes target(nbytes);
        decompress(stored, codec, target);
        ASSERT_EQ(target, raw) << codec_name(codec) << " " << nbytes << " level " << level;
      }
    }
  }
}

TEST(Compress, planes_make_weights_smaller) {
  const Bytes raw = weights(1 << 16, 1);
  EXPECT_LT(compressed(raw, Codec::kZstdPlanes4).size(), raw.size() * 9 / 10);
  const Bytes plain = compressed(raw, Codec::kZstd);
  EXPECT_TRUE(plain.empty() || compressed(raw, Codec::kZstdPlanes4).size() < plain.size());
}

TEST(Compress, what_does_not_shrink_is_left_to_none) {
  for (const Codec codec : kZstdCodecs) {
    EXPECT_TRUE(compressed(noise(100000), codec).empty());
    EXPECT_TRUE(compressed(noise(1), codec).empty());
    EXPECT_TRUE(compressed({}, codec).empty());
  }
  EXPECT_TRUE(compressed(Bytes(1000, 0), Codec::kNone).empty());
}

TEST(Compress, a_chunk_that_did_not_shrink_does_not_harm_the_next) {
  const Bytes raw(5000, 1);
  const Bytes before = compressed(raw, Codec::kZstd);
  EXPECT_TRUE(compressed(noise(100000), Codec::kZstd).empty());
  EXPECT_EQ(compressed(raw, Codec::kZstd), before);
}

TEST(Compress, never_writes_beyond_the_raw_size) {
  const Bytes raw = noise(10000);
  Bytes target(raw.size() + 64, 0xA5);
  compress(raw, Codec::kZstdPlanes2, 1, target.data());
  EXPECT_EQ(Bytes(target.end() - 64, target.end()), Bytes(64, 0xA5));
}

TEST(Compress, threads_do_not_share_contexts) {
  std::vector<std::jthread> threads;
  for (std::uint64_t i = 0; i < 4; ++i) {
    threads.emplace_back([i] {
      for (int round = 0; round < 5; ++round) {
        const Bytes raw = weights(10000 + 1000 * i, i);
        Bytes target(raw.size());
        decompress(compressed(raw, Codec::kZstdPlanes4), Codec::kZstdPlanes4, target);
        EXPECT_EQ(target, raw);
      }
    });
  }
}

TEST(Decompress, none_is_a_copy_of_exactly_the_raw_size) {
  const Bytes raw = noise(100);
  EXPECT_EQ(refusal(raw, 100, Codec::kNone), "");
  EXPECT_EQ(refusal(raw, 99, Codec::kNone), "stored chunk has another size");
  EXPECT_EQ(refusal(raw, 101, Codec::kNone), "stored chunk has another size");
}

TEST(Decompress, refuses_every_other_raw_size) {
  const Bytes stored = compressed(Bytes(5000, 1), Codec::kZstd);
  EXPECT_EQ(refusal(stored, 5000), "");
  for (const std::size_t nbytes : {0u, 1u, 4096u, 4999u, 5001u, 8192u}) {
    EXPECT_NE(refusal(stored, nbytes), "") << nbytes;
  }
}

TEST(Decompress, refuses_anything_beside_one_frame) {
  const Bytes raw(5000, 1);
  const Bytes frame = zstd_frame(raw);
  const Bytes empty_frame = zstd_frame({});
  const Bytes skippable = {0x50, 0x2A, 0x4D, 0x18, 4, 0, 0, 0, 'h', 'i', 'd', 'e'};
  ASSERT_EQ(refusal(frame, raw.size()), "");
  EXPECT_EQ(refusal(frame + Bytes{0}, raw.size()), "zstd: bytes after the frame");
  EXPECT_EQ(refusal(frame + frame, raw.size()), "zstd: bytes after the frame");
  EXPECT_EQ(refusal(frame + frame, 2 * raw.size()), "zstd: bytes after the frame");
  EXPECT_EQ(refusal(frame + empty_frame, raw.size()), "zstd: bytes after the frame");
  EXPECT_EQ(refusal(frame + skippable, raw.size()), "zstd: bytes after the frame");
  EXPECT_EQ(refusal(skippable + frame, raw.size()), "zstd: not a zstd frame");
  EXPECT_EQ(refusal(skippable, 0), "zstd: not a zstd frame");
  EXPECT_EQ(refusal({}, 0), "zstd: not a zstd frame");
  EXPECT_EQ(refusal(raw, raw.size()), "zstd: not a zstd frame");
}

TEST(Decompress, refuses_dictionaries) {
  const Bytes raw = noise(5000);
  // A dictionary with an id: magic, id, then content that need not be valid for the header to carry the id.
  Bytes frame = zstd_frame(Bytes(5000, 1), {{ZSTD_c_contentSizeFlag, 0}});
  frame[4] |= 1;  // one byte of dictionary id follows the window
  frame.insert(frame.begin() + 6, 0x11);
  EXPECT_EQ(refusal(frame, 5000), "zstd: frame needs a dictionary");
  // Raw content as a dictionary leaves no id; without it the frame refers to bytes that are not there.
  EXPECT_NE(refusal(zstd_frame(raw, {}, raw), raw.size()), "");
}

TEST(Decompress, refuses_windows_beyond_the_chunk) {
  const Bytes raw(5000, 1);
  EXPECT_EQ(refusal(zstd_frame(raw, {{ZSTD_c_contentSizeFlag, 0}}), raw.size()), "");
  Bytes frame = zstd_frame(raw, {{ZSTD_c_contentSizeFlag, 0}});
  ASSERT_EQ(frame[4] & 0x20, 0) << "has a window byte";
  for (const unsigned window_log : {14u, 20u, 27u, 31u, 41u}) {
    frame[5] = static_cast<std::uint8_t>((window_log - 10) << 3);
    EXPECT_EQ(refusal(frame, raw.size()), "zstd: window is larger than the chunk") << window_log;
  }
  Bytes single = zstd_frame(raw);
  ASSERT_NE(single[4] & 0x20, 0) << "single segment: the window is the content";
  EXPECT_EQ(refusal(single, 3000), "zstd: window is larger than the chunk");
}

TEST(Decompress, refuses_every_truncation) {
  const Bytes raw = weights(500, 1);
  const Bytes stored = compressed(raw, Codec::kZstdPlanes4);
  ASSERT_FALSE(stored.empty());
  for (std::size_t nbytes = 0; nbytes < stored.size(); ++nbytes) {
    ASSERT_NE(refusal(Bytes(stored.begin(), stored.begin() + static_cast<std::ptrdiff_t>(nbytes)), raw.size(),
                      Codec::kZstdPlanes4),
              "");
  }
}

TEST(XorInto, is_the_naive_loop_at_every_size_and_alignment) {
  const Bytes left = noise(300);
  Bytes right = weights(100, 3);
  for (std::size_t shift = 0; shift < 9; ++shift) {
    for (std::size_t nbytes = 0; nbytes < 200; ++nbytes) {
      Bytes target = right;
      xor_into({left.data() + shift, nbytes}, {target.data() + 8 - shift, nbytes});
      Bytes expected = right;
      for (std::size_t i = 0; i < nbytes; ++i) {
        expected[8 - shift + i] = static_cast<std::uint8_t>(expected[8 - shift + i] ^ left[shift + i]);
      }
      ASSERT_EQ(target, expected) << nbytes << " bytes, shift " << shift;
    }
  }
}

TEST(CompressXor, difference_and_reference_give_back_the_same_bytes) {
  for (const Codec codec : kXorCodecs) {
    for (const std::size_t nbytes : {256u, 1000u, 4096u, 65537u, 65539u, 65543u, 1u << 20}) {
      Bytes reference = weights(nbytes / 4 + 1, nbytes);
      Bytes raw = trained(reference);
      reference.resize(nbytes);
      raw.resize(nbytes);
      const Bytes stored = compressed_xor(raw, reference, codec);
      ASSERT_FALSE(stored.empty()) << codec_name(codec) << " " << nbytes;
      Bytes target = reference;
      decompress_xor(stored, codec, target);
      ASSERT_EQ(target, raw) << codec_name(codec) << " " << nbytes;
      // The other way around: the difference first, the reference onto it.
      decompress(stored, codec, target);
      decompress_xor(reference, Codec::kNone, target);
      ASSERT_EQ(target, raw) << codec_name(codec) << " " << nbytes;
    }
  }
}

TEST(CompressXor, differences_of_a_chain_add_up_in_any_order) {
  const Bytes first = weights(5000, 4);
  const Bytes second = trained(first);
  Bytes third = second;
  std::fill(third.begin(), third.begin() + 777, std::uint8_t{9});
  const Bytes keyframe = compressed(first, Codec::kZstdPlanes4);
  const Bytes to_second = compressed_xor(second, first, Codec::kXorZstdPlanes4);
  const Bytes to_third = compressed_xor(third, second, Codec::kXorZstd);
  Bytes target(first.size());
  decompress(to_third, Codec::kXorZstd, target);
  decompress_xor(keyframe, Codec::kZstdPlanes4, target);
  decompress_xor(to_second, Codec::kXorZstdPlanes4, target);
  EXPECT_EQ(target, third);
}

TEST(CompressXor, makes_a_small_change_of_weights_smaller_than_planes_alone) {
  const Bytes before = weights(1 << 16, 1);
  const Bytes after = trained(before);
  EXPECT_LT(compressed_xor(after, before, Codec::kXorZstdPlanes4).size(),
            compressed(after, Codec::kZstdPlanes4).size() * 9 / 10);
}

TEST(CompressXor, another_reference_gives_other_bytes) {
  const Bytes reference = weights(1000, 5);
  const Bytes raw = trained(reference);
  const Bytes stored = compressed_xor(raw, reference, Codec::kXorZstdPlanes4);
  Bytes target = reference;
  target[123] ^= 1;
  decompress_xor(stored, Codec::kXorZstdPlanes4, target);
  EXPECT_NE(target, raw);
  target[123] ^= 1;
  EXPECT_EQ(target, raw);
}

TEST(CompressXor, what_does_not_shrink_is_left_to_none) {
  const Bytes raw = noise(100000);
  for (const Codec codec : kXorCodecs) {
    EXPECT_TRUE(compressed_xor(raw, Bytes(raw.size(), 0), codec).empty());
    EXPECT_FALSE(compressed_xor(raw, raw, codec).empty()) << "no difference";
    EXPECT_TRUE(compressed_xor({}, {}, codec).empty());
  }
}

TEST(CompressXor, codecs_and_references_that_do_not_belong_together_are_refused) {
  const Bytes raw(100, 1);
  Bytes target(100);
  EXPECT_THROW(compress(raw, Codec::kXorZstd, 1, target.data()), std::invalid_argument);
  EXPECT_THROW(compress(raw, raw, Codec::kZstd, 1, target.data()), std::invalid_argument);
  EXPECT_THROW(compress(raw, raw, Codec::kNone, 1, target.data()), std::invalid_argument);
  EXPECT_THROW(compress(raw, Bytes(99), Codec::kXorZstd, 1, target.data()), std::invalid_argument);
  EXPECT_THROW(compress(raw, {}, Codec::kXorZstd, 1, target.data()), std::invalid_argument);
}

TEST(DecompressXor, leaves_the_bytes_alone_when_it_refuses) {
  const Bytes reference = weights(500, 6);
  const Bytes stored = compressed_xor(trained(reference), reference, Codec::kXorZstdPlanes4);
  ASSERT_FALSE(stored.empty());
  for (std::size_t nbytes = 0; nbytes < stored.size(); ++nbytes) {
    Bytes target = reference;
    const std::span<const std::uint8_t> cut(stored.data(), nbytes);
    ASSERT_THROW(decompress_xor(cut, Codec::kXorZstdPlanes4, target), CorruptError) << nbytes;
    ASSERT_EQ(target, reference);
  }
  Bytes target = reference;
  EXPECT_THROW(decompress_xor(Bytes(target.size() - 1), Codec::kNone, target), CorruptError);
  EXPECT_THROW(decompress_xor(Bytes(target.size() + 1), Codec::kNone, target), CorruptError);
  EXPECT_EQ(target, reference);
}

TEST(DecompressXor, survives_random_damage) {
  std::mt19937_64 random(testing::seed());
  const Bytes reference = weights(2000, 7);
  const Bytes raw = trained(reference);
  const Bytes stored = compressed_xor(raw, reference, Codec::kXorZstdPlanes4);
  ASSERT_FALSE(stored.empty());
  int refused = 0;
  for (int round = 0; round < 1000; ++round) {
    Bytes damaged = stored;
    damaged[random() % (round % 2 == 0 ? 32 : damaged.size())] = static_cast<std::uint8_t>(random());
    Bytes target = reference;
    try {
      decompress_xor(damaged, Codec::kXorZstdPlanes4, target);
    } catch (const CorruptError&) {
      ++refused;
    }
  }
  EXPECT_GT(refused, 50);
}

// Damage may still decode (the digest finds that); it must never read or write outside the buffers, which the sanitizer
// run sees.
TEST(Decompress, survives_random_damage) {
  std::mt19937_64 random(testing::seed());
  const Bytes raw = weights(2000, 2);
  const Bytes stored = compressed(raw, Codec::kZstdPlanes4);
  ASSERT_FALSE(stored.empty());
  int refused = 0;
  for (int round = 0; round < 2000; ++round) {
    Bytes damaged = stored;
    for (std::uint64_t i = 0; i <= random() % 3; ++i) {
      damaged[random() % (round % 2 == 0 ? 32 : damaged.size())] = static_cast<std::uint8_t>(random());
    }
    refused += refusal(damaged, raw.size(), Codec::kZstdPlanes4).empty() ? 0 : 1;
  }
  EXPECT_GT(refused, 100);
}

}  // namespace
}  // namespace snapstone::codec
