// disk_limit: what this directory takes and gives when nothing but the disk is in the way, the limit of every engine.
//
// write: io_uring + O_DIRECT from slots of huge pages that are full and hot (no copy, no digest) into a new file, then
//        one fdatasync.
// read:  io_uring + O_DIRECT of that file into the same kind of slots; nothing looks at the bytes.
//
//     disk_limit FILE write|read NBYTES
//
// prints the seconds from open to the last completion, for a write to the end of fdatasync. One thread, 64 slots of
// 1 MiB. NBYTES is rounded up to whole slots. The file is allocated first, as any engine that knows its size can do.
// Failure: one line on stderr and exit status 1; a short transfer is a failure.
#include <fcntl.h>
#include <liburing.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

namespace {

constexpr std::uint64_t kBlockBytes = 1 << 20;
constexpr std::uint64_t kSlots = 64;
constexpr std::uint64_t kHugePageBytes = 2 << 20;

[[noreturn]] void fail(const char* what, int error) {
  std::fprintf(stderr, "%s: %s\n", what, std::strerror(error));
  std::exit(1);
}

// Filled with what no disk can compress and touched, so that no page fault falls into the measured time.
char* make_slots() {
  const std::uint64_t nbytes = kBlockBytes * kSlots;
  void* memory = mmap(nullptr, nbytes + kHugePageBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) fail("mmap", errno);
  const auto address = reinterpret_cast<std::uintptr_t>(memory);
  char* slots = reinterpret_cast<char*>((address + kHugePageBytes - 1) & ~(kHugePageBytes - 1));
  // Refused where huge pages are off: small pages then are part of the limit.
  madvise(slots, nbytes, MADV_HUGEPAGE);
  std::uint64_t state = 0x9E3779B97F4A7C15;
  for (std::uint64_t i = 0; i < nbytes; i += sizeof(state)) {
    state = state * 6364136223846793005 + 1442695040888963407;
    std::memcpy(slots + i, &state, sizeof(state));
  }
  return slots;
}

// Keeps every slot in flight until all blocks are done.
void transfer(int fd, bool writing, std::uint64_t block_count, char* slots) {
  io_uring ring;
  if (const int error = io_uring_queue_init(kSlots, &ring, 0)) fail("io_uring_queue_init", -error);
  std::vector<std::uint64_t> free_slots;
  for (std::uint64_t slot = 0; slot < kSlots; ++slot) free_slots.push_back(slot);
  std::uint64_t next = 0;
  std::uint64_t in_flight = 0;
  while (next < block_count || in_flight > 0) {
    for (; next < block_count && !free_slots.empty(); ++next, ++in_flight) {
      const std::uint64_t slot = free_slots.back();
      free_slots.pop_back();
      io_uring_sqe* sqe = io_uring_get_sqe(&ring);
      char* data = slots + slot * kBlockBytes;
      if (writing) {
        io_uring_prep_write(sqe, fd, data, kBlockBytes, next * kBlockBytes);
      } else {
        io_uring_prep_read(sqe, fd, data, kBlockBytes, next * kBlockBytes);
      }
      io_uring_sqe_set_data64(sqe, slot);
    }
    const int submitted = io_uring_submit_and_wait(&ring, 1);
    if (submitted < 0 && submitted != -EINTR) fail("io_uring_submit_and_wait", -submitted);
    io_uring_cqe* cqe = nullptr;
    while (io_uring_peek_cqe(&ring, &cqe) == 0) {
      if (cqe->res != static_cast<int>(kBlockBytes)) fail("transfer of 1 MiB", cqe->res < 0 ? -cqe->res : EIO);
      free_slots.push_back(io_uring_cqe_get_data64(cqe));
      io_uring_cqe_seen(&ring, cqe);
      --in_flight;
    }
  }
  io_uring_queue_exit(&ring);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 4) {
    std::fprintf(stderr, "usage: disk_limit FILE write|read NBYTES\n");
    return 2;
  }
  const char* path = argv[1];
  const bool writing = std::string(argv[2]) == "write";
  const std::uint64_t wanted = std::max<std::uint64_t>(std::strtoull(argv[3], nullptr, 10), 1);
  const std::uint64_t block_count = (wanted + kBlockBytes - 1) / kBlockBytes;
  char* slots = make_slots();

  const auto begin = std::chrono::steady_clock::now();
  const int fd = open(path, (writing ? O_CREAT | O_EXCL | O_WRONLY : O_RDONLY) | O_DIRECT, 0644);
  if (fd < 0) fail("open with O_DIRECT", errno);
  // Not every file system can allocate; the write is then timed without.
  if (writing && fallocate(fd, 0, 0, static_cast<off_t>(block_count * kBlockBytes)) && errno != EOPNOTSUPP)
    fail("fallocate", errno);
  transfer(fd, writing, block_count, slots);
  if (writing && fdatasync(fd)) fail("fdatasync", errno);
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - begin;
  if (close(fd)) fail("close", errno);
  std::printf("%.6f\n", seconds.count());
}
