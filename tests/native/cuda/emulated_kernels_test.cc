// csrc/cuda/kernels.cu, run on the CPU thread by thread, against libxxhash and against the references that the fake
// driver runs in its place.
//
// Invariants: bytes outside of a kernel's targets stay; loads are aligned and touch only vectors that hold a byte of
// their source; the order in which threads run changes nothing.
#include "cuda/emulated_cuda.h"
// After the words of CUDA are defined.
#include "cuda/kernels.cu"

#include <gtest/gtest.h>
#include <xxhash.h>

#include <algorithm>
#include <array>
#include <functional>
#include <memory>
#include <random>
#include <vector>

#include "kernel_table.h"
#include "seed.h"

namespace snapstone::cuda {

alignas(16) uint4 shared[kDigestSharedBytes / sizeof(uint4)];

namespace {

// Fibers are fast. ThreadSanitizer would have to be told of each of their switches, and has tests with threads.
class OnFibers : public ::testing::Test {
 protected:
  void SetUp() override {
#if defined(__SANITIZE_THREAD__)
    GTEST_SKIP() << "the tests named OnThreads are for ThreadSanitizer";
#endif
  }
};
class DigestKernel : public OnFibers {};
class GatherKernel : public OnFibers {};
class CompareKernel : public OnFibers {};
class ScatterKernel : public OnFibers {};

enum class Engine { kFibers, kThreads };

using Bytes = std::vector<std::uint8_t>;

Bytes noise(std::size_t nbytes, std::uint64_t salt = 0) {
  std::mt19937_64 random(testing::seed() + salt);
  Bytes bytes(nbytes);
  for (std::uint8_t& byte : bytes) byte = static_cast<std::uint8_t>(random());
  return bytes;
}

// Memory that starts at a multiple of 16 and ends at one.
class Memory {
 public:
  explicit Memory(std::size_t nbytes) : nbytes_(nbytes), vectors_((nbytes + 15) / 16) { fill(0xA5); }
  explicit Memory(const Bytes& bytes) : Memory(bytes.size()) { std::ranges::copy(bytes, data()); }
  template <class T>
  explicit Memory(const std::vector<T>& items) : Memory(items.size() * sizeof(T)) {
    std::memcpy(data(), items.data(), nbytes_);
  }

  void fill(std::uint8_t value) { std::memset(data(), value, vectors_.size() * sizeof(uint4)); }
  std::uint8_t* data() { return reinterpret_cast<std::uint8_t*>(vectors_.data()); }
  DevicePointer address() { return reinterpret_cast<DevicePointer>(data()); }
  Bytes bytes() { return {data(), data() + nbytes_}; }

 private:
  std::size_t nbytes_;
  std::vector<uint4> vectors_;
};

void readable(DevicePointer begin, std::uint64_t nbytes) { emulated::readable.push_back({begin, begin + nbytes}); }

template <class Kernel, class Parameters>
void launch(Kernel* kernel, const Parameters& parameters, emulated::Index grid, unsigned threads,
            Engine engine = Engine::kFibers) {
  static std::uint64_t order = testing::seed();
  const std::function<void()> run = [&] { kernel(parameters); };
  for (unsigned y = 0; y < grid.y; ++y) {
    for (unsigned x = 0; x < grid.x; ++x) {
      std::memset(shared, 0xDD, sizeof shared);
      if (engine == Engine::kFibers) {
        emulated::FiberBlock({x, y, 0}, grid, threads, ++order).run(run);
      } else {
        emulated::ThreadBlock({x, y, 0}, grid, threads).run(run);
      }
    }
  }
}

// Host memory as the references see it.
class HostMemory final : public fakecuda::KernelMemory {
 public:
  const std::uint8_t* read(std::uint64_t address, std::uint64_t) override { return write(address, 0); }
  std::uint8_t* write(std::uint64_t address, std::uint64_t) override {
    return reinterpret_cast<std::uint8_t*>(address);
  }
};

template <class Parameters>
void launch_reference(const char* name, const Parameters& parameters, emulated::Index grid, unsigned threads,
                      unsigned shared_bytes = 0) {
  HostMemory memory;
  for (const fakecuda::ReferenceKernel& kernel : fakecuda::reference_kernels()) {
    if (std::string(kernel.name) != name) continue;
    ASSERT_EQ(kernel.parameter_bytes, std::vector<std::size_t>{sizeof parameters});
    kernel.run({{grid.x, grid.y, 1}, {threads, 1, 1}, shared_bytes, {&parameters}}, memory);
    return;
  }
  FAIL() << "no reference for " << name;
}

// ---- digest
// -----------------------------------------------------------------------------------------------------------

using Digest = std::array<std::uint8_t, 16>;

Digest of_libxxhash(const std::uint8_t* data, std::size_t nbytes, std::uint64_t seed) {
  XXH128_canonical_t canonical;
  XXH128_canonicalFromHash(&canonical, XXH3_128bits_withSeed(data, nbytes, seed));
  Digest result;
  std::ranges::copy(canonical.digest, result.begin());
  return result;
}

struct Piece {
  std::size_t begin;
  std::size_t nbytes;
};

void expect_digests(Memory& data, const std::vector<Piece>& pieces, std::uint64_t seed,
                    Engine engine = Engine::kFibers) {
  emulated::readable.clear();
  std::vector<DigestItem> items;
  for (const Piece& piece : pieces) items.push_back({data.address() + piece.begin, piece.nbytes});
  Memory item_memory(items);
  Memory digests(16 * pieces.size() + 16);
  Memory reference(16 * pieces.size() + 16);
  const auto count = static_cast<unsigned>(pieces.size());
  for (unsigned i = 0; i < count; ++i) {
    // One at a time, so that loads of one are not taken for loads of another.
    emulated::readable.assign(1, {items[i].address, items[i].address + items[i].nbytes});
    const DigestParameters one{item_memory.address() + i * sizeof(DigestItem), digests.address() + 16 * i, seed};
    launch(snapstone_digest, one, {1, 1, 1}, kDigestThreads, engine);
    Digest digest;
    std::copy_n(digests.data() + 16 * i, 16, digest.begin());
    ASSERT_EQ(digest, of_libxxhash(data.data() + pieces[i].begin, pieces[i].nbytes, seed))
        << pieces[i].nbytes << " bytes at " << pieces[i].begin << ", seed " << seed;
  }
  launch_reference(kDigestKernel, DigestParameters{item_memory.address(), reference.address(), seed}, {count, 1, 1},
                   kDigestThreads, kDigestSharedBytes);
  EXPECT_EQ(digests.bytes(), reference.bytes());  // also behind the last
}

constexpr std::size_t kTileBytes = kDigestTileBlocks * xxh3::kBlockBytes;

// Lengths around all places where the kernel takes another road.
std::vector<std::size_t> lengths(std::size_t end) {
  std::vector<std::size_t> result;
  for (std::size_t nbytes = 0; nbytes <= 300; ++nbytes) result.push_back(nbytes);
  for (const std::size_t unit : {std::size_t{1024}, std::size_t{16 * 1024}, kTileBytes / 2, kTileBytes}) {
    for (std::size_t at = unit; at < end; at += unit * (unit == 1024 ? 3 : 1)) {
      for (const int offset : {-65, -64, -1, 0, 1, 63, 64, 65, 512}) {
        result.push_back(at + static_cast<std::size_t>(offset));
      }
    }
  }
  return result;
}

TEST_F(DigestKernel, equals_libxxhash_around_every_boundary) {
  Memory data(noise(3 * kTileBytes + 4096));
  std::vector<Piece> pieces;
  for (const std::size_t nbytes : lengths(3 * kTileBytes)) pieces.push_back({0, nbytes});
  expect_digests(data, pieces, 0);
}

TEST_F(DigestKernel, equals_libxxhash_at_every_alignment) {
  Memory data(noise(2 * kTileBytes + 4096));
  std::vector<Piece> pieces;
  for (std::size_t alignment = 0; alignment < 17; ++alignment) {
    for (const std::size_t nbytes : {std::size_t{5}, std::size_t{100}, std::size_t{241}, std::size_t{1025},
                                     std::size_t{5000}, kTileBytes + 1, 2 * kTileBytes + 77}) {
      pieces.push_back({alignment, nbytes});
    }
  }
  expect_digests(data, pieces, 0);
}

TEST_F(DigestKernel, equals_libxxhash_with_seeds) {
  Memory data(noise(kTileBytes + 4096));
  std::mt19937_64 random(testing::seed());
  for (const std::uint64_t seed : {std::uint64_t{1}, ~std::uint64_t{0}, std::uint64_t{random()}}) {
    std::vector<Piece> pieces;
    for (const std::size_t nbytes : {std::size_t{0}, std::size_t{3}, std::size_t{8}, std::size_t{16}, std::size_t{128},
                                     std::size_t{240}, std::size_t{241}, std::size_t{2048}, kTileBytes + 1000}) {
      pieces.push_back({random() % 16, nbytes});
    }
    expect_digests(data, pieces, seed);
  }
}

TEST_F(DigestKernel, equals_libxxhash_for_a_mebibyte_and_for_random_pieces) {
  Memory data(noise((1 << 20) + 64));
  std::mt19937_64 random(testing::seed());
  std::vector<Piece> pieces = {{0, 1 << 20}, {7, 1 << 20}};
  for (int i = 0; i < 30; ++i) pieces.push_back({random() % 64, random() % (4 * kTileBytes)});
  expect_digests(data, pieces, 0);
}

// Under ThreadSanitizer also: no two threads of the kernel meet at one word of shared memory without a barrier.
TEST(DigestKernelOnThreads, equals_libxxhash) {
  Memory data(noise(3 * kTileBytes + 4096));
  expect_digests(data, {{0, 2 * kTileBytes + 1500}, {3, kTileBytes + 100}, {0, 700}}, 5, Engine::kThreads);
}

TEST_F(DigestKernel, reads_nothing_outside_of_its_vectors) {
  Memory data(noise(4096));
  emulated::readable.assign(1, {data.address(), data.address() + 1024});
  Memory items(std::vector<DigestItem>{{data.address(), 1100}});
  Memory digests(16);
  const DigestParameters parameters{items.address(), digests.address(), 0};
  EXPECT_THROW(launch(snapstone_digest, parameters, {1, 1, 1}, kDigestThreads), std::logic_error);
}

// ---- gather
// -----------------------------------------------------------------------------------------------------------

TEST_F(GatherKernel, copies_every_size_between_every_two_alignments) {
  std::mt19937_64 random(testing::seed());
  const Bytes bytes = noise(128 << 10);
  Memory source(bytes);
  for (const unsigned slices : {1u, 3u, kGatherSlicesMax}) {
    Memory target(400 << 10);
    Memory reference(400 << 10);
    std::vector<GatherItem> items;
    std::size_t end = 1;
    emulated::readable.clear();
    for (std::size_t i = 0; i < 60; ++i) {
      const std::size_t nbytes = i < 40 ? i : i < 55 ? random() % 5000 : random() % (3 * kGatherSliceBytes / 2);
      items.push_back({source.address() + random() % 64, target.address() + end, nbytes});
      readable(items.back().source, nbytes);
      end += nbytes + 1 + random() % 32;
    }
    ASSERT_LT(end, std::size_t{400 << 10});
    const auto count = static_cast<unsigned>(items.size());
    Memory item_memory(items);
    launch(snapstone_gather, GatherParameters{item_memory.address()}, {count, slices, 1}, kGatherThreads);
    for (GatherItem& item : items) item.target += reference.address() - target.address();
    Memory reference_items(items);
    launch_reference(kGatherKernel, GatherParameters{reference_items.address()}, {count, slices, 1}, kGatherThreads);
    ASSERT_EQ(target.bytes(), reference.bytes()) << slices << " slices";
  }
}

// ---- compare
// ----------------------------------------------------------------------------------------------------------

TEST_F(CompareKernel, flags_every_digest_with_one_bit_wrong) {
  constexpr unsigned kCount = 300;
  const Bytes digests = noise(16 * kCount);
  Bytes expected = digests;
  for (unsigned i = 0; i < 128; ++i) expected[16 * (2 * i) + i / 8] ^= static_cast<std::uint8_t>(1u << i % 8);
  Memory a(digests);
  Memory b(expected);
  Memory changed(kCount + 16);
  Memory reference(kCount + 16);
  constexpr unsigned kBlocks = (kCount + kCompareThreads - 1) / kCompareThreads;
  CompareParameters parameters{a.address(), b.address(), changed.address(), kCount};
  launch(snapstone_compare, parameters, {kBlocks, 1, 1}, kCompareThreads);
  for (unsigned i = 0; i < kCount; ++i) ASSERT_EQ(changed.data()[i], i % 2 == 0 && i < 256 ? 1 : 0) << i;
  parameters.changed = reference.address();
  launch_reference(kCompareKernel, parameters, {kBlocks, 1, 1}, kCompareThreads);
  EXPECT_EQ(changed.bytes(), reference.bytes());
}

// ---- scatter
// ----------------------------------------------------------------------------------------------------------

// A box whose runs neither overlap in the target nor leave either memory. Runs, source and target each have numbers
// that are multiples of some power of 2, so that any of them can be what decides the width.
BoxItem random_box(std::mt19937_64& random, DevicePointer source, DevicePointer target) {
  const auto grain = [&random] { return std::uint32_t{1} << random() % 6; };
  const std::uint32_t run_grain = grain();
  const std::uint32_t source_grain = grain();
  const std::uint32_t target_grain = grain();
  const auto span = [&random](std::uint32_t nbytes, std::uint32_t multiple) {
    return static_cast<std::int64_t>((nbytes + multiple - 1) / multiple + random() % 3) * multiple;
  };
  BoxItem box{};
  box.dims = static_cast<std::uint32_t>(random() % 5);
  box.run_bytes = static_cast<std::uint32_t>(run_grain * (1 + random() % 5));
  std::int64_t source_span = span(box.run_bytes, source_grain);
  std::int64_t target_span = span(box.run_bytes, target_grain);
  std::int64_t negative = 0;
  for (std::uint32_t dim = box.dims; dim-- > 0;) {
    box.sizes[dim] = static_cast<std::uint32_t>(1 + random() % 4);
    box.source_strides[dim] = source_span;
    box.target_strides[dim] = target_span;
    source_span *= box.sizes[dim];
    target_span *= box.sizes[dim];
    if (random() % 4 == 0) {  // backwards through the target
      negative += box.target_strides[dim] * (box.sizes[dim] - 1);
      box.target_strides[dim] = -box.target_strides[dim];
    }
  }
  box.source = source + source_grain * (random() % 8);
  box.target = target + target_grain * (random() % 8) + static_cast<DevicePointer>(negative);
  return box;
}

TEST_F(ScatterKernel, equals_the_reference_for_boxes_of_every_width) {
  constexpr std::size_t kNbytes = 512 << 10;
  std::mt19937_64 random(testing::seed());
  Memory source(noise(kNbytes));
  emulated::readable.assign(1, {source.address(), source.address() + kNbytes});
  for (int round = 0; round < 60; ++round) {
    Memory target(kNbytes);
    Memory reference(kNbytes);
    BoxItem box = random_box(random, source.address(), target.address());
    const unsigned slices = 1 + static_cast<unsigned>(random() % 4);
    Memory items(std::vector<BoxItem>{box});
    launch(snapstone_scatter, ScatterParameters{items.address()}, {1, slices, 1}, kScatterThreads);
    box.target += reference.address() - target.address();
    Memory reference_items(std::vector<BoxItem>{box});
    launch_reference(kScatterKernel, ScatterParameters{reference_items.address()}, {1, slices, 1}, kScatterThreads);
    ASSERT_EQ(target.bytes(), reference.bytes()) << "round " << round;
  }
}

TEST_F(ScatterKernel, takes_all_eight_dimensions) {
  BoxItem box{};
  box.dims = kBoxDimsMax;
  box.run_bytes = 2;
  std::int64_t span = 2;
  for (unsigned dim = 0; dim < kBoxDimsMax; ++dim) {  // reversed: every dimension is transposed
    box.sizes[dim] = 2;
    box.target_strides[dim] = span;
    box.source_strides[kBoxDimsMax - 1 - dim] = span;
    span *= 2;
  }
  Memory source(noise(512));
  Memory target(512);
  box.source = source.address();
  box.target = target.address();
  emulated::readable.assign(1, {source.address(), source.address() + 512});
  Memory items(std::vector<BoxItem>{box});
  launch(snapstone_scatter, ScatterParameters{items.address()}, {1, 1, 1}, kScatterThreads);
  for (unsigned i = 0; i < 256; ++i) {
    unsigned reversed = 0;
    for (unsigned bit = 0; bit < 8; ++bit) reversed |= (i >> bit & 1) << (7 - bit);
    ASSERT_EQ(std::memcmp(target.data() + 2 * i, source.data() + 2 * reversed, 2), 0) << i;
  }
}

}  // namespace
}  // namespace snapstone::cuda
