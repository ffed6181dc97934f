#include "races.h"

namespace fakecuda {
namespace {

bool covers(const Access& outer, const Access& inner) {
  return (outer.rows == 1 || outer.pitch == outer.width) && outer.begin <= inner.begin && outer.end() >= inner.end();
}

}  // namespace

std::string Races::add(const Access& access, const Clock& clock, std::size_t stream, std::uint64_t sequence,
                       const std::string& what) {
  std::string race;
  for (std::uint64_t bucket = access.begin >> kBucketShift; bucket <= (access.end() - 1) >> kBucketShift; ++bucket) {
    std::vector<Past>& past = buckets_[bucket];
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
    past.push_back({access, stream, sequence, what});
  }
  return race;
}

std::string Races::against_host(const Access& access, const Clock& seen) const {
  for (std::uint64_t bucket = access.begin >> kBucketShift; bucket <= (access.end() - 1) >> kBucketShift; ++bucket) {
    const auto found = buckets_.find(bucket);
    if (found == buckets_.end()) continue;
    for (const Past& earlier : found->second) {
      if (earlier.sequence > seen.of(earlier.stream) && conflict(earlier.access, access)) return earlier.what;
    }
  }
  return "";
}

void Races::forget(std::uint64_t begin, std::uint64_t end) {
  for (std::uint64_t bucket = begin >> kBucketShift; bucket <= (end - 1) >> kBucketShift; ++bucket) {
    const auto found = buckets_.find(bucket);
    if (found == buckets_.end()) continue;
    // Also what reaches beyond: it was of a block that is gone as a whole.
    std::erase_if(found->second,
                  [&](const Past& past) { return past.access.begin < end && past.access.end() > begin; });
  }
}

}  // namespace fakecuda
