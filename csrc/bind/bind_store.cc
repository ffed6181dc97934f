#include <pybind11/stl.h>

#include <stdexcept>
#include <tuple>

#include "base/limits.h"
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

py::bytes read_file(const std::string& directory_path, const std::string& name, std::uint64_t limit_nbytes,
                    bool uncached) {
  std::vector<std::uint8_t> bytes;
  {
    py::gil_scoped_release release;
    const os::Directory directory = os::open_directory(directory_path);
    bytes = os::read_file(directory.fd.get(), directory.path, name, limit_nbytes, uncached);
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

// (directory, file name)
using SourceArguments = std::vector<std::pair<std::string, std::string>>;

// source, offset, nbytes
constexpr py::ssize_t kRangeColumns = 3;

std::vector<store::SourceRange> make_ranges(const U64Array& rows, std::size_t source_count) {
  if (rows.ndim() != 2 || rows.shape(1) != kRangeColumns) {
    throw std::invalid_argument("ranges are rows of 3 numbers");
  }
  std::vector<store::SourceRange> ranges;
  ranges.reserve(static_cast<std::size_t>(rows.shape(0)));
  for (py::ssize_t i = 0; i < rows.shape(0); ++i) {
    const std::uint64_t* row = rows.data(i, 0);
    if (row[0] > source_count || row[1] % kPageBytes != 0 || row[2] % kPageBytes != 0) {
      throw std::invalid_argument("range " + std::to_string(i) + " is not whole pages of one of the sources");
    }
    ranges.push_back({row[0], row[1], row[2]});
  }
  return ranges;
}

std::uint64_t copy_ranges(const Staging& staging, const std::string& name, const SourceArguments& sources,
                          const U64Array& rows, const py::object& progress) {
  const std::vector<store::SourceRange> ranges = make_ranges(rows, sources.size());
  const auto at = [&progress](std::uint64_t nbytes_done) {
    py::gil_scoped_acquire acquire;
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
    if (!progress.is_none()) progress(nbytes_done);
  };
  py::gil_scoped_release release;
  std::vector<os::File> files;
  for (const auto& [directory_path, file_name] : sources) {
    const os::Directory directory = os::open_directory(directory_path);
    files.push_back(os::open_for_read(directory.fd.get(), directory.path, file_name, false));
  }
  return staging.copy_ranges(name, files, ranges, at);
}

// (whether it is a shared file of the checkpoint, too; its name there; the link's name; nbytes)
using SharedArguments = std::vector<std::tuple<bool, std::string, std::string, std::uint64_t>>;

std::vector<store::SharedFile> make_shared_files(const SharedArguments& arguments) {
  std::vector<store::SharedFile> files;
  for (const auto& [in_base, source, name, nbytes] : arguments) files.push_back({in_base, source, name, nbytes});
  return files;
}

void bind_staging(py::module_& module) {
  using Released = py::call_guard<py::gil_scoped_release>;
  using store::Predecessor;
  py::class_<Predecessor, std::shared_ptr<Predecessor>>(
      module, "Predecessor", "The checkpoint that a staging directory is to replace; see csrc/store/predecessor.h.")
      .def_static("open", &Predecessor::open, py::arg("parent"), py::arg("name"), Released())
      .def("close", &Predecessor::close, Released());
  py::class_<Staging>(module, "Staging", "One save's staging directory; see csrc/store/staging.h.")
      .def_static("create", &Staging::create, py::arg("parent"), py::arg("save_id"), py::arg("boot_ids"), Released())
      .def_static("join", &Staging::join, py::arg("parent"), py::arg("save_id"), Released())
      .def_property_readonly("save_id", &Staging::save_id)
      .def_property_readonly("path", &Staging::path)
      .def(
          "write_file",
          [](const Staging& staging, const std::string& name, const py::bytes& data, const std::string& step) {
            const auto bytes = as_span(data);
            py::gil_scoped_release release;
            staging.write_file(name, bytes, step.c_str());
          },
          py::arg("name"), py::arg("data"), py::arg("step") = os::kUnnamedStep)
      .def("copy_ranges", &copy_ranges, py::arg("name"), py::arg("sources"), py::arg("ranges"),
           py::arg("progress") = py::none(),
           "A new file of the bytes of `ranges`, rows of (source, offset, nbytes); returns its size. `progress` gets "
           "the "
           "bytes copied so far.")
      .def(
          "link_shared",
          [](Staging& staging, const std::string& checkpoint_path, const py::bytes& manifest_digest,
             const SharedArguments& files) {
            const auto digest = as_span(manifest_digest);
            py::gil_scoped_release release;
            staging.link_shared(checkpoint_path, digest, make_shared_files(files));
          },
          py::arg("checkpoint"), py::arg("manifest_digest"), py::arg("files"))
      .def(
          "keep_shared",
          [](Staging& staging, const std::vector<std::pair<std::string, std::uint64_t>>& kept) {
            std::vector<store::SharedFile> files;
            for (const auto& [name, nbytes] : kept) files.push_back({false, name, name, nbytes});
            py::gil_scoped_release release;
            staging.keep_shared(files);
          },
          py::arg("files"))
      .def(
          "sync", [](const Staging& staging, const std::vector<std::string>& shared) { staging.sync(shared); },
          py::arg("shared") = std::vector<std::string>(), Released())
      .def(
          "commit",
          [](Staging& staging, const py::bytes& manifest, const py::bytes& manifest_digest,
             const std::string& final_name, bool overwrite, bool read_back) {
            const auto manifest_bytes = as_span(manifest);
            const auto digest_bytes = as_span(manifest_digest);
            py::gil_scoped_release release;
            staging.commit(manifest_bytes, digest_bytes, final_name, overwrite, read_back);
          },
          py::arg("manifest"), py::arg("manifest_digest"), py::arg("final_name"), py::arg("overwrite"),
          py::arg("read_back") = false)
      .def("succeed", &Staging::succeed, py::arg("predecessor"), Released())
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
  module.def("read_file", &read_file, py::arg("directory"), py::arg("name"), py::arg("limit_nbytes"),
             py::arg("uncached") = false, "A whole small file; with `uncached` as the device has it.");
  module.def(
      "sync_file",
      [](int descriptor, const std::string& path, const std::string& step) {
        os::sync(descriptor, path, step.c_str());
      },
      py::arg("descriptor"), py::arg("path"), py::arg("step"), Released(), "`path` is for errors.");
  module.def(
      "sync_directory",
      [](const std::string& path, const std::string& step) {
        os::sync_directory(os::open_directory(path), step.c_str());
      },
      py::arg("path"), py::arg("step") = os::kUnnamedStep, Released());
  module.def(
      "make_directory",
      [](const std::string& parent, const std::string& name) {
        os::make_directory_at(os::open_directory(parent), name, false);
      },
      py::arg("parent"), py::arg("name"), Released(), "As os.mkdir.");
  module.def("check_chunk_table", &check_chunk_table, py::arg("table"), py::arg("file_nbytes"),
             py::arg("chunk_bytes_max"), py::arg("path"), py::arg("references") = 0);
}

}  // namespace snapstone::bind
