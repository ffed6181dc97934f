// One state, saved under a thousand orders of the devices' work, in every mode of the fake driver, behind every kind of
// fence and with any amount of memory: always the same file and the same chunk table, which are those of a save of the
// same tensors from the host. docs/format.md leaves a writer no choice: chunks lie in the order of their records.
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <map>
#include <numeric>

#include "pipeline/device_fixture.h"

namespace snapstone::pipeline {
namespace {

enum class Kind { kPlain, kCompressed, kDelta };
enum class FenceKind { kNow, kStep, kSynchronous, kStaged };

constexpr Kind kKinds[] = {Kind::kPlain, Kind::kPlain, Kind::kDelta, Kind::kPlain, Kind::kCompressed};
constexpr const char* kModes[] = {"chaos", "chaos", "eager", "chaos", "lazy"};
constexpr std::uint64_t kSlots[] = {3, 14, 20, 48};

// A matrix of bytes on the host that is saved by its columns.
class Transposed {
 public:
  explicit Transposed(const Bytes& values) : side_(static_cast<std::int64_t>(std::sqrt(values.size()))) {
    memory_.resize(values.size());
    for (std::int64_t i = 0; i < side_; ++i) {
      for (std::int64_t j = 0; j < side_; ++j) memory_[j * side_ + i] = values[i * side_ + j];
    }
  }
  StridedView view() { return {memory_.data(), 1, {side_, side_}, {1, side_}}; }

 private:
  std::int64_t side_;
  Bytes memory_;
};

class DeviceSeeds : public DeviceTest {
 protected:
  static constexpr std::size_t kTransposed = 2;

  void SetUp() override {
    DeviceTest::SetUp();
    random_.seed(1);  // the state is the same in every process
    std::vector<Where> where = mixed(5 * kTestChunkBytes + 12345);
    where.insert(where.begin() + kTransposed, {kOnHost, 300 * 300});
    state_ = std::make_unique<DeviceTensors>(random_, where, streams());
    transposed_ = std::make_unique<Transposed>(state_->values().bytes[kTransposed]);
    Tensors before = state_->values();
    for (const std::size_t i : {3, 5, 9, 17}) before.bytes[i][before.bytes[i].size() / 2] ^= 1;
    base_ = save(before, "base");
    for (const std::uint64_t slots : kSlots) {
      rings_.push_back(std::make_shared<mem::SlotRing>(kTestChunkBytes));
      rings_.back()->reserve(slots);
    }
    SNAPSTONE_FAKE(fakecuda_fail)("cuMemHostRegister_v2:1+:1");
    rings_[1]->register_with(cuda::Device::of(0));  // a refusal stands
    SNAPSTONE_FAKE(fakecuda_fail)("");
    for (const auto& ring : rings_) ring->register_with(cuda::Device::of(0));
    for (const Kind kind : {Kind::kPlain, Kind::kCompressed, Kind::kDelta}) references_.emplace(kind, reference(kind));
  }
  void TearDown() override {
    state_.reset();
    DeviceTest::TearDown();
  }

  struct File {
    Bytes bytes;
    std::vector<format::ChunkRecord> table;
  };

  SaveOptions options_of(Kind kind) const {
    SaveOptions options = options_;
    options.compress = kind == Kind::kCompressed;
    if (options.compress) options.item_bytes.assign(state_->values().bytes.size(), 2);
    return options;
  }
  SaveBase base_of(Kind kind) const {
    SaveBase base;
    if (kind != Kind::kDelta) return base;
    base.records = base_.table;
    base.references.assign(base.records.size(), SaveBase::kNoRecord);
    for (format::ChunkRecord& record : base.records) record.file = 1;
    base.record_of_chunk.resize(base.records.size());
    std::iota(base.record_of_chunk.begin(), base.record_of_chunk.end(), 0u);
    return base;
  }
  std::shared_ptr<SaveJob> job_of(Kind kind, SaveSources sources, const SaveOptions& options, const std::string& name) {
    os::File file = os::create_file(directory_.fd(), directory_.path(), name, io::rung_is_direct(options.rung));
    return std::make_shared<SaveJob>(state_->layout(), std::move(sources), std::move(file), ring_, options,
                                     base_of(kind));
  }
  File reference(Kind kind) {
    const auto job = job_of(kind, state_->values().sources(), options_of(kind), "reference");
    run(job);
    File file{file_bytes("reference"), job->chunk_table()};
    std::filesystem::remove(directory_ / "reference");
    return file;
  }
  SaveSources sources() {
    SaveSources sources = state_->sources();
    sources.contiguous[kTransposed] = nullptr;
    sources.strided.emplace(kTransposed, transposed_->view());
    return sources;
  }
  // As a trainer would, who then writes other values to the tensors as soon as the fence lets it.
  void save_behind(FenceKind fence_kind, const std::shared_ptr<SaveJob>& job) {
    state_->produce(random_() % 500);
    const auto mark = state_->mark();
    job->enqueue(*mark);
    start(job);
    if (fence_kind == FenceKind::kStaged) {
      ASSERT_TRUE(job->wait_staged(kPatience));
    }
    if (fence_kind == FenceKind::kSynchronous) finish(*job);
    if (fence_kind == FenceKind::kStep) {  // forward and backward
      for (const auto& [device, stream] : streams()) SNAPSTONE_FAKE(fakecuda_enqueue_delay)(device, stream, 300);
    }
    fence(*job);
    state_->overwrite();
    finish(*job);
  }
  void save_under(std::uint64_t seed) {
    random_.seed(seed);
    SNAPSTONE_FAKE(fakecuda_mode)(kModes[seed % std::size(kModes)]);
    SNAPSTONE_FAKE(fakecuda_seed)(seed);
    const Kind kind = kKinds[random_() % std::size(kKinds)];
    ring_ = rings_[random_() % rings_.size()];
    SaveOptions options = options_of(kind);
    options.device.overflow_fraction = random_() % 2 == 0 ? 0.5 : 0;
    options.device.batch_bytes = (1 + random_() % 6) * kTestChunkBytes;
    options.device.dma_bytes = (1 + random_() % 4) * kTestChunkBytes;
    options.device.scratch_bytes = (1 + random_() % 5) * kTestChunkBytes;
    options.device.digests = random_() % 4 != 0;
    options.device.two_phase = random_() % 2 == 0;
    options.eager = random_() % 2 == 0;
    const auto job = job_of(kind, sources(), options, "file");
    save_behind(FenceKind{static_cast<int>(random_() % 4)}, job);
    const File& expected = references_.at(kind);
    ASSERT_TRUE(file_bytes("file") == expected.bytes) << "another file with seed " << seed;
    ASSERT_EQ(job->chunk_table().size(), expected.table.size());
    ASSERT_EQ(std::memcmp(job->chunk_table().data(), expected.table.data(),
                          expected.table.size() * sizeof(format::ChunkRecord)),
              0)
        << "another chunk table with seed " << seed;
    std::filesystem::remove(directory_ / "file");
  }

  std::unique_ptr<DeviceTensors> state_;
  std::unique_ptr<Transposed> transposed_;
  Saved base_;
  std::vector<std::shared_ptr<mem::SlotRing>> rings_;
  std::map<Kind, File> references_;
};

std::uint64_t seed_count() {
  const char* text = std::getenv("SNAPSTONE_TEST_SEEDS");
#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
  constexpr std::uint64_t kDefault = 60;
#else
  constexpr std::uint64_t kDefault = 1000;
#endif
  return text != nullptr ? std::strtoull(text, nullptr, 10) : kDefault;
}

TEST_F(DeviceSeeds, every_one_gives_the_same_file) {
  const std::uint64_t first = testing::seed() % 1'000'000;
  for (std::uint64_t seed = first; seed < first + seed_count(); ++seed) {
    save_under(seed);
    if (seed % 20 == 0) SNAPSTONE_FAKE(fakecuda_drain)();
    ASSERT_EQ(testing::fake_violations(), "") << "seed " << seed;
    ASSERT_FALSE(HasFailure()) << "seed " << seed;
  }
}

}  // namespace
}  // namespace snapstone::pipeline
