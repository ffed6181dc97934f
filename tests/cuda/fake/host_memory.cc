#include "host_memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <iterator>

namespace fakecuda {
namespace {

constexpr std::uint64_t kPage = 4096;

void protect(std::uint64_t begin, std::uint64_t end, int protection) {
  if (begin < end) ::mprotect(reinterpret_cast<void*>(begin), end - begin, protection);
}

}  // namespace

template <class Each>
void HostMemory::each_row(const Access& access, Each&& each) {
  if (access.pitch == access.width) {
    each(access.begin, access.end());
    return;
  }
  for (std::uint64_t row = 0; row < access.rows; ++row) {
    const std::uint64_t begin = access.begin + row * access.pitch;
    each(begin, begin + access.width);
  }
}

bool HostMemory::add(std::uint64_t begin, std::uint64_t nbytes) {
  const auto after = registered_.lower_bound(begin);
  if (after != registered_.end() && after->first < begin + nbytes) return false;
  if (after != registered_.begin()) {
    const auto& [before, before_nbytes] = *std::prev(after);
    if (before + before_nbytes > begin) return false;
  }
  registered_[begin] = nbytes;
  return true;
}

std::uint64_t HostMemory::remove(std::uint64_t begin) {
  const auto found = registered_.find(begin);
  if (found == registered_.end()) return 0;
  const std::uint64_t nbytes = found->second;
  registered_.erase(found);
  return nbytes;
}

HostMemory::Cover HostMemory::covered(std::uint64_t begin, std::uint64_t nbytes) const {
  const std::uint64_t end = begin + nbytes;
  auto after = registered_.upper_bound(begin);
  if (after != registered_.begin()) {
    const auto& [before, before_nbytes] = *std::prev(after);
    if (before + before_nbytes >= end) return Cover::kWhole;
    if (before + before_nbytes > begin) return Cover::kPartly;
  }
  return after != registered_.end() && after->first < end ? Cover::kPartly : Cover::kNone;
}

std::uint64_t HostMemory::registered_bytes() const {
  std::uint64_t sum = 0;
  for (const auto& [begin, nbytes] : registered_) sum += nbytes;
  return sum;
}

HostMemory::Pages HostMemory::whole_pages(std::uint64_t begin, std::uint64_t end, bool write) {
  return {(begin + kPage - 1) / kPage * kPage, end / kPage * kPage, write};
}

// A page has the strictest of its guards.
void HostMemory::apply(std::uint64_t begin, std::uint64_t end) {
  protect(begin, end, PROT_READ | PROT_WRITE);
  for (const bool write : {false, true}) {
    for (const Pages& pages : guarded_) {
      if (pages.write != write) continue;
      protect(std::max(begin, pages.begin), std::min(end, pages.end), write ? PROT_NONE : PROT_READ);
    }
  }
}

void HostMemory::guard(const Access& access) {
  if (!guard_) return;
  each_row(access, [&](std::uint64_t begin, std::uint64_t end) {
    const Pages pages = whole_pages(begin, end, access.write);
    if (pages.begin >= pages.end) return;
    guarded_.push_back(pages);
    apply(pages.begin, pages.end);
  });
}

void HostMemory::unguard(const Access& access) {
  if (!guard_) return;
  each_row(access, [&](std::uint64_t begin, std::uint64_t end) {
    const Pages pages = whole_pages(begin, end, access.write);
    if (pages.begin >= pages.end) return;
    const auto found = std::find(guarded_.begin(), guarded_.end(), pages);
    if (found != guarded_.end()) guarded_.erase(found);
    apply(pages.begin, pages.end);
  });
}

void HostMemory::open(const Access& access) {
  if (!guard_ || guarded_.empty()) return;
  const std::uint64_t begin = access.begin / kPage * kPage;
  const std::uint64_t end = (access.end() + kPage - 1) / kPage * kPage;
  for (const Pages& pages : guarded_) {
    protect(std::max(begin, pages.begin), std::min(end, pages.end), PROT_READ | PROT_WRITE);
  }
}

void HostMemory::close(const Access& access) {
  if (!guard_ || guarded_.empty()) return;
  const std::uint64_t begin = access.begin / kPage * kPage;
  const std::uint64_t end = (access.end() + kPage - 1) / kPage * kPage;
  for (const Pages& pages : std::list<Pages>(guarded_)) {
    const std::uint64_t from = std::max(begin, pages.begin);
    const std::uint64_t to = std::min(end, pages.end);
    if (from < to) apply(from, to);
  }
}

void HostMemory::poison(const Access& access) {
  open(access);
  each_row(access, [](std::uint64_t begin, std::uint64_t end) {
    std::memset(reinterpret_cast<void*>(begin), kPoison, end - begin);
  });
  close(access);
}

bool HostMemory::guards(std::uint64_t address) const {
  return std::any_of(guarded_.begin(), guarded_.end(),
                     [&](const Pages& pages) { return address >= pages.begin && address < pages.end; });
}

}  // namespace fakecuda
