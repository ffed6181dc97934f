#include "os/file_system.h"

#include <fcntl.h>
#include <linux/fs.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdio>
#include <vector>

#include "base/error.h"
#include "base/limits.h"
#include "os/call.h"
#include "os/file.h"

namespace snapstone::os {
namespace {

enum class Backing { kDisk, kMemory, kNetwork };

struct Known {
  std::uint32_t magic;
  const char* name;
  Backing backing;
};

// f_type of statfs(2); the values of <linux/magic.h> and of the out-of-tree file systems' own sources.
constexpr Known kKnown[] = {
    {0xEF53, "ext4", Backing::kDisk},  // ext2 and ext3 share it
    {0x58465342, "xfs", Backing::kDisk},       {0x9123683E, "btrfs", Backing::kDisk},
    {0x2FC12FC1, "zfs", Backing::kDisk},       {0xF2F52010, "f2fs", Backing::kDisk},
    {0xCA451A4E, "bcachefs", Backing::kDisk},  {0x794C7630, "overlayfs", Backing::kDisk},
    {0xF15F, "ecryptfs", Backing::kDisk},      {0x01021994, "tmpfs", Backing::kMemory},
    {0x858458F6, "ramfs", Backing::kMemory},   {0x958458F6, "hugetlbfs", Backing::kMemory},
    {0x6969, "nfs", Backing::kNetwork},        {0x0BD00BD0, "lustre", Backing::kNetwork},
    {0x65735546, "fuse", Backing::kNetwork},  // virtiofs too
    {0x00C36400, "ceph", Backing::kNetwork},   {0x47504653, "gpfs", Backing::kNetwork},
    {0x19830326, "beegfs", Backing::kNetwork}, {0x01021997, "9p", Backing::kNetwork},
    {0x517B, "smb", Backing::kNetwork},        {0xFE534D42, "smb2", Backing::kNetwork},
    {0xFF534D42, "cifs", Backing::kNetwork},   {0x5346414F, "afs", Backing::kNetwork},
    {0x01161970, "gfs2", Backing::kNetwork},   {0x7461636F, "ocfs2", Backing::kNetwork},
};

// File systems without O_TMPFILE say EOPNOTSUPP; kernels and layers that do not know the flag say EISDIR, ENOENT or
// EINVAL.
bool lacks_tmpfile(int error_number) {
  return error_number == EOPNOTSUPP || error_number == EISDIR || error_number == ENOENT || error_number == EINVAL ||
         error_number == ENOSYS;
}

std::string probe_name() {
  static std::atomic<unsigned> count{0};
  return ".snapstone-probe-" + std::to_string(::getpid()) + "-" + std::to_string(count.fetch_add(1));
}

// A name that a probe gives a file. Gone with this object, whatever happened to the file.
class ProbeName {
 public:
  explicit ProbeName(const Directory& directory) : directory_(directory), name_(probe_name()) {}
  ProbeName(const ProbeName&) = delete;
  ProbeName& operator=(const ProbeName&) = delete;
  ~ProbeName() {
    try {
      unlink_at(directory_, name_);
    } catch (...) {  // it was never made
    }
  }

  const std::string& get() const noexcept { return name_; }
  File create() const { return create_file(directory_.fd.get(), directory_.path, name_, false); }

 private:
  const Directory& directory_;
  std::string name_;
};

}  // namespace

FileSystemFacts file_system_facts(const Directory& directory) {
  struct statfs facts{};
  if (call("statfs", directory.path, [&] { return ::fstatfs(directory.fd.get(), &facts); }) != 0) {
    throw OsError(errno, "statfs", directory.path);
  }
  struct stat identity{};
  if (call("fstat", directory.path, [&] { return ::fstat(directory.fd.get(), &identity); }) != 0) {
    throw OsError(errno, "fstat", directory.path);
  }
  FileSystemFacts result;
  const auto magic = static_cast<std::uint32_t>(facts.f_type);  // signed and wider on some architectures
  const auto* known =
      std::find_if(std::begin(kKnown), std::end(kKnown), [&](const Known& k) { return k.magic == magic; });
  if (known != std::end(kKnown)) {
    result.name = known->name;
    result.memory_backed = known->backing == Backing::kMemory;
    result.network = known->backing == Backing::kNetwork;
  } else {
    char text[16];
    std::snprintf(text, sizeof text, "0x%x", magic);
    result.name = text;
  }
  const auto block_bytes = static_cast<std::uint64_t>(facts.f_frsize != 0 ? facts.f_frsize : facts.f_bsize);
  result.device = identity.st_dev;
  result.free_bytes = facts.f_bavail * block_bytes;  // what is left for users other than root
  result.total_bytes = facts.f_blocks * block_bytes;
  return result;
}

std::uint64_t direct_io_alignment(int fd) {
  const std::string path = "descriptor " + std::to_string(fd);
#ifdef STATX_DIOALIGN
  struct statx extended{};
  if (call("fstat", path, [&] { return ::statx(fd, "", AT_EMPTY_PATH, STATX_DIOALIGN, &extended); }) == 0 &&
      (extended.stx_mask & STATX_DIOALIGN) != 0 && extended.stx_dio_offset_align != 0) {
    return std::max(extended.stx_dio_mem_align, extended.stx_dio_offset_align);
  }
#endif
  struct stat facts{};
  if (call("fstat", path, [&] { return ::fstat(fd, &facts); }) != 0) {
    throw OsError(errno, "fstat", path);
  }
  return std::max(kPageBytes, static_cast<std::uint64_t>(facts.st_blksize));
}

ProbeFile open_probe_file(const Directory& directory, bool direct) {
  ProbeFile probe;
  probe.path = directory.path + "/(probe)";
  probe.fd = UniqueFd(call("open", probe.path,
                           [&] { return ::openat(directory.fd.get(), ".", O_TMPFILE | O_RDWR | O_CLOEXEC, 0600); }));
  if (!probe.fd) {
    if (!lacks_tmpfile(errno)) {
      throw OsError(errno, "open", probe.path);
    }
    const std::string name = probe_name();
    File named = create_file(directory.fd.get(), directory.path, name, false);
    unlink_at(directory, name);
    probe.fd = std::move(named.fd);
    probe.path = std::move(named.path);
  }
  probe.direct = direct && set_direct(probe.fd.get(), probe.path);
  return probe;
}

void try_hard_link(const Directory& directory) {
  const ProbeName first(directory);
  const ProbeName second(directory);
  first.create();
  link_at(directory, first.get(), directory, second.get());
  const auto a = stat_at(directory, first.get());
  const auto b = stat_at(directory, second.get());
  if (!a || !b || a->inode != b->inode) {
    throw OsError(EOPNOTSUPP, "link: made another file", directory.path);
  }
}

void try_reflink(const Directory& directory) {
  const ProbeName first(directory);
  const ProbeName second(directory);
  const File source = first.create();
  const std::vector<std::uint8_t> block(kPageBytes, 0x5a);  // what an empty file has to share, any file system can
  pwrite_full(source.fd.get(), source.path, block.data(), block.size(), 0);
  const File target = second.create();
  if (call("ioctl", target.path, [&] { return ::ioctl(target.fd.get(), FICLONE, source.fd.get()); }) != 0) {
    throw OsError(errno, "ioctl FICLONE", target.path);
  }
}

}  // namespace snapstone::os
