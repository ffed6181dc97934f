#include <pybind11/stl.h>

#include "bind/bind.h"
#include "format/chunk_table.h"
#include "os/directory.h"
#include "os/file.h"
#include "store/names.h"
#include "store/reap.h"
#include "store/staging.h"

namespace snapstone::bind {
namespace {

using store::Staging;

py::bytes read_file(const std::string& directory_path, const std::string& name, std::uint64_t limit_nbytes) {
  std::vector<std::uint8_t> bytes;
  {
    py::gil_scoped_release release;
    const os::Directory directory = os::open_directory(directory_path);
    bytes = os::read_file(directory.fd.get(), directory.path, name, limit_nbytes);
  }
  return as_bytes(bytes.data(), bytes.size());
}

void check_chunk_table(const py::bytes& table, const std::vector<std::uint64_t>& file_nbytes,
                       std::uint64_t chunk_bytes_max, const std::string& path, std::uint64_t references) {
  const auto bytes = as_span(table);
  std::vector<format::ChunkRecord> records(bytes.size() / sizeof(format::ChunkRecord));
  std::memcpy(records.data(), bytes.data(), records.size() * sizeof(format::ChunkRecord));
  format::check_chunk_table(records, file_nbytes, chunk_bytes_max, path, references);
}

void bind_staging(py::module_& module) {
  using Released = py::call_guard<py::gil_scoped_release>;
  py::class_<Staging>(module, "Staging", "One save's staging directory; see csrc/store/staging.h.")
      .def_static("create", &Staging::create, py::arg("parent"), py::arg("save_id"), py::arg("boot_ids"), Released())
      .def_static("join", &Staging::join, py::arg("parent"), py::arg("save_id"), Released())
      .def_property_readonly("save_id", &Staging::save_id)
      .def_property_readonly("path", &Staging::path)
      .def(
          "write_file",
          [](const Staging& staging, const std::string& name, const py::bytes& data) {
            const auto bytes = as_span(data);
            py::gil_scoped_release release;
            staging.write_file(name, bytes);
          },
          py::arg("name"), py::arg("data"))
      .def("sync", &Staging::sync, Released())
      .def(
          "commit",
          [](Staging& staging, const py::bytes& manifest, const py::bytes& manifest_digest,
             const std::string& final_name, bool overwrite) {
            const auto manifest_bytes = as_span(manifest);
            const auto digest_bytes = as_span(manifest_digest);
            py::gil_scoped_release release;
            staging.commit(manifest_bytes, digest_bytes, final_name, overwrite);
          },
          py::arg("manifest"), py::arg("manifest_digest"), py::arg("final_name"), py::arg("overwrite"))
      .def("withdraw", &Staging::withdraw, Released())
      .def("discard", &Staging::discard, Released())
      .def("close", &Staging::close, Released());
}

}  // namespace

void bind_store(py::module_& module) {
  using Released = py::call_guard<py::gil_scoped_release>;
  bind_staging(module);
  module.def("reap", &store::reap, py::arg("parent"), Released(),
             "Removes what dead saves left; returns the names removed.");
  module.def("is_file_name", &store::is_file_name, py::arg("name"));
  module.def("read_file", &read_file, py::arg("directory"), py::arg("name"), py::arg("limit_nbytes"));
  module.def(
      "sync_directory", [](const std::string& path) { os::sync_directory(os::open_directory(path)); }, py::arg("path"),
      Released());
  module.def("check_chunk_table", &check_chunk_table, py::arg("table"), py::arg("file_nbytes"),
             py::arg("chunk_bytes_max"), py::arg("path"), py::arg("references") = 0);
}

}  // namespace snapstone::bind
