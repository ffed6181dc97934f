// The seam between the fake driver and its kernels: a kernel is a name, the sizes of its parameters, and a C++ function
// that does on the fake's memory what the kernel does on the device's.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace fakecuda {

struct Launch {
  unsigned grid[3];
  unsigned block[3];
  unsigned shared_bytes;                // dynamic
  std::vector<const void*> parameters;  // each points at its bytes, copied at the launch
};

// Device memory, and registered host memory, as kernels see it. Every access is checked: it must lie inside one live
// allocation or registration, and be ordered against all others. A bad one ends the launch with an exception.
class KernelMemory {
 public:
  virtual const std::uint8_t* read(std::uint64_t address, std::uint64_t nbytes) = 0;
  virtual std::uint8_t* write(std::uint64_t address, std::uint64_t nbytes) = 0;

 protected:
  ~KernelMemory() = default;
};

struct ReferenceKernel {
  const char* name;                          // as in the PTX
  std::vector<std::size_t> parameter_bytes;  // in order
  // Throws std::exception for a launch that the kernel could not run (grid, block, shared memory, parameters).
  void (*run)(const Launch& launch, KernelMemory& memory);
};

// reference_kernels.cc
std::span<const ReferenceKernel> reference_kernels();

}  // namespace fakecuda
