#include "pipeline/device_plan.h"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace snapstone::pipeline {
namespace {

DeviceChunk describe(const format::Layout& layout, const SaveSources& sources, std::uint32_t chunk) {
  DeviceChunk result{chunk, kOnHost, 0, false, false};
  const std::span<const format::Piece> pieces = pieces_of(layout, chunk);
  for (const format::Piece& piece : pieces) {
    const std::int32_t device = sources.device_of(piece.tensor);
    if (device == kOnHost) {
      result.host_bytes += nbytes_of(piece);
    } else if (result.device == kOnHost) {
      result.device = device;
    } else if (result.device != device) {
      result.shared = true;
    }
  }
  result.packed = pieces.size() != 1 || pieces[0].at != 0;
  return result;
}

}  // namespace

DevicePlan make_device_plan(const format::Layout& layout, const SaveSources& sources) {
  DevicePlan plan;
  const bool none = std::all_of(sources.devices.begin(), sources.devices.end(), [](auto d) { return d == kOnHost; });
  if (none) return plan;
  if (sources.devices.size() != layout.places.size() || sources.contiguous.size() != layout.places.size()) {
    throw std::invalid_argument("one device per tensor of the layout is needed");
  }
  for (std::size_t i = 0; i < sources.devices.size(); ++i) {
    if (sources.devices[i] == kOnHost || layout.places[i].chunk_count == 0) continue;
    if (sources.contiguous[i] == nullptr) {
      throw std::invalid_argument("tensor " + std::to_string(i) + " on a device is not contiguous");
    }
    plan.devices.push_back(sources.devices[i]);
  }
  std::sort(plan.devices.begin(), plan.devices.end());
  plan.devices.erase(std::unique(plan.devices.begin(), plan.devices.end()), plan.devices.end());
  plan.position.assign(layout.chunks.size(), DevicePlan::kHostChunk);
  for (std::uint32_t chunk = 0; chunk < layout.chunks.size(); ++chunk) {
    const DeviceChunk described = describe(layout, sources, chunk);
    if (described.device == kOnHost) continue;
    plan.position[chunk] = static_cast<std::uint32_t>(plan.chunks.size());
    plan.chunks.push_back(described);
  }
  return plan;
}

}  // namespace snapstone::pipeline
