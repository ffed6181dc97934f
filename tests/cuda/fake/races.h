// Races: remembers which work touched which bytes, and finds two pieces of work of which one writes what the other
// touches, and that nothing orders: no stream, no event, no host that had seen the first one end.
//
// It does not matter in which order they happened to run. Threads: the caller's lock.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <unordered_map>
#include <vector>

#include "access.h"

namespace fakecuda {

class Races {
 public:
  struct Past {
    Access access;
    std::size_t stream = 0;
    std::uint64_t sequence = 0;  // within the stream
    std::string what;
  };

  // A work's access: adds it, and returns the earlier one that it races with (empty `what`: none).
  std::string add(const Access& access, const Clock& clock, std::size_t stream, std::uint64_t sequence,
                  const std::string& what);
  // What the host, which has seen `seen`, would race with by this access.
  std::string against_host(const Access& access, const Clock& seen) const;
  // Forgets all of these bytes: they are another allocation's from now on.
  void forget(std::uint64_t begin, std::uint64_t end);
  void clear() { buckets_.clear(); }

 private:
  static constexpr unsigned kBucketShift = 23;

  std::unordered_map<std::uint64_t, std::vector<Past>> buckets_;
};

}  // namespace fakecuda
