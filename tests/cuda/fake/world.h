// World: the devices of the fake driver, their streams, and the one thread that works for all of them.
//
// A stream is a queue of work. Work runs when it is at the head of its queue, when what it waits for is done, and when
// the mode lets it (options.h): late, and in any order across streams that events allow. Work that runs on one thread
// and work that runs at once cannot be told apart by what they leave behind, except by races, which are found by order
// rather than by time (races.h).
//
// Threads: any. `mutex` guards everything but the bytes that work moves. Never destroyed.
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "access.h"
#include "device_memory.h"
#include "host_memory.h"
#include "options.h"
#include "races.h"
#include "report.h"

namespace fakecuda {

using Time = std::chrono::steady_clock::time_point;

struct Stream;

// A place in a stream: reached when that many pieces of work have ended.
struct Place {
  Stream* stream = nullptr;
  std::uint64_t sequence = 0;
};

struct Work {
  std::string what;
  std::vector<Access> accesses;    // all that are known before it runs
  std::vector<Access> guarded;     // host ranges
  std::function<void(Work&)> run;  // without the lock; may add accesses; an exception is a fault of the device
  std::function<void()> finish;    // with the lock, once it has ended
  std::optional<Place> after;
  int link = -1;  // 2 * device + direction
  std::uint64_t link_bytes = 0;
  std::chrono::nanoseconds duration{0};
  bool held = false;  // does not end before it is let go
  // Filled by World:
  std::uint64_t sequence = 0;
  std::uint64_t order = 0;  // among all work
  Clock clock;
  std::optional<Time> ends;
};

struct Stream {
  std::size_t number = 0;
  int device = 0;
  bool destroyed = false;
  bool capturing = false;
  std::deque<std::unique_ptr<Work>> queue;
  std::uint64_t enqueued = 0;
  std::uint64_t completed = 0;
  std::uint64_t demanded = 0;  // lazy: run up to here
  Clock clock;
  Time begins{};  // chaos: not before
};

struct Event {
  int device = 0;
  bool destroyed = false;
  bool captured = false;
  Place place;  // no stream: never recorded
  Clock clock;
  int refusals = 0;  // lazy: how many more queries are told "not ready" before anything runs
};

struct Context {
  int device = 0;
  int retained = 0;
};

class World {
 public:
  static World& get();

  using Lock = std::unique_lock<std::mutex>;

  void start();  // once, by cuInit

  // The null handle is the legacy default stream of `device`. Null: no such live stream.
  Stream* find_stream(void* handle, int device);
  Event* find_event(void* handle);
  Stream* make_stream(int device);
  Event* make_event(int device);

  // Appends work and wakes the worker. Poisons and guards host ranges that it will write, and that are registered.
  Place enqueue(Stream& stream, std::unique_ptr<Work> work);
  // Blocks until the place is reached, or the device lost; the host has seen it then.
  void wait_for(Lock& lock, const Place& place);
  bool reached(const Place& place) const {
    return place.stream == nullptr || place.stream->completed >= place.sequence || lost(place.stream->device) != 0;
  }
  void demand(const Place& place);
  void drain(Lock& lock);  // all streams of all devices; lets go of what is held
  void let_go();
  // Work that has not ended and conflicts with this access; empty: none.
  std::string pending(const Access& access) const;
  bool pending_in_host(const Access& access) const;  // the same among registered host memory alone

  int lost(int device) const { return lost_[static_cast<std::size_t>(device)]; }
  void lose(int device, int code);
  std::uint64_t pending_count() const;
  void set_fail_rules(std::vector<FailRule> rules);
  // The code with which this call is to fail, or 0.
  int injected(const std::string& call);

  std::mutex mutex;
  std::condition_variable changed;
  Options options;
  Report report;
  std::unique_ptr<DeviceMemory> memory;
  std::unique_ptr<HostMemory> host;
  Races races;
  Clock host_clock;  // what the host has seen
  std::vector<Context> contexts;
  std::mt19937_64 random;
  bool initialised = false;
  bool forked = false;
  int captures = 0;

 private:
  World();
  void work();
  Stream* pick(Time now, std::optional<Time>& wake);
  bool runnable(const Stream& stream) const;
  bool due(Stream& stream, Time now, std::optional<Time>& wake);
  void spread_demands();
  void execute(Lock& lock, Stream& stream);
  void check_races(const Stream& stream, const Work& work);

  std::vector<std::unique_ptr<Stream>> streams_;
  std::vector<std::unique_ptr<Event>> events_;
  std::set<void*> stream_handles_;
  std::set<void*> event_handles_;
  const Work* running_ = nullptr;
  std::vector<Stream*> legacy_;
  std::vector<int> lost_;
  std::vector<Time> link_free_;
  std::uint64_t order_ = 0;
  std::map<std::string, std::uint64_t> fail_counts_;
};

void watch_touches();  // touch.cc

}  // namespace fakecuda
