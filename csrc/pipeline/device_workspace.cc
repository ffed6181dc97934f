#include "pipeline/device_workspace.h"

#include <algorithm>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "base/error.h"
#include "base/limits.h"
#include "cuda/kernels.h"
#include "pipeline/orphans.h"

namespace snapstone::pipeline {
namespace {

constexpr std::uint64_t kTableBytesMin = 4 << 20;  // digests of 128 GiB in chunks of 1 MiB

struct Idle {
  std::mutex mutex;
  std::vector<std::unique_ptr<DeviceWorkspace>> workspaces;
};

Idle& idle() {
  static Idle& instance = *new Idle;
  return instance;
}

}  // namespace

std::unique_ptr<DeviceWorkspace> DeviceWorkspace::lease(std::int32_t ordinal) {
  cuda::Device& device = cuda::Device::of(ordinal);
  {
    const std::lock_guard lock(idle().mutex);
    auto& workspaces = idle().workspaces;
    const auto found = std::find_if(workspaces.begin(), workspaces.end(),
                                    [&](const auto& workspace) { return &workspace->device() == &device; });
    if (found != workspaces.end()) {
      std::unique_ptr<DeviceWorkspace> workspace = std::move(*found);
      workspaces.erase(found);
      return workspace;
    }
  }
  return std::make_unique<DeviceWorkspace>(device);
}

void DeviceWorkspace::give_back(std::unique_ptr<DeviceWorkspace> workspace) noexcept {
  try {
    const std::lock_guard lock(idle().mutex);
    idle().workspaces.push_back(std::move(workspace));
  } catch (...) {
    abandon(std::move(workspace), "workspace/unlisted");
  }
}

void DeviceWorkspace::abandon(std::unique_ptr<DeviceWorkspace> workspace, const char* why) noexcept {
  orphan(std::move(workspace), why);
}

bool DeviceWorkspace::reserve_table(std::uint64_t nbytes) {
  if (device_ && host_.nbytes() >= nbytes) return true;
  device_.reset();
  registration_.reset();
  try {
    host_ = os::MappedMemory(std::max(round_up(nbytes, kHugePageBytes), kTableBytesMin), device().numa_node());
  } catch (const OsError&) {
    host_ = {};
    return false;
  }
  std::string refusal;
  registration_ = cuda::HostRegistration::of(device(), host_.data(), host_.nbytes(), &refusal);
  if (!registration_) return false;
  device_ = cuda::DeviceBuffer::allocate(stream_, host_.nbytes());
  return device_.has_value();
}

void prepare_device(std::int32_t ordinal, mem::SlotRing& ring) {
  ring.register_with(cuda::Device::of(ordinal));
  std::unique_ptr<DeviceWorkspace> workspace = DeviceWorkspace::lease(ordinal);
  workspace->reserve_table(kTableBytesMin);
  cuda::Kernels::of(workspace->device());
  DeviceWorkspace::give_back(std::move(workspace));
}

}  // namespace snapstone::pipeline
