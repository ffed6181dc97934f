#include <pybind11/stl.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <stdexcept>
#include <tuple>

#include "base/limits.h"
#include "bind/bind.h"
#include "os/directory.h"
#include "os/file.h"
#include "pipeline/engine.h"
#include "pipeline/save_job.h"
#include "store/staging.h"

namespace snapstone::bind {
namespace {

using format::Layout;
using pipeline::SaveJob;

// {position: (item_bytes, data_ptr, sizes, stride_bytes)}
using StridedArguments =
    std::unordered_map<std::uint32_t,
                       std::tuple<std::int64_t, std::uint64_t, std::vector<std::int64_t>, std::vector<std::int64_t>>>;

using U32Array = py::array_t<std::uint32_t, py::array::c_style>;
// (chunk records, the record that each refers to, the record of each chunk of the layout); NO_RECORD for none
using BaseArguments = std::tuple<py::bytes, U32Array, U32Array>;
// (per tensor nonzero where chunks may be differences, keyframe_every, (directory, name) of the base's files, from
// number 1 on)
using DifferenceArguments =
    std::tuple<std::vector<std::uint8_t>, std::uint64_t, std::vector<std::pair<std::string, std::string>>>;

using I32Array = py::array_t<std::int32_t, py::array::c_style>;
// (dma_bytes, dma_gbps, digests on the device, overflow_fraction, two_phase): see csrc/pipeline/device_options.h
using DeviceArguments = std::tuple<std::uint64_t, double, bool, double, bool>;
const DeviceArguments kDeviceDefaults = [] {
  const pipeline::DeviceOptions options;
  return DeviceArguments{options.dma_bytes, options.dma_gbps, options.digests, options.overflow_fraction,
                         options.two_phase};
}();

cuda::Stream borrowed_stream(std::int32_t device, std::uintptr_t stream) {
  return cuda::Stream::borrowed(cuda::Device::of(device), reinterpret_cast<cuda::StreamHandle>(stream));
}

std::chrono::milliseconds milliseconds(double seconds) {
  return std::chrono::milliseconds(static_cast<std::int64_t>(seconds * 1e3));
}

std::shared_ptr<Layout> make_layout(const U64Array& nbytes, std::uint64_t chunk_bytes) {
  const std::span<const std::uint64_t> sizes(nbytes.data(), static_cast<std::size_t>(nbytes.size()));
  return std::make_shared<Layout>(format::make_layout(sizes, chunk_bytes));
}

py::tuple places(const Layout& layout) {
  U64Array first(static_cast<py::ssize_t>(layout.places.size()));
  U64Array count(static_cast<py::ssize_t>(layout.places.size()));
  U64Array at(static_cast<py::ssize_t>(layout.places.size()));
  for (std::size_t i = 0; i < layout.places.size(); ++i) {
    first.mutable_data()[i] = layout.places[i].first_chunk;
    count.mutable_data()[i] = layout.places[i].chunk_count;
    at.mutable_data()[i] = layout.places[i].at;
  }
  return py::make_tuple(first, count, at);
}

pipeline::SaveSources make_sources(const Layout& layout, const U64Array& pointers, const StridedArguments& strided,
                                   const std::optional<I32Array>& devices) {
  if (static_cast<std::size_t>(pointers.size()) != layout.places.size()) {
    throw std::invalid_argument("one pointer per tensor of the layout is needed");
  }
  pipeline::SaveSources sources;
  sources.contiguous.reserve(layout.places.size());
  for (py::ssize_t i = 0; i < pointers.size(); ++i) {
    sources.contiguous.push_back(reinterpret_cast<const std::uint8_t*>(pointers.data()[i]));
  }
  for (const auto& [position, view] : strided) {
    const auto& [item_bytes, data, sizes, stride_bytes] = view;
    sources.contiguous.at(position) = nullptr;
    sources.strided[position] =
        StridedView{reinterpret_cast<std::uint8_t*>(data), item_bytes, sizes, stride_bytes}.collapsed();
  }
  if (devices) sources.devices.assign(devices->data(), devices->data() + devices->size());
  return sources;
}

// Near the first device that has sources.
int numa_node_for(const pipeline::SaveSources& sources) {
  const auto found = std::find_if(sources.devices.begin(), sources.devices.end(),
                                  [](std::int32_t device) { return device != pipeline::kOnHost; });
  return found == sources.devices.end() ? os::kAnyNumaNode : cuda::Device::of(*found).numa_node();
}

pipeline::DeviceOptions make_device_options(const DeviceArguments& arguments) {
  const auto& [dma_bytes, dma_gbps, digests, overflow_fraction, two_phase] = arguments;
  return {.dma_bytes = dma_bytes,
          .dma_gbps = dma_gbps,
          .digests = digests,
          .overflow_fraction = overflow_fraction,
          .two_phase = two_phase};
}

py::dict device_stats(const SaveJob& job) {
  const pipeline::DeviceStats stats = job.device_stats();
  py::dict result;
  result["copied_bytes"] = stats.copied_bytes;
  result["unregistered_bytes"] = stats.unregistered_bytes;
  result["gathered_bytes"] = stats.gathered_bytes;
  result["overflow_bytes"] = stats.overflow_bytes;
  result["digested_bytes"] = stats.digested_bytes;
  result["late_bytes"] = stats.late_bytes;
  result["no_kernels"] = stats.no_kernels;
  return result;
}

std::vector<std::uint32_t> as_vector(const U32Array& array) { return {array.data(), array.data() + array.size()}; }

pipeline::SaveBase make_base(const BaseArguments& arguments) {
  const auto& [table, references, record_of_chunk] = arguments;
  const auto bytes = as_span(table);
  pipeline::SaveBase base;
  base.records.resize(bytes.size() / sizeof(format::ChunkRecord));
  base.references = as_vector(references);
  base.record_of_chunk = as_vector(record_of_chunk);
  std::memcpy(base.records.data(), bytes.data(), base.records.size() * sizeof(format::ChunkRecord));
  return base;
}

std::vector<os::File> open_base_files(const std::vector<std::pair<std::string, std::string>>& names, io::Rung rung) {
  std::vector<os::File> files(1);  // number 0 is the file that is being written
  for (const auto& [directory_path, name] : names) {
    const os::Directory directory = os::open_directory(directory_path);
    files.push_back(os::open_for_read(directory.fd.get(), directory.path, name, io::rung_is_direct(rung)));
  }
  return files;
}

std::shared_ptr<SaveJob> make_save_job(std::shared_ptr<Layout> layout, const U64Array& pointers,
                                       const StridedArguments& strided, const store::Staging& staging,
                                       const std::string& name, const std::string& rung, int zstd_level,
                                       std::vector<std::uint8_t> item_bytes, const std::optional<BaseArguments>& base,
                                       std::uint64_t slots, bool eager, bool trace,
                                       const std::optional<DifferenceArguments>& differences,
                                       const std::optional<I32Array>& devices, const DeviceArguments& device_options) {
  pipeline::SaveSources sources = make_sources(*layout, pointers, strided, devices);
  pipeline::SaveOptions options{.rung = io::rung_from_name(rung),
                                .compress = zstd_level != 0,
                                .zstd_level = zstd_level,
                                .item_bytes = std::move(item_bytes),
                                .trace = trace,
                                .eager = eager || zstd_level != 0,
                                .device = make_device_options(device_options)};
  if (differences) std::tie(options.xor_tensors, options.keyframe_every, std::ignore) = *differences;
  pipeline::SaveBase save_base = base ? make_base(*base) : pipeline::SaveBase{};
  py::gil_scoped_release release;
  if (base && differences) save_base.files = open_base_files(std::get<2>(*differences), options.rung);
  auto ring =
      pipeline::Engine::instance().ring(layout->chunk_bytes, std::max<std::uint64_t>(slots, 1), numa_node_for(sources));
  os::File file = staging.create_file(name, io::rung_is_direct(options.rung));
  return std::make_shared<SaveJob>(std::move(layout), std::move(sources), std::move(file), std::move(ring),
                                   std::move(options), std::move(save_base));
}

void bind_producer_mark(py::module_& module) {
  py::class_<pipeline::ProducerMark, std::shared_ptr<pipeline::ProducerMark>>(
      module, "CudaMark", "A place in the streams that produce what is saved; see csrc/pipeline/producer_mark.h.")
      .def(py::init<const std::map<std::int32_t, std::uintptr_t>&>(), py::arg("streams"),
           py::call_guard<py::gil_scoped_release>(), "{ordinal: handle of the stream}")
      .def(
          "hold_back",
          [](const pipeline::ProducerMark& self, std::int32_t device, std::uintptr_t stream) {
            cuda::Stream borrowed = borrowed_stream(device, stream);
            self.hold_back(borrowed);
          },
          py::arg("device"), py::arg("stream"), py::call_guard<py::gil_scoped_release>(),
          "What the stream is given from now on runs after the mark.");
}

}  // namespace

void bind_save(py::module_& module) {
  bind_producer_mark(module);
  py::class_<Layout, std::shared_ptr<Layout>>(module, "Layout",
                                              "Where each tensor's bytes go; see csrc/format/layout.h.")
      .def(py::init(&make_layout), py::arg("nbytes"), py::arg("chunk_bytes"))
      .def_readonly("chunk_bytes", &Layout::chunk_bytes)
      .def_readonly("file_bytes", &Layout::file_bytes)
      .def_readonly("payload_bytes", &Layout::payload_bytes)
      .def_property_readonly("chunk_count", [](const Layout& layout) { return layout.chunks.size(); })
      .def("places", &places, "(first_chunk, chunk_count, at): one uint64 array each, in tensor order");

  auto job = py::class_<SaveJob, std::shared_ptr<SaveJob>>(
      module, "SaveJob", "One data file being written; see csrc/pipeline/save_job.h.");
  job.def(py::init(&make_save_job), py::arg("layout"), py::arg("pointers"), py::arg("strided"), py::arg("staging"),
          py::arg("name"), py::arg("rung"), py::arg("zstd_level"), py::arg("item_bytes"), py::arg("base"),
          py::arg("slots"), py::arg("eager"), py::arg("trace"), py::arg("differences") = std::nullopt,
          py::arg("devices") = std::nullopt, py::arg("device_options") = kDeviceDefaults)
      .def(
          "wait_snapshot", [](SaveJob& self, double seconds) { return self.wait_snapshot(milliseconds(seconds)); },
          py::arg("seconds"), py::call_guard<py::gil_scoped_release>(),
          "True when everything that reads sources has been enqueued within `seconds`, or the job has ended.")
      .def(
          "fence",
          [](SaveJob& self, std::int32_t device, std::uintptr_t stream) {
            cuda::Stream borrowed = borrowed_stream(device, stream);
            self.fence(borrowed);
          },
          py::arg("device"), py::arg("stream"), py::call_guard<py::gil_scoped_release>(),
          "Once snapshot_enqueued: what the stream is given from now on may change sources on that device.")
      .def_property_readonly("snapshot_enqueued", &SaveJob::snapshot_enqueued)
      .def_property_readonly("device_drained", &SaveJob::device_drained,
                             "Whether an ended job is known to read no memory of devices any more.")
      .def("device_stats", &device_stats)
      .def(
          "start",
          [](const std::shared_ptr<SaveJob>& self, const std::optional<std::shared_ptr<pipeline::ProducerMark>>& mark) {
            if (mark) self->enqueue(**mark);
            pipeline::Engine::instance().start(self);
          },
          py::arg("mark") = std::nullopt, py::call_guard<py::gil_scoped_release>(),
          "With sources on devices their copies are enqueued behind the mark first. Waits for nothing. One call, so "
          "that "
          "no signal leaves copies enqueued for a job that nobody ends.")
      .def(
          "wait_staged", [](SaveJob& self, double seconds) { return self.wait_staged(milliseconds(seconds)); },
          py::arg("seconds"), py::call_guard<py::gil_scoped_release>())
      .def_property_readonly("staged", &SaveJob::staged)
      .def_property_readonly("bytes_staged", &SaveJob::bytes_staged)
      .def_property_readonly("direct", &SaveJob::direct)
      .def_property_readonly("file_bytes", &SaveJob::file_bytes)
      .def(
          "chunk_table",
          [](const SaveJob& self) {
            return as_bytes(self.chunk_table().data(), self.chunk_table().size() * sizeof(format::ChunkRecord));
          },
          "The records of the layout's chunks, then the reference records that these need.")
      .def(
          "encode_us",
          [](const SaveJob& self) {
            return U32Array(static_cast<py::ssize_t>(self.encode_us().size()), self.encode_us().data());
          },
          "uint32 array: by chunk of the layout the microseconds of encoding it, 0 if it was not; empty without a "
          "codec")
      .def_property_readonly("unreadable_references", &SaveJob::unreadable_references,
                             "Chunks that were not stored as differences because the base's could not be read.");
  job.attr("NO_RECORD") = pipeline::SaveBase::kNoRecord;
  bind_job_methods(job);
}

}  // namespace snapstone::bind
