#include "world.h"

#include <pthread.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <thread>

namespace fakecuda {
namespace {

using namespace std::chrono_literals;

constexpr int kIllegalAddress = 700;

// Codes after which nothing works on a device any more.
bool fatal(int code) {
  return code == 214 || code == 220 || (code >= 700 && code <= 720 && code != 712 && code != 713);
}

}  // namespace

World& World::get() {
  static World& world = *new World;
  return world;
}

World::World() : options(Options::from_environment()), random(options.seed) {
  ::pthread_atfork(nullptr, nullptr, [] {
    World& world = get();
    if (world.initialised) world.forked = true;
  });
}

void World::start() {
  if (initialised) return;
  memory = std::make_unique<DeviceMemory>(options.devices, options.memory_bytes, options.gap_bytes);
  host = std::make_unique<HostMemory>(options.guard);
  const auto devices = static_cast<std::size_t>(options.devices);
  lost_.resize(devices);
  link_free_.resize(2 * devices);
  for (int device = 0; device < options.devices; ++device) {
    contexts.push_back({device, 0});
    legacy_.push_back(make_stream(device));
  }
  initialised = true;
  watch_touches();
  std::thread([this] { work(); }).detach();
}

Stream* World::make_stream(int device) {
  // A number is used again, so that clocks stay short, once the host has seen the end of all that it stood for.
  for (const auto& old : streams_) {
    if (!old->destroyed || old->device != device || old->enqueued > host_clock.of(old->number)) continue;
    old->destroyed = false;
    return old.get();
  }
  auto stream = std::make_unique<Stream>();
  stream->number = streams_.size();
  stream->device = device;
  stream_handles_.insert(stream.get());
  streams_.push_back(std::move(stream));
  return streams_.back().get();
}

Event* World::make_event(int device) {
  for (const auto& old : events_) {
    if (!old->destroyed) continue;
    *old = Event{};
    old->device = device;
    return old.get();
  }
  auto event = std::make_unique<Event>();
  event->device = device;
  event_handles_.insert(event.get());
  events_.push_back(std::move(event));
  return events_.back().get();
}

Stream* World::find_stream(void* handle, int device) {
  if (handle == nullptr) return legacy_[static_cast<std::size_t>(device)];
  if (!stream_handles_.contains(handle)) return nullptr;
  auto* const stream = static_cast<Stream*>(handle);
  return stream->destroyed ? nullptr : stream;
}

Event* World::find_event(void* handle) {
  if (!event_handles_.contains(handle)) return nullptr;
  auto* const event = static_cast<Event*>(handle);
  return event->destroyed ? nullptr : event;
}

Place World::enqueue(Stream& stream, std::unique_ptr<Work> work) {
  stream.clock.join(host_clock);
  work->sequence = ++stream.enqueued;
  work->order = ++order_;
  stream.clock.set(stream.number, work->sequence);
  work->clock = stream.clock;
  for (const Access& access : work->accesses) {
    if (memory->is_device(access.begin) || host->covered(access.begin, 1) == HostMemory::Cover::kNone) continue;
    if (access.write && !pending_in_host(access)) host->poison(access);
    host->guard(access);
    work->guarded.push_back(access);
  }
  if (stream.queue.empty() && options.mode == Mode::kChaos && options.late_us != 0) {
    stream.begins = std::chrono::steady_clock::now() + std::chrono::microseconds(random() % options.late_us);
  }
  const Place place{&stream, work->sequence};
  stream.queue.push_back(std::move(work));
  report.count_max("queue_max", stream.queue.size());
  changed.notify_all();
  return place;
}

void World::demand(const Place& place) {
  if (place.stream == nullptr) return;
  place.stream->demanded = std::max(place.stream->demanded, place.sequence);
  changed.notify_all();
}

void World::wait_for(Lock& lock, const Place& place) {
  if (place.stream == nullptr) return;
  demand(place);
  changed.wait(lock, [&] { return reached(place); });
}

void World::let_go() {
  for (const auto& stream : streams_) {
    for (const auto& work : stream->queue) work->held = false;
  }
  changed.notify_all();
}

void World::drain(Lock& lock) {
  let_go();
  for (std::size_t i = 0; i < streams_.size(); ++i) {
    Stream& stream = *streams_[i];
    wait_for(lock, {&stream, stream.enqueued});
    host_clock.join(stream.clock);
  }
}

std::string World::pending(const Access& access) const {
  for (const auto& stream : streams_) {
    for (const auto& work : stream->queue) {
      for (const Access& other : work->accesses) {
        if (conflict(access, other)) return work->what;
      }
    }
  }
  return "";
}

void World::lose(int device, int code) {
  lost_[static_cast<std::size_t>(device)] = code;
  for (const auto& stream : streams_) {
    if (stream->device != device) continue;
    for (const auto& work : stream->queue) {
      if (work.get() == running_) continue;  // its thread does the same when it comes back
      for (const Access& access : work->guarded) host->unguard(access);
      work->guarded.clear();
    }
  }
  changed.notify_all();
}

bool World::pending_in_host(const Access& access) const {
  for (const auto& stream : streams_) {
    for (const auto& work : stream->queue) {
      for (const Access& other : work->guarded) {
        if (conflict(access, other)) return true;
      }
    }
  }
  return false;
}

std::uint64_t World::pending_count() const {
  std::uint64_t count = 0;
  for (const auto& stream : streams_) count += stream->queue.size();
  return count;
}

void World::set_fail_rules(std::vector<FailRule> rules) {
  options.fail_rules = std::move(rules);
  fail_counts_.clear();
}

int World::injected(const std::string& call) {
  const std::uint64_t count = ++fail_counts_[call];
  for (const FailRule& rule : options.fail_rules) {
    if (rule.call == call && (count == rule.nth || (rule.and_later && count > rule.nth))) return rule.code;
  }
  return 0;
}

// The worker -------------------------------------------------------------------------------------------------------

bool World::runnable(const Stream& stream) const {
  return !stream.queue.empty() && lost(stream.device) == 0 && !stream.queue.front()->held &&
         (!stream.queue.front()->after || reached(*stream.queue.front()->after));
}

// Whether the time has come for a stream's next work; else when it will, the earliest of all in `wake`.
bool World::due(Stream& stream, Time now, std::optional<Time>& wake) {
  const auto later = [&](Time time) {
    wake = wake ? std::min(*wake, time) : time;
    return false;
  };
  const bool asked = stream.demanded > stream.completed;
  if (options.mode == Mode::kLazy && !asked) return false;
  if (options.mode == Mode::kChaos && stream.begins > now) return later(stream.begins);
  Work& work = *stream.queue.front();
  if (!work.ends) {
    work.ends = now + work.duration;
    if (work.link >= 0 && options.gbps > 0) {
      Time& free = link_free_[static_cast<std::size_t>(work.link)];
      const std::chrono::duration<double> takes(static_cast<double>(work.link_bytes) / (options.gbps * 1e9));
      free = std::max(free, now) + std::chrono::duration_cast<std::chrono::nanoseconds>(takes);
      work.ends = std::max(*work.ends, free);
    }
  }
  return *work.ends <= now ? true : later(*work.ends);
}

// Lazy: whoever is asked for runs, and so does what it waits for.
void World::spread_demands() {
  for (bool more = true; more;) {
    more = false;
    for (const auto& stream : streams_) {
      if (stream->demanded <= stream->completed) continue;
      for (const auto& work : stream->queue) {
        if (work->sequence > stream->demanded) break;
        if (!work->after || reached(*work->after)) continue;
        Stream& target = *work->after->stream;
        if (target.demanded >= work->after->sequence) continue;
        target.demanded = work->after->sequence;
        more = true;
      }
    }
  }
}

Stream* World::pick(Time now, std::optional<Time>& wake) {
  if (options.mode == Mode::kLazy) spread_demands();
  std::vector<Stream*> found;
  for (const auto& stream : streams_) {
    if (runnable(*stream) && due(*stream, now, wake)) found.push_back(stream.get());
  }
  if (found.empty()) return nullptr;
  if (options.mode == Mode::kChaos) return found[random() % found.size()];
  return *std::min_element(found.begin(), found.end(), [](const Stream* a, const Stream* b) {
    return a->queue.front()->order < b->queue.front()->order;
  });
}

void World::work() {
  Lock lock(mutex);
  for (;;) {
    std::optional<Time> wake;
    Stream* const stream = pick(std::chrono::steady_clock::now(), wake);
    if (stream != nullptr) {
      execute(lock, *stream);
    } else if (wake) {
      changed.wait_until(lock, *wake);
    } else {
      changed.wait(lock);
    }
  }
}

void World::check_races(const Stream& stream, const Work& work) {
  for (const Access& access : work.accesses) {
    if (access.width == 0 || access.rows == 0) continue;
    const std::string other = races.add(access, work.clock, stream.number, work.sequence, work.what);
    if (!other.empty()) report.violation("nothing orders " + work.what + " and " + other);
  }
}

void World::execute(Lock& lock, Stream& stream) {
  Work& work = *stream.queue.front();
  const int device = stream.device;
  int failure = injected("work");
  if (failure == 0 && work.run) {
    for (const Access& access : work.guarded) host->open(access);
    running_ = &work;
    lock.unlock();
    std::string fault;
    try {
      work.run(work);
    } catch (const std::exception& error) {
      fault = error.what();
    }
    lock.lock();
    running_ = nullptr;
    if (!fault.empty()) {
      report.violation(work.what + ": " + fault);
      failure = kIllegalAddress;
    }
  }
  for (const Access& access : work.guarded) {
    host->unguard(access);
    host->close(access);
  }
  work.guarded.clear();
  if (lost(device) != 0) return;  // by another call, meanwhile
  if (failure != 0) {
    lose(device, fatal(failure) ? failure : kIllegalAddress);
    return;
  }
  check_races(stream, work);
  if (work.finish) work.finish();
  report.count("work_done");
  stream.completed = work.sequence;
  stream.queue.pop_front();
  if (options.mode == Mode::kChaos && options.late_us != 0 && random() % 8 == 0) {
    stream.begins = std::chrono::steady_clock::now() + std::chrono::microseconds(random() % options.late_us);
  }
  changed.notify_all();
}

}  // namespace fakecuda
