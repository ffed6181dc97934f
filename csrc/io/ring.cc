#if SNAPSTONE_HAVE_LIBURING

#include "io/ring.h"

#include <array>
#include <cerrno>

#include "base/error.h"
#include "base/fault_hook.h"
#include "os/private_fds.h"

namespace snapstone::io {
namespace {

constexpr unsigned kFlags518 = IORING_SETUP_CLAMP | IORING_SETUP_SUBMIT_ALL;
// No interrupt to the owner for each completion.
constexpr unsigned kFlags519 = kFlags518 | IORING_SETUP_COOP_TASKRUN;
constexpr unsigned kFlags60 = kFlags519 | IORING_SETUP_SINGLE_ISSUER;
// Completions are worked off inside io_uring_enter only, in batches.
constexpr unsigned kFlags61 = kFlags60 | IORING_SETUP_DEFER_TASKRUN;
// Each step gives up the newest flag left; kernels answer flags that they do not know with EINVAL.
constexpr std::array<unsigned, 6> kSetupFlags = {kFlags61, kFlags60, kFlags519, kFlags518, IORING_SETUP_CLAMP, 0};

// 5.6: IORING_OP_READ and IORING_OP_WRITE. 5.5: completions are never dropped for want of room in the ring.
constexpr unsigned kFeaturesNeeded = IORING_FEAT_RW_CUR_POS | IORING_FEAT_NODROP;

}  // namespace

Ring::Ring(unsigned entries) {
  int error_number = EINVAL;
  for (std::size_t step = 0; step < kSetupFlags.size() && error_number == EINVAL; ++step) {
    error_number = setup(entries, kSetupFlags[step]);
  }
  if (error_number != 0) {
    throw OsError(error_number, "io_uring_setup", "");
  }
  if ((ring_.features & kFeaturesNeeded) != kFeaturesNeeded) {
    io_uring_queue_exit(&ring_);
    throw OsError(ENOSYS, "io_uring_setup", "");
  }
  io_uring_ring_dontfork(&ring_);  // a child must not write into a ring that it shares; best effort
  os::keep_from_children(ring_.ring_fd);
}

Ring::~Ring() {
  os::forget_private(ring_.ring_fd);
  io_uring_queue_exit(&ring_);
}

int Ring::setup(unsigned entries, unsigned flags) noexcept {
  const fault::Outcome outcome = fault::point("io_uring_setup", "");
  if (outcome.error_number != 0) {
    return outcome.error_number;
  }
  io_uring_params params{};
  params.flags = flags;
  return -io_uring_queue_init_params(entries, &ring_, &params);
}

}  // namespace snapstone::io

#endif
