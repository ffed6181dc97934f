// The boundary: arguments in, GIL released, one call. No worker thread ever touches a Python object.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <chrono>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>

#include "pipeline/job.h"

namespace snapstone::bind {

namespace py = pybind11;

using U64Array = py::array_t<std::uint64_t, py::array::c_style>;

void register_errors(py::module_& module);
void bind_engine(py::module_& module);
void bind_store(py::module_& module);
void bind_save(py::module_& module);
void bind_load(py::module_& module);
void bind_state(py::module_& module);
void bind_cuda(py::module_& module);
void bind_repair(py::module_& module);

inline std::span<const std::uint8_t> as_span(const py::bytes& data) {
  const std::string_view bytes(data);
  return {reinterpret_cast<const std::uint8_t*>(bytes.data()), bytes.size()};
}

inline py::bytes as_bytes(const void* data, std::size_t nbytes) {
  return py::bytes(static_cast<const char*>(data), nbytes);
}

template <typename T>
py::array_t<T> as_array(const std::vector<T>& values) {
  return py::array_t<T>(static_cast<py::ssize_t>(values.size()), values.data());
}

// {"stage": {"seconds": float, "bytes": int, "count": int}, ...}: only stages that happened.
py::dict stage_stats(const pipeline::Job& job);
// [(stage, lane, begin_ns, end_ns, nbytes), ...]
py::list trace_events(const pipeline::Job& job);

// The methods that every job has: wait, finished, rethrow, cancel, bytes_done, stage_stats, trace_events.
template <typename Class>
void bind_job_methods(Class& cls) {
  using JobType = typename Class::type;
  cls.def(
         "wait",
         [](JobType& job, double seconds) {
           return job.wait(std::chrono::milliseconds(static_cast<std::int64_t>(seconds * 1e3)));
         },
         py::arg("seconds"), py::call_guard<py::gil_scoped_release>(), "True when the job has ended within `seconds`.")
      .def_property_readonly("started", &JobType::started)
      .def_property_readonly("finished", &JobType::finished)
      .def("rethrow", &JobType::rethrow, "Raises the first failure, if any.")
      .def("cancel", &JobType::cancel, py::call_guard<py::gil_scoped_release>())
      .def_property_readonly("bytes_done", &JobType::bytes_done)
      .def("stage_stats", [](const JobType& job) { return stage_stats(job); })
      .def("trace_events", [](const JobType& job) { return trace_events(job); });
}

}  // namespace snapstone::bind
