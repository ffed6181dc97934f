#include <pybind11/stl.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <stdexcept>

#include "base/limits.h"
#include "bind/bind.h"
#include "format/chunk_table.h"
#include "mem/board.h"
#include "os/directory.h"
#include "pipeline/engine.h"
#include "pipeline/load_job.h"

namespace snapstone::bind {
namespace {

using pipeline::LoadJob;
using pipeline::LoadPlan;

// What Python holds of a chunk table, to pass it to one job after the other.
struct Records {
  std::shared_ptr<const pipeline::ChunkRecords> records;
  std::shared_ptr<const pipeline::ChunkReferences> references;

  Records(const py::bytes& table, std::uint64_t reference_count) {
    const std::string_view view(table);
    pipeline::ChunkRecords copy(view.size() / sizeof(format::ChunkRecord));
    std::memcpy(copy.data(), view.data(), copy.size() * sizeof(format::ChunkRecord));
    if (reference_count > 0) {
      references = std::make_shared<const pipeline::ChunkReferences>(format::chunk_references(copy, reference_count));
    }
    records = std::make_shared<const pipeline::ChunkRecords>(std::move(copy));
  }
};

// (records, number of its first data file, path of the index)
using TableArguments = std::vector<std::tuple<Records, std::uint32_t, std::string>>;
// (directory, name, recorded size)
using FileArguments = std::vector<std::tuple<std::string, std::string, std::uint64_t>>;
// (first chunk, count) of the chunks to read
using WindowArguments = std::pair<std::uint64_t, std::uint64_t>;
// ((table, first_chunk, chunk_count, at, nbytes), item_bytes, shard_sizes, box_offsets, box_sizes, data_ptr,
// stride_bytes, window)
using ShardArguments = std::tuple<std::uint32_t, std::uint64_t, std::uint64_t, std::uint64_t, std::uint64_t>;
using Sizes = std::vector<std::int64_t>;
using BoxArguments =
    std::vector<std::tuple<ShardArguments, std::int64_t, Sizes, Sizes, Sizes, std::uint64_t, Sizes, WindowArguments>>;
// (address of the source, first and last byte of the tensor's string there, item_bytes, sizes, data_ptr, stride_bytes)
using PieceArguments =
    std::vector<std::tuple<std::uint64_t, std::int64_t, std::int64_t, std::int64_t, Sizes, std::uint64_t, Sizes>>;

// table, first_chunk, chunk_count, at, nbytes, data_ptr, window
constexpr py::ssize_t kContiguousColumns = 8;

using I32Array = py::array_t<std::int32_t, py::array::c_style>;
// Ordinal by row of the contiguous targets, and by box; -1: on the host. None: all are.
using DeviceTargets = std::optional<std::pair<I32Array, I32Array>>;

pipeline::StoredShard make_shard(const ShardArguments& arguments) {
  const auto& [table, first_chunk, chunk_count, at, nbytes] = arguments;
  return {table, first_chunk, chunk_count, at, nbytes};
}

LoadPlan make_plan(const TableArguments& table_arguments) {
  std::vector<pipeline::ChunkTable> tables;
  for (const auto& [records, first_file, path] : table_arguments) {
    tables.push_back({records.records, first_file, path, records.references});
  }
  return LoadPlan(std::move(tables));
}

// By number of the target; all on the host where there is no array.
class Ordinals {
 public:
  Ordinals(const I32Array* ordinals, py::ssize_t count) : ordinals_(ordinals) {
    if (ordinals != nullptr && ordinals->size() != count)
      throw std::invalid_argument("one device per target is needed");
  }
  std::int32_t operator[](py::ssize_t i) const { return ordinals_ != nullptr ? ordinals_->data()[i] : pipeline::kHost; }

 private:
  const I32Array* ordinals_;
};

void add_targets(LoadPlan& plan, const U64Array& contiguous, const BoxArguments& boxes, const DeviceTargets& devices) {
  if (contiguous.ndim() != 2 || contiguous.shape(1) != kContiguousColumns) {
    throw std::invalid_argument("contiguous targets are rows of 8 numbers");
  }
  const Ordinals of_row(devices ? &devices->first : nullptr, contiguous.shape(0));
  for (py::ssize_t i = 0; i < contiguous.shape(0); ++i) {
    const std::uint64_t* row = contiguous.data(i, 0);
    plan.add_contiguous({static_cast<std::uint32_t>(row[0]), row[1], row[2], row[3], row[4]},
                        reinterpret_cast<std::uint8_t*>(row[5]), {row[6], row[7]}, of_row[i]);
  }
  const Ordinals of_box(devices ? &devices->second : nullptr, static_cast<py::ssize_t>(boxes.size()));
  py::ssize_t box = 0;
  for (const auto& [shard, item_bytes, shard_sizes, box_offsets, box_sizes, data, stride_bytes, window] : boxes) {
    plan.add_box(
        make_shard(shard),
        {shard_sizes, box_offsets, {reinterpret_cast<std::uint8_t*>(data), item_bytes, box_sizes, stride_bytes}},
        {window.first, window.second}, of_box[box++]);
  }
}

cuda::StreamHandle handle(std::uintptr_t stream) { return reinterpret_cast<cuda::StreamHandle>(stream); }

// Opens files by names of one component, or of two: a directory inside the checkpoint, which is never a link, and the
// file. Neighbours share the directories.
class FileOpener {
 public:
  explicit FileOpener(bool direct) : direct_(direct) {}

  os::File open(const std::string& directory_path, const std::string& name) {
    if (directory_.path != directory_path) {
      inner_ = {};
      directory_ = os::open_directory(directory_path);
    }
    const std::size_t slash = name.find('/');
    if (slash == std::string::npos) {
      return os::open_for_read(directory_.fd.get(), directory_.path, name, direct_);
    }
    if (const std::string inner_name = name.substr(0, slash); inner_name != inner_name_ || !inner_.fd) {
      inner_ = os::open_directory_at(directory_, inner_name);
      inner_name_ = inner_name;
    }
    return os::open_for_read(inner_.fd.get(), inner_.path, name.substr(slash + 1), direct_);
  }

 private:
  const bool direct_;
  os::Directory directory_;
  os::Directory inner_;
  std::string inner_name_;
};

// The files that the plan needs; the others, of which a checkpoint with many saves before it has many, stay closed.
std::vector<os::File> open_files(const FileArguments& arguments, const LoadPlan& plan, bool direct, bool uncached) {
  std::vector<bool> needed = plan.files_needed();
  needed.resize(arguments.size());  // LoadJob refuses chunks in others
  std::vector<os::File> files(arguments.size());
  FileOpener opener(direct);
  for (std::size_t i = 0; i < files.size(); ++i) {
    if (!needed[i]) continue;
    const auto& [directory_path, name, nbytes] = arguments[i];
    files[i] = opener.open(directory_path, name);
    if (uncached) os::drop_cached(files[i]);
    const std::uint64_t actual = os::file_nbytes(files[i]);
    if (actual != nbytes) {
      throw CorruptError("data file has the wrong size", files[i].path, CorruptError::kNoChunk,
                         std::to_string(nbytes) + " bytes", std::to_string(actual) + " bytes");
    }
  }
  return files;
}

std::shared_ptr<LoadJob> make_load_job(const TableArguments& tables, const FileArguments& file_arguments,
                                       const U64Array& contiguous, const BoxArguments& boxes, const std::string& rung,
                                       bool verify, bool scrub, std::uint64_t slots_max, bool trace,
                                       const DeviceTargets& devices, bool device_digests,
                                       std::optional<std::uint32_t> read_back_files) {
  LoadPlan plan = make_plan(tables);
  const pipeline::LoadOptions options{.rung = io::rung_from_name(rung),
                                      .verify = verify,
                                      .check_padding = scrub,
                                      .collect_problems = scrub,
                                      .trace = trace,
                                      .landing = {.kernels = device_digests}};
  py::gil_scoped_release release;
  if (scrub) {
    plan.add_all_chunks(read_back_files.value_or(UINT32_MAX));
  } else {
    add_targets(plan, contiguous, boxes, devices);
  }
  plan.finish();
  std::vector<os::File> files =
      open_files(file_arguments, plan, io::rung_is_direct(options.rung), read_back_files.has_value());
  const std::uint64_t slot_bytes = std::max(round_up(plan.request_bytes_max(), kPageBytes), kChunkBytesDefault);
  const std::uint64_t slots_in_limit = std::min(slots_max, kLoadStagingBytesMax / slot_bytes);
  const std::uint64_t slots =
      std::clamp<std::uint64_t>(plan.requests().size(), 1, std::max<std::uint64_t>(slots_in_limit, 1));
  const int numa_node =
      plan.devices().empty() ? os::kAnyNumaNode : cuda::Device::of(plan.devices().front()).numa_node();
  auto ring = pipeline::Engine::instance().ring(slot_bytes, slots, numa_node);
  return std::make_shared<LoadJob>(std::move(plan), std::move(files), std::move(ring), options);
}

py::list problems(const LoadJob& job) {
  py::list result;
  for (const pipeline::Problem& problem : job.problems()) {
    result.append(py::make_tuple(job.plan().table(problem.table).path, problem.path, problem.chunk, problem.reason,
                                 problem.expected, problem.actual));
  }
  return result;
}

// For each position in a shard's string how many bytes of a box lie before it.
py::array_t<std::int64_t> bytes_before(std::int64_t item_bytes, const Sizes& shard_sizes, const Sizes& box_offsets,
                                       const Sizes& box_sizes,
                                       const py::array_t<std::int64_t, py::array::c_style>& positions) {
  const BoxTarget box{shard_sizes, box_offsets, {nullptr, item_bytes, box_sizes, Sizes(box_sizes.size())}};
  py::array_t<std::int64_t> result(positions.size());
  for (py::ssize_t i = 0; i < positions.size(); ++i) result.mutable_at(i) = box.bytes_before(positions.at(i));
  return result;
}

void scatter_pieces(const PieceArguments& pieces) {
  py::gil_scoped_release release;
  for (const auto& [source, begin, end, item_bytes, sizes, data, stride_bytes] : pieces) {
    const StridedView target{reinterpret_cast<std::uint8_t*>(data), item_bytes, sizes, stride_bytes};
    scatter(reinterpret_cast<const std::uint8_t*>(source), begin, end, {sizes, Sizes(sizes.size()), target});
  }
}

std::string wait_for(const mem::Board& board, std::uint64_t value, double seconds) {
  py::gil_scoped_release release;
  switch (board.wait_for(value, std::chrono::nanoseconds(static_cast<std::int64_t>(seconds * 1e9)))) {
    case mem::Board::Outcome::kReached:
      return "reached";
    case mem::Board::Outcome::kFailed:
      return "failed";
    default:
      return "timed out";
  }
}

}  // namespace

void bind_load(py::module_& module) {
  py::class_<Records>(module, "ChunkRecords",
                      "A chunk table that check_chunk_table() accepted, for any number of jobs; the last `references` "
                      "records are reference chunks.")
      .def(py::init<py::bytes, std::uint64_t>(), py::arg("table"), py::arg("references") = 0);
  auto job = py::class_<LoadJob, std::shared_ptr<LoadJob>>(
      module, "LoadJob", "Chunks being read into memory; see csrc/pipeline/load_job.h.");
  job.def(py::init(&make_load_job), py::arg("tables"), py::arg("files"), py::arg("contiguous"), py::arg("boxes"),
          py::arg("rung"), py::arg("verify"), py::arg("scrub"), py::arg("slots_max"), py::arg("trace"),
          py::arg("devices") = std::nullopt, py::arg("device_digests") = true,
          py::arg("read_back_files") = std::nullopt,
          "With `scrub` every chunk is read, and with `read_back_files` those of so many first files of each table, "
          "past "
          "the page cache.")
      .def(
          "start", [](const std::shared_ptr<LoadJob>& self) { pipeline::Engine::instance().start(self); },
          py::call_guard<py::gil_scoped_release>())
      .def(
          "mark", [](LoadJob& self, std::int32_t device, std::uintptr_t stream) { self.mark(device, handle(stream)); },
          py::arg("device"), py::arg("stream"), py::call_guard<py::gil_scoped_release>(),
          "Before start(): targets on that device are written after what the stream has been given so far.")
      .def(
          "fence",
          [](const LoadJob& self, std::int32_t device, std::uintptr_t stream) { self.fence(device, handle(stream)); },
          py::arg("device"), py::arg("stream"), py::call_guard<py::gil_scoped_release>(),
          "Once finished, well or not: what the stream is given from now on comes after all writes to targets on that "
          "device.")
      .def_property_readonly("settled", &LoadJob::settled,
                             "Once finished: whether no device writes to a target any more. Targets live until then.")
      .def_property_readonly(
          "devices", [](const LoadJob& self) { return self.plan().devices(); },
          "Ordinals of the devices that have targets, sorted.")
      .def_property_readonly("bytes_needed", [](const LoadJob& self) { return self.plan().bytes_needed(); })
      .def_property_readonly("bytes_read", [](const LoadJob& self) { return self.plan().bytes_read(); })
      .def_property_readonly("chunk_count", [](const LoadJob& self) { return self.plan().chunks().size(); })
      .def("problems", &problems,
           "[(path of the index, path of the file, chunk, reason, expected, actual), ...] of wrong chunks");
  bind_job_methods(job);
  py::class_<mem::Board>(module, "Board", "Counters of processes that share memory; see csrc/mem/board.h.")
      .def(py::init([](std::uint64_t address, std::size_t count) {
             return mem::Board(reinterpret_cast<std::uint8_t*>(address), count);
           }),
           py::arg("address"), py::arg("count"))
      .def_property_readonly_static("STRIDE", [](const py::object&) { return mem::Board::kStride; })
      .def("post", &mem::Board::post, py::arg("counter"), py::arg("value"))
      .def(
          "fail", [](mem::Board& board, std::size_t counter) { board.post(counter, mem::Board::kFailed); },
          py::arg("counter"))
      .def("wait_for", &wait_for, py::arg("value"), py::arg("seconds"),
           "\"reached\" when every counter is at least `value`, \"failed\", or \"timed out\".");
  module.def("bytes_before", &bytes_before, py::arg("item_bytes"), py::arg("shard_sizes"), py::arg("box_offsets"),
             py::arg("box_sizes"), py::arg("positions"),
             "For each position in a shard's row-major string the bytes of a box that lie before it.");
  module.def("scatter_pieces", &scatter_pieces, py::arg("pieces"),
             "Copies parts of tensors' row-major strings into their memory: (source address, first byte, last byte, "
             "item_bytes, sizes, data_ptr, stride_bytes) each.");
}

}  // namespace snapstone::bind
