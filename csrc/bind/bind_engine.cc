#include <pybind11/stl.h>

#include "base/fault_hook.h"
#include "base/limits.h"
#include "bind/bind.h"
#include "codec/digest.h"
#include "codec/zstd_frame.h"
#include "io/rung.h"
#include "os/file_system.h"
#include "os/journal.h"
#include "pipeline/device_workspace.h"
#include "pipeline/engine.h"
#include "pipeline/save_sources.h"

namespace snapstone::bind {

py::dict stage_stats(const pipeline::Job& job) {
  const pipeline::StageTotals totals = job.totals();
  py::dict result;
  for (int i = 0; i < pipeline::kStageCount; ++i) {
    const auto stage = static_cast<std::size_t>(i);
    if (totals.count[stage] == 0) continue;
    py::dict entry;
    entry["seconds"] = static_cast<double>(totals.ns[stage]) * 1e-9;
    entry["bytes"] = totals.nbytes[stage];
    entry["count"] = totals.count[stage];
    result[pipeline::stage_name(static_cast<pipeline::Stage>(i))] = entry;
  }
  return result;
}

py::list trace_events(const pipeline::Job& job) {
  py::list result;
  for (const pipeline::TraceEvent& event : job.events()) {
    result.append(
        py::make_tuple(pipeline::stage_name(event.stage), event.lane, event.begin_ns, event.end_ns, event.nbytes));
  }
  return result;
}

namespace {

py::dict ring_facts() {
  const auto ring = pipeline::Engine::instance().current_ring();
  py::dict result;
  result["slot_bytes"] = ring ? ring->slot_bytes() : 0;
  result["slots"] = ring ? ring->slot_count() : 0;
  result["free_slots"] = ring ? ring->free_count() : 0;
  result["nbytes"] = ring ? ring->nbytes() : 0;
  result["huge_pages"] = ring ? ring->huge() : false;
  const mem::RegisteredBytes registered = ring ? ring->registered_bytes() : mem::RegisteredBytes{};
  result["registered_bytes"] = registered.registered;  // that devices reach by DMA
  result["refused_bytes"] = registered.refused;
  result["refusal"] = registered.refusal;
  result["lanes"] = pipeline::Engine::instance().lane_count();
  return result;
}

py::dict file_system_facts(const std::string& path) {
  os::FileSystemFacts facts;
  {
    py::gil_scoped_release release;
    facts = os::file_system_facts(os::open_directory(path));
  }
  py::dict result;
  result["name"] = facts.name;
  result["memory_backed"] = facts.memory_backed;
  result["network"] = facts.network;
  result["device"] = facts.device;
  result["free_bytes"] = facts.free_bytes;
  result["total_bytes"] = facts.total_bytes;
  return result;
}

py::tuple choose_rung(const std::string& path) {
  io::RungChoice choice;
  {
    py::gil_scoped_release release;
    choice = io::choose_rung(os::open_directory(path));
  }
  return py::make_tuple(io::rung_name(choice.rung), choice.reasons);
}

}  // namespace

void bind_engine(py::module_& module) {
  module.attr("CHUNK_BYTES_DEFAULT") = kChunkBytesDefault;
  module.attr("CHUNK_BYTES_MAX") = kChunkBytesMax;
  module.attr("PACK_THRESHOLD_BYTES") = kPackThresholdBytes;
  module.attr("INDEX_HEADER_BYTES_MAX") = kIndexHeaderBytesMax;
  module.attr("MANIFEST_BYTES_MAX") = kManifestBytesMax;
  module.attr("QUEUE_DEPTH") = kQueueDepth;

  module.def(
      "digest_hex", [](const py::bytes& bytes) { return codec::hex(codec::digest(as_span(bytes))); }, py::arg("data"),
      "XXH3-128 of `data` as 32 hex digits, as xxh128sum prints it.");
  module.def(
      "digest_memory",
      [](std::uintptr_t address, std::size_t nbytes) {
        return codec::hex(codec::digest({reinterpret_cast<const std::uint8_t*>(address), nbytes}));
      },
      py::arg("address"), py::arg("nbytes"), py::call_guard<py::gil_scoped_release>(),
      "The same of memory that the caller keeps alive.");
  module.def("choose_rung", &choose_rung, py::arg("directory"), "(name, reasons why better rungs were passed over)");
  module.def(
      "try_rung",
      [](const std::string& path, const std::string& rung) {
        return io::try_rung(os::open_directory(path), io::rung_from_name(rung));
      },
      py::arg("directory"), py::arg("rung"), py::call_guard<py::gil_scoped_release>(),
      "Empty when the rung works there, else why not.");
  module.def("uring_compiled_in", &io::uring_compiled_in);
  module.def("zstd_compiled_in", &codec::zstd_compiled_in);
  module.def("memlock_limit_bytes", &os::memlock_limit_bytes);
  module.def("available_memory_bytes", &os::available_memory_bytes);
  module.def("boot_id", &os::boot_id);
  module.def("file_system_facts", &file_system_facts, py::arg("directory"));
  module.def(
      "try_hard_link", [](const std::string& path) { os::try_hard_link(os::open_directory(path)); },
      py::arg("directory"), py::call_guard<py::gil_scoped_release>(),
      "Raises OSError where a file cannot have two names.");
  module.def(
      "try_reflink", [](const std::string& path) { os::try_reflink(os::open_directory(path)); }, py::arg("directory"),
      py::call_guard<py::gil_scoped_release>(), "Raises OSError where two files cannot share blocks.");
  module.def("ring_facts", &ring_facts);
  module.def(
      "reserve",
      [](std::uint64_t slot_bytes, std::uint64_t slots, std::int32_t device) {
        if (device == pipeline::kOnHost) {
          pipeline::Engine::instance().ring(slot_bytes, slots);
          return;
        }
        const int numa_node = cuda::Device::of(device).numa_node();
        pipeline::prepare_device(device, *pipeline::Engine::instance().ring(slot_bytes, slots, numa_node));
      },
      py::arg("slot_bytes"), py::arg("slots"), py::arg("device") = pipeline::kOnHost,
      py::call_guard<py::gil_scoped_release>(),
      "Makes staging memory; with the ordinal of a device, near it and ready for its copies.");
  module.def("fault_arm", &fault::arm, py::arg("rules"), "See csrc/base/fault_hook.h for the syntax.");
  module.def("fault_disarm", &fault::disarm);
  module.def("journal_start", &os::journal::start, py::arg("path"), "See csrc/os/journal.h.");
  module.def("journal_stop", &os::journal::stop);
  module.def("journal_mark", &os::journal::mark, py::arg("text"));
  module.def(
      "fault_skipped",
      [](const std::string& kind, const std::string& name) { return fault::skipped(kind.c_str(), name.c_str()); },
      py::arg("kind"), py::arg("name"), "Whether the step `kind`/`name` is to be left out.");
  module.def("fault_seen", &fault::seen, py::arg("call"));
  module.def("fault_seen_names", &fault::seen_names, "Calls and steps seen since fault_arm, sorted.");
}

}  // namespace snapstone::bind
