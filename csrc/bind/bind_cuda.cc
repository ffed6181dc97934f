#include <pybind11/stl.h>

#include <map>
#include <mutex>

#include "bind/bind.h"
#include "cuda/device.h"
#include "cuda/kernels.h"
#include "cuda/stream.h"
#include "pipeline/device_rates.h"

namespace snapstone::bind {
namespace {

using cuda::Device;
using cuda::Driver;

struct DeviceFacts {
  int ordinal = 0;
  std::string name;
  std::pair<int, int> compute_capability;
  std::uint64_t total_bytes = 0;
  int numa_node = -1;
};

std::vector<DeviceFacts> device_facts() {
  std::vector<DeviceFacts> all;
  const Driver* const driver = Driver::get();
  for (int i = 0; driver != nullptr && i < driver->device_count; ++i) {
    const Device& device = Device::of(i);
    all.push_back({i, device.name(), device.compute_capability(), device.total_bytes(), device.numa_node()});
  }
  return all;
}

py::dict cuda_facts() {
  std::vector<DeviceFacts> devices;
  {
    py::gil_scoped_release release;  // the first call starts the driver, which takes a while
    devices = device_facts();
  }
  const Driver* const driver = Driver::get();
  py::list rows;
  for (const DeviceFacts& device : devices) {
    py::dict row;
    row["ordinal"] = device.ordinal;
    row["name"] = device.name;
    row["compute_capability"] = device.compute_capability;
    row["total_bytes"] = device.total_bytes;
    row["numa_node"] = device.numa_node < 0 ? py::object(py::none()) : py::object(py::int_(device.numa_node));
    rows.append(row);
  }
  py::dict facts;
  facts["available"] = driver != nullptr;
  facts["reason"] = driver != nullptr ? py::object(py::none()) : py::object(py::str(Driver::absence()));
  facts["driver_version"] = driver != nullptr ? py::object(py::int_(driver->version)) : py::object(py::none());
  facts["devices"] = rows;
  facts["batched_copies"] = driver != nullptr && (driver->cuMemcpyBatchAsync || driver->cuMemcpyBatchAsync_v2);
  facts["stream_ordered_memory"] = driver != nullptr && driver->cuMemAllocAsync && driver->cuMemFreeAsync;
  facts["kernel_launches"] = driver != nullptr && driver->cuModuleLoadData && driver->cuLaunchKernel;
  return facts;
}

std::vector<int> devices_in_use() {
  std::vector<int> found;
  const Driver* const driver = Driver::get();
  for (int i = 0; driver != nullptr && i < driver->device_count; ++i) {
    if (Device::of(i).in_use()) found.push_back(i);
  }
  return found;
}

py::dict cuda_rates(std::int32_t device, std::uint64_t address, const std::vector<std::uint64_t>& sizes,
                    std::uint64_t ring_bytes, std::uint64_t copy_bytes, int repeat) {
  pipeline::DeviceRates rates;
  {
    py::gil_scoped_release release;
    rates = pipeline::measure_device_rates(device, address, sizes, {ring_bytes, copy_bytes, repeat});
  }
  py::list rows;
  for (const pipeline::DeviceRatesRow& row : rates.rows) {
    py::dict entry;
    entry["nbytes"] = row.nbytes;
    entry["to_host"] = row.to_host;
    entry["to_device"] = row.to_device;
    entry["on_device"] = row.on_device;
    entry["digest"] = row.digest;
    rows.append(entry);
  }
  py::dict result;
  result["ring_bytes"] = rates.ring_bytes;
  result["reserve_seconds"] = rates.reserve_seconds;
  result["register_seconds"] = rates.register_seconds;
  result["refusal"] = rates.refusal;
  result["no_kernels"] = rates.no_kernels;
  result["rows"] = rows;
  return result;
}

std::uintptr_t stream_for_torch(int ordinal) {
  static std::mutex& mutex = *new std::mutex;
  static auto& streams = *new std::map<int, cuda::Stream>;
  Device& device = Device::of(ordinal);
  const std::lock_guard lock(mutex);
  auto found = streams.find(ordinal);
  if (found == streams.end()) found = streams.emplace(ordinal, cuda::Stream(device)).first;
  return reinterpret_cast<std::uintptr_t>(found->second.handle());
}

}  // namespace

void bind_cuda(py::module_& module) {
  module.def("cuda_facts", &cuda_facts,
             "What csrc/cuda found: available, reason (why not), driver_version (13000 for 13.0), devices, and whether "
             "the driver has its optional calls. Initialises CUDA.");
  module.def("cuda_absence", &Driver::absence, py::call_guard<py::gil_scoped_release>(),
             "Why CUDA cannot be used, empty when it can. Initialises CUDA.");
  module.def("cuda_devices_in_use", &devices_in_use, py::call_guard<py::gil_scoped_release>(),
             "Ordinals of the devices on which this process has a context, so that tensors may be there.");
  module.def("cuda_ignore_captures", &cuda::ignore_captures, py::call_guard<py::gil_scoped_release>(),
             "For good: what this thread allocates, asks or waits for does not end CUDA graph captures of others.");
  module.def(
      "cuda_load_kernels", [](int ordinal) { return cuda::Kernels::absence(Device::of(ordinal)); }, py::arg("ordinal"),
      py::call_guard<py::gil_scoped_release>(),
      "Loads what is launched on a device, if nobody has; empty, or why there are no kernels.");
  module.def(
      "cuda_rates", &cuda_rates, py::arg("device"), py::arg("address"), py::arg("sizes"),
      py::arg("ring_bytes") = pipeline::DeviceRatesOptions{}.ring_bytes,
      py::arg("copy_bytes") = pipeline::DeviceRatesOptions{}.copy_bytes,
      py::arg("repeat") = pipeline::DeviceRatesOptions{}.repeat,
      "Seconds of copies between a ring of its own and device memory at `address`, within the device, and of "
      "digests, for each of `sizes`: see csrc/pipeline/device_rates.h. The memory is idle, and keeps its bytes.");
  module.def(
      "cuda_stream", &stream_for_torch, py::arg("ordinal"), py::call_guard<py::gil_scoped_release>(),
      "Handle of a stream that this process has for what torch copies for saves, and nobody else has; for good.");
}

}  // namespace snapstone::bind
