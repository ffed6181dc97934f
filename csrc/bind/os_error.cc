// C++ errors as Python sees them: OsError -> OSError(errno, message, filename), so FileNotFoundError, PermissionError
// and e.errno == ENOSPC just work; CorruptError -> snapstone.errors.CorruptCheckpointError; UnsupportedError ->
// snapstone.errors.IncompatibleCheckpointError; CancelledError -> concurrent.futures.CancelledError; CudaError ->
// snapstone.errors.CudaError.
#include <cstring>

#include "base/error.h"
#include "bind/bind.h"
#include "cuda/driver.h"

namespace snapstone::bind {
namespace {

void raise(const py::object& type, const py::object& instance) { PyErr_SetObject(type.ptr(), instance.ptr()); }

void raise_os_error(const OsError& error) {
  std::string message = std::string(std::strerror(error.error_number())) + " [" + error.verb();
  if (error.nbytes() != 0 || error.offset() != 0) {
    message += ", offset " + std::to_string(error.offset()) + ", " + std::to_string(error.nbytes()) + " bytes";
  }
  message += "]";
  const py::object type = py::module_::import("builtins").attr("OSError");
  py::object instance =
      error.path().empty() ? type(error.error_number(), message) : type(error.error_number(), message, error.path());
  raise(py::type::of(instance), instance);
}

void raise_corrupt(const CorruptError& error) {
  const py::object type = py::module_::import("snapstone.errors").attr("CorruptCheckpointError");
  const auto text = [](const std::string& value) {
    return value.empty() ? py::object(py::none()) : py::object(py::str(value));
  };
  const py::object chunk =
      error.chunk() == CorruptError::kNoChunk ? py::object(py::none()) : py::object(py::int_(error.chunk()));
  raise(type, type(error.reason(), py::arg("path") = text(error.path()), py::arg("chunk") = chunk,
                   py::arg("expected") = text(error.expected()), py::arg("actual") = text(error.actual())));
}

void raise_unsupported(const UnsupportedError& error) {
  const py::object type = py::module_::import("snapstone.errors").attr("IncompatibleCheckpointError");
  raise(type, type(error.what()));
}

void raise_cancelled(const CancelledError& error) {
  const py::object type = py::module_::import("concurrent.futures").attr("CancelledError");
  raise(type, type(error.what()));
}

void raise_cuda(const cuda::CudaError& error) {
  const py::object type = py::module_::import("snapstone.errors").attr("CudaError");
  const bool known = error.device() != cuda::CudaError::kNoDevice;
  const py::object device = known ? py::object(py::int_(error.device())) : py::object(py::none());
  raise(type, type(error.name(), py::arg("code") = static_cast<int>(error.code()), py::arg("call") = error.call(),
                   py::arg("device") = device));
}

}  // namespace

void register_errors(py::module_&) {
  py::register_exception_translator([](std::exception_ptr pointer) {
    try {
      if (pointer) std::rethrow_exception(pointer);
    } catch (const OsError& error) {
      raise_os_error(error);
    } catch (const CorruptError& error) {
      raise_corrupt(error);
    } catch (const UnsupportedError& error) {
      raise_unsupported(error);
    } catch (const CancelledError& error) {
      raise_cancelled(error);
    } catch (const cuda::CudaError& error) {
      raise_cuda(error);
    }
  });
}

}  // namespace snapstone::bind
