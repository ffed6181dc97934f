#include "io/io_engine.h"

#include <array>
#include <stdexcept>

#include "io/thread_engine.h"
#include "io/uring_engine.h"

namespace snapstone::io {
namespace {

constexpr std::array<Rung, 4> kRungs = {Rung::kUringFixed, Rung::kUring, Rung::kThreadsDirect, Rung::kBuffered};

}  // namespace

const char* rung_name(Rung rung) {
  switch (rung) {
    case Rung::kUringFixed:
      return "uring-fixed";
    case Rung::kUring:
      return "uring";
    case Rung::kThreadsDirect:
      return "threads-direct";
    case Rung::kBuffered:
      return "buffered";
  }
  return "unknown";
}

Rung rung_from_name(const std::string& name) {
  std::string choices;
  for (const Rung rung : kRungs) {
    if (name == rung_name(rung)) {
      return rung;
    }
    choices += choices.empty() ? "" : ", ";
    choices += rung_name(rung);
  }
  throw std::invalid_argument("no I/O rung is called '" + name + "'; choose one of " + choices);
}

std::unique_ptr<IoEngine> make_engine(Rung rung, unsigned queue_depth) {
  if (rung_is_uring(rung)) {
    return make_uring_engine(rung, queue_depth);
  }
  return std::make_unique<ThreadEngine>(rung, queue_depth);
}

}  // namespace snapstone::io
