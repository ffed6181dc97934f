// Shards and boxes as a header may describe them, over chunk tables that were accepted: what a plan accepts it carries
// out inside the chunks and the targets, on the host and as placements for devices; the rest is a CorruptError.
#include "pipeline/load_plan.h"

#include <memory>
#include <tuple>

#include "base/error.h"
#include "format/chunk_table.h"
#include "fuzz_target.h"
#include "pipeline/placement.h"
#include "real_box.h"

namespace snapstone {
namespace {

using fuzz::Bytes;
using fuzz::Input;
using fuzz::RealBox;
using fuzz::require;
using pipeline::LoadPlan;
using pipeline::Placement;
using pipeline::ReadTarget;

constexpr std::uint64_t kFileBytes = 1 << 20;
constexpr std::uint64_t kTargetBytesMax = 1 << 20;
constexpr std::int32_t kDevice = 0;

std::shared_ptr<const pipeline::ChunkRecords> take_records(Input& input) {
  pipeline::ChunkRecords records(input.below(9));
  for (format::ChunkRecord& record : records) {
    record.offset = input.below(128) * kPageBytes;
    record.raw_bytes = record.stored_bytes = 1 + static_cast<std::uint32_t>(input.below(input.flag() ? 256 : 20000));
  }
  return std::make_shared<const pipeline::ChunkRecords>(std::move(records));
}

// What one item of the plan fills, and fills again by placements.
struct Target {
  std::unique_ptr<RealBox> box;
  Bytes memory;
  std::uint8_t* data() { return memory.data() + (box ? box->base : 0); }
};

class Trial {
 public:
  explicit Trial(Input& input) : input_(input) {
    for (auto& records : records_) records = take_records(input);
    const std::uint64_t files[] = {kFileBytes};
    for (const auto& records : records_) format::check_chunk_table(*records, files, kFileBytes, "index");
  }

  void run() {
    LoadPlan plan({{records_[0], 0, "index 0"}, {records_[1], 1, "index 1"}});
    for (std::uint64_t items = 1 + input_.below(4); items > 0; --items) {
      try {
        add(plan);
      } catch (const CorruptError&) {
        return;  // a load ends here
      }
    }
    plan.finish(input_.number() % kFileBytes);
    require(plan.raw_bytes_max() <= kFileBytes && plan.files_needed().size() <= 2, "only the chunks that exist");
    for (const pipeline::ReadChunk& chunk : plan.chunks()) carry_out(plan, chunk);
  }

 private:
  void add(LoadPlan& plan) {
    const auto device = input_.flag() ? kDevice : pipeline::kHost;
    const bool whole = input_.flag();
    Target target;
    if (!whole) target.box = std::make_unique<RealBox>(input_);
    pipeline::StoredShard shard{static_cast<std::uint32_t>(input_.below(2)), input_.number(), input_.number(),
                                input_.number(), 0};
    shard.nbytes = !whole && input_.flag() ? static_cast<std::uint64_t>(target.box->shard_bytes()) : input_.number();
    pipeline::ChunkWindow window;
    if (input_.flag()) window = {input_.number(), input_.number()};
    target.memory.resize(whole ? std::min(shard.nbytes, kTargetBytesMax) : target.box->memory_bytes);
    targets_.push_back(std::move(target));
    if (whole) {
      plan.add_contiguous(shard, targets_.back().data(), window, device);
      require(shard.nbytes <= 8 * 20000, "no shard is longer than its chunks");
      return;
    }
    BoxTarget box = targets_.back().box->in(targets_.back().memory);
    const bool real = !input_.flag();
    if (!real) spoil(box);
    plan.add_box(shard, box, window, device);
    if (!real) targets_.back().memory.clear(), unreal_ = true;
  }

  // Numbers of the shard that no memory stands behind.
  void spoil(BoxTarget& box) {
    for (std::vector<std::int64_t>* numbers : {&box.shard_sizes, &box.box_offsets, &box.target.sizes}) {
      for (std::int64_t& number : *numbers) {
        if (input_.byte() < 64) number = input_.signed_number();
      }
      if (input_.byte() < 8) numbers->resize(input_.below(70), 1);
    }
    box.target.stride_bytes.resize(box.target.sizes.size(), 1);
  }

  void carry_out(const LoadPlan& plan, const pipeline::ReadChunk& chunk) {
    const std::uint64_t raw_bytes = plan.record(chunk).raw_bytes;
    for (const ReadTarget& target : plan.targets(chunk)) {
      require(target.shard_begin < target.shard_end && target.at + (target.shard_end - target.shard_begin) <= raw_bytes,
              "a target takes bytes of its chunk alone");
    }
    if (unreal_) return;
    const Bytes raw = fuzz::pattern(raw_bytes, static_cast<std::uint32_t>(chunk.chunk + 17 * chunk.table));
    for (Target& target : targets_) std::fill(target.memory.begin(), target.memory.end(), 0);
    for (const ReadTarget& target : plan.targets(chunk)) scatter_to(plan, target, raw);
    std::vector<Bytes> expected;
    for (Target& target : targets_) {
      expected.push_back(target.memory);
      std::fill(target.memory.begin(), target.memory.end(), 0);
    }
    for (const std::int32_t device : {pipeline::kHost, kDevice}) {
      place(input_.flag() ? place_on_device(plan, chunk, device)
                          : place_from_host(plan, chunk, device, input_.flag() ? raw_bytes : input_.byte()),
            raw);
    }
    for (std::size_t i = 0; i < targets_.size(); ++i) {
      require(targets_[i].memory == expected[i], "placements fill targets as the host does");
    }
  }

  static void scatter_to(const LoadPlan& plan, const ReadTarget& target, const Bytes& raw) {
    const std::uint8_t* const source = raw.data() + target.at;
    if (target.contiguous != nullptr) {
      std::memcpy(target.contiguous, source, target.shard_end - target.shard_begin);
    } else {
      scatter(source, static_cast<std::int64_t>(target.shard_begin), static_cast<std::int64_t>(target.shard_end),
              plan.box(target.box));
    }
  }

  static void copy(std::uint64_t target, const std::uint8_t* source, std::uint64_t nbytes) {
    std::memcpy(reinterpret_cast<void*>(target), source, nbytes);
  }

  static void copy_box(const StridedBlock& box, const std::uint8_t* source, std::size_t axis, std::int64_t from,
                       std::int64_t to) {
    if (axis == box.dims.size()) {
      return copy(static_cast<std::uint64_t>(to), source + from, static_cast<std::uint64_t>(box.unit_bytes));
    }
    for (std::int64_t i = 0; i < box.dims[axis].size; ++i) {
      copy_box(box, source, axis + 1, from + i * box.dims[axis].source_stride, to + i * box.dims[axis].target_stride);
    }
  }

  static void place(const Placement& placement, const Bytes& raw) {
    Bytes both(raw);
    both.resize(placement.raw_bytes + placement.packed_bytes);
    for (const Placement::Pack& pack : placement.packs) {
      gather_block(pack.block, raw.data(), both.data() + raw.size() + pack.at);
    }
    for (const cuda::Copy& run : placement.runs) copy(run.dst, both.data() + run.src, run.nbytes);
    for (const cuda::Copy2d& rows : placement.rows) {
      for (std::uint64_t i = 0; i < rows.height; ++i) {
        copy(rows.dst + i * rows.dst_pitch, both.data() + rows.src + i * rows.src_pitch, rows.width_bytes);
      }
    }
    for (const StridedBlock& box : placement.boxes) copy_box(box, both.data(), 0, box.source, box.target);
  }

  Input& input_;
  std::shared_ptr<const pipeline::ChunkRecords> records_[2];
  std::vector<Target> targets_;
  bool unreal_ = false;
};

}  // namespace
}  // namespace snapstone

int snapstone::fuzz::run_input(const std::uint8_t* data, std::size_t size) {
  snapstone::fuzz::Input input(data, size);
  try {
    snapstone::Trial(input).run();
  } catch (const snapstone::CorruptError&) {  // of the chunk table
  }
  return 0;
}
