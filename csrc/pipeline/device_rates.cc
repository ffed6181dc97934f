#include "pipeline/device_rates.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <iterator>
#include <optional>
#include <stdexcept>
#include <thread>

#include "base/limits.h"
#include "cuda/copies.h"
#include "cuda/device_buffer.h"
#include "cuda/kernels.h"
#include "mem/slot_ring.h"

namespace snapstone::pipeline {
namespace {

using Clock = std::chrono::steady_clock;

constexpr std::uint64_t kDigestBytes = 16;

double seconds_since(Clock::time_point begin) { return std::chrono::duration<double>(Clock::now() - begin).count(); }

// Adjacent slots: one copy can cover them.
struct Run {
  std::uint8_t* data;
  std::uint64_t nbytes;
};

class Measurement {
 public:
  Measurement(std::int32_t device, cuda::DevicePointer memory, std::uint64_t size_max,
              const DeviceRatesOptions& options)
      : memory_(memory),
        options_(options),
        device_(cuda::Device::of(device)),
        ring_(kChunkBytesDefault),
        stream_(device_),
        end_(device_) {
    make_ring();
    target_ = cuda::DeviceBuffer::allocate(stream_, size_max);
    kernels_ = cuda::Kernels::of(device_);
    rates_.no_kernels = cuda::Kernels::absence(device_);
    if (kernels_ != nullptr) make_items(size_max);
    stream_.synchronize();
  }

  // Whatever may still be under way ends before the memory goes; where the device does not answer, that stays.
  ~Measurement() {
    try {
      stream_.synchronize();
    } catch (...) {
      for (mem::Slot& slot : slots_) slot.forfeit();
    }
  }

  Measurement(const Measurement&) = delete;
  Measurement& operator=(const Measurement&) = delete;

  void measure(std::uint64_t nbytes) {
    DeviceRatesRow row;
    row.nbytes = nbytes;
    if (nbytes <= run_bytes_) {
      const std::vector<cuda::Copy> there = copies(nbytes, /*to_host=*/true);
      const std::vector<cuda::Copy> back = copies(nbytes, /*to_host=*/false);
      row.to_host = repeated([&] { cuda::copy_to_host(stream_, there); });
      row.to_device = repeated([&] { cuda::copy_to_device(stream_, back); });
    }
    if (target_) {
      const cuda::Copy copy{target_->address(), memory_, nbytes};
      row.on_device = repeated([&] { cuda::copy_on_device(stream_, {&copy, 1}); });
    }
    // Items of whole chunks are there; the last one may be shorter, and is left out.
    const std::uint64_t chunks = nbytes / kChunkBytesDefault;
    if (items_ && chunks * kChunkBytesDefault == nbytes) {
      row.digest = repeated([&] { kernels_->digest(stream_, items_->address(), chunks, digests_->address()); });
    }
    rates_.rows.push_back(std::move(row));
  }

  DeviceRates take() { return std::move(rates_); }

 private:
  void make_ring() {
    const std::uint64_t slots = std::max<std::uint64_t>(1, options_.ring_bytes / ring_.slot_bytes());
    Clock::time_point begin = Clock::now();
    ring_.reserve(slots, device_.numa_node());
    rates_.reserve_seconds = seconds_since(begin);
    begin = Clock::now();
    ring_.register_with(device_);
    rates_.register_seconds = seconds_since(begin);
    rates_.ring_bytes = ring_.nbytes();
    rates_.refusal = ring_.registered_bytes().refusal;
    const std::uint64_t most = std::max<std::uint64_t>(1, options_.copy_bytes / ring_.slot_bytes());
    for (;;) {
      std::vector<mem::Slot> run = ring_.acquire_run(most, 0);
      if (run.empty()) break;
      runs_.push_back({run.front().data(), run.size() * ring_.slot_bytes()});
      run_bytes_ += runs_.back().nbytes;
      std::move(run.begin(), run.end(), std::back_inserter(slots_));
    }
  }

  // The table of all chunks goes through the ring, as that of a save does.
  void make_items(std::uint64_t size_max) {
    const std::uint64_t count = size_max / kChunkBytesDefault;
    const std::uint64_t nbytes = count * sizeof(cuda::DigestItem);
    if (count == 0 || nbytes > runs_.front().nbytes) return;
    items_ = cuda::DeviceBuffer::allocate(stream_, nbytes);
    digests_ = cuda::DeviceBuffer::allocate(stream_, count * kDigestBytes);
    if (!items_ || !digests_) {
      items_.reset();
      return;
    }
    for (std::uint64_t i = 0; i < count; ++i) {
      const cuda::DigestItem item{memory_ + i * kChunkBytesDefault, kChunkBytesDefault};
      std::memcpy(runs_.front().data + i * sizeof(item), &item, sizeof(item));
    }
    const cuda::Copy copy{items_->address(), reinterpret_cast<std::uint64_t>(runs_.front().data), nbytes};
    cuda::copy_to_device(stream_, {&copy, 1});
  }

  std::vector<cuda::Copy> copies(std::uint64_t nbytes, bool to_host) const {
    std::vector<cuda::Copy> found;
    std::uint64_t at = 0;
    for (const Run& run : runs_) {
      if (at == nbytes) break;
      const std::uint64_t part = std::min(run.nbytes, nbytes - at);
      const auto host = reinterpret_cast<std::uint64_t>(run.data);
      found.push_back(to_host ? cuda::Copy{host, memory_ + at, part} : cuda::Copy{memory_ + at, host, part});
      at += part;
    }
    return found;
  }

  template <class Enqueue>
  std::vector<double> repeated(Enqueue&& enqueue) {
    std::vector<double> seconds;
    for (int i = 0; i <= options_.repeat; ++i) {
      const Clock::time_point begin = Clock::now();
      enqueue();
      stream_.record(end_, "rates/end");
      while (!end_.done("rates/end")) std::this_thread::yield();
      if (i > 0) seconds.push_back(seconds_since(begin));
    }
    return seconds;
  }

  const cuda::DevicePointer memory_;
  const DeviceRatesOptions options_;
  cuda::Device& device_;
  mem::SlotRing ring_;
  std::vector<mem::Slot> slots_;
  std::vector<Run> runs_;
  std::uint64_t run_bytes_ = 0;
  cuda::Stream stream_;
  cuda::Event end_;
  std::optional<cuda::DeviceBuffer> target_;
  std::optional<cuda::DeviceBuffer> items_;
  std::optional<cuda::DeviceBuffer> digests_;
  const cuda::Kernels* kernels_ = nullptr;
  DeviceRates rates_;
};

}  // namespace

DeviceRates measure_device_rates(std::int32_t device, cuda::DevicePointer memory, std::span<const std::uint64_t> sizes,
                                 const DeviceRatesOptions& options) {
  if (sizes.empty() || std::ranges::min(sizes) == 0) throw std::invalid_argument("sizes: none, or one of 0 bytes");
  if (options.repeat < 1) throw std::invalid_argument("repeat: must be at least 1");
  Measurement measurement(device, memory, std::ranges::max(sizes), options);
  for (const std::uint64_t nbytes : sizes) measurement.measure(nbytes);
  return measurement.take();
}

}  // namespace snapstone::pipeline
