// Races: remembers which work touched which bytes, and finds two pieces of work of which one writes what the other
// touches, and that nothing orders: no stream, no event, no host that had seen the first one end.
//
// It does not matter in which order they happened to run. Threads: the caller's lock.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
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
  std::string against_host(const Access& access, const Clock& seen);
  // Forgets all of these bytes: they are another allocation's from now on.
  void forget(std::uint64_t begin, std::uint64_t end);
  void clear() {
    buckets_.clear();
    pages_.clear();
  }

 private:
  static constexpr unsigned kBucketShift = 23;
  static constexpr unsigned kPageShift = 12;

  static bool small(const Access& access);
  template <class Each>
  void each_list(std::uint64_t begin, std::uint64_t end, Each&& each);

  // An access is in the list of every place that it reaches into: of pages if it is no longer than one, which there may
  // be very many of, else of buckets.
  std::unordered_map<std::uint64_t, std::vector<Past>> buckets_;
  std::map<std::uint64_t, std::vector<Past>> pages_;
};

}  // namespace fakecuda
