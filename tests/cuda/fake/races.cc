#include "races.h"

namespace fakecuda {
namespace {

bool covers(const Access& outer, const Access& inner) {
  return (outer.rows == 1 || outer.pitch == outer.width) && outer.begin <= inner.begin && outer.end() >= inner.end();
}

}  // namespace

bool Races::small(const Access& access) { return access.end() - access.begin <= 1ull << kPageShift; }

template <class Each>
void Races::each_list(std::uint64_t begin, std::uint64_t end, Each&& each) {
  for (std::uint64_t bucket = begin >> kBucketShift; bucket <= (end - 1) >> kBucketShift; ++bucket) {
    const auto found = buckets_.find(bucket);
    if (found != buckets_.end()) each(found->second);
  }
  const auto last = pages_.upper_bound((end - 1) >> kPageShift);
  for (auto page = pages_.lower_bound(begin >> kPageShift); page != last; ++page) each(page->second);
}

std::string Races::add(const Access& access, const Clock& clock, std::size_t stream, std::uint64_t sequence,
                       const std::string& what) {
  std::string race;
  each_list(access.begin, access.end(), [&](std::vector<Past>& past) {
    for (const Past& earlier : past) {
      const bool ordered = earlier.sequence <= clock.of(earlier.stream);
      if (race.empty() && !ordered && conflict(earlier.access, access)) race = earlier.what;
    }
    // Whatever will race with an earlier access that this one covers and comes after, will race with this one, too.
    std::erase_if(past, [&](const Past& earlier) {
      const bool ordered = earlier.sequence <= clock.of(earlier.stream);
      const bool as_strong = access.write || !earlier.access.write;
      return ordered && as_strong && covers(access, earlier.access);
    });
  });
  const unsigned shift = small(access) ? kPageShift : kBucketShift;
  for (std::uint64_t at = access.begin >> shift; at <= (access.end() - 1) >> shift; ++at) {
    (small(access) ? pages_[at] : buckets_[at]).push_back({access, stream, sequence, what});
  }
  return race;
}

std::string Races::against_host(const Access& access, const Clock& seen) {
  std::string race;
  each_list(access.begin, access.end(), [&](const std::vector<Past>& past) {
    for (const Past& earlier : past) {
      if (race.empty() && earlier.sequence > seen.of(earlier.stream) && conflict(earlier.access, access)) {
        race = earlier.what;
      }
    }
  });
  return race;
}

void Races::forget(std::uint64_t begin, std::uint64_t end) {
  // Also what reaches beyond: it was of a block that is gone as a whole.
  each_list(begin, end, [&](std::vector<Past>& list) {
    std::erase_if(list, [&](const Past& past) { return past.access.begin < end && past.access.end() > begin; });
  });
}

}  // namespace fakecuda
