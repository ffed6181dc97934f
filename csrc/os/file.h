// Regular files: every call retries EINTR, passes the fault seam first, and throws OsError(verb, path, offset, nbytes).
//
// Files are named relative to an open directory, as one component, and never through a symbolic link. Reads refuse
// anything but a regular file (O_NONBLOCK on open, then fstat), so a FIFO or a device planted in a checkpoint cannot
// block a reader.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "os/unique_fd.h"

namespace snapstone::os {

inline constexpr const char* kUnnamedStep = "unnamed";

struct File {
  UniqueFd fd;
  std::string path;     // for messages
  bool direct = false;  // O_DIRECT is set
};

// `directory_fd` + `name`; `directory_path` is for messages. O_CREAT|O_EXCL|O_NOFOLLOW|O_CLOEXEC, mode 0600. With
// `direct`, falls back to buffered (File::direct == false) where the file system refuses O_DIRECT (EINVAL).
File create_file(int directory_fd, const std::string& directory_path, const std::string& name, bool direct);
// O_RDONLY|O_NOFOLLOW|O_NONBLOCK; a non-regular file is OsError(EINVAL, "open: not a regular file").
File open_for_read(int directory_fd, const std::string& directory_path, const std::string& name, bool direct);

std::uint64_t file_nbytes(const File& file);  // fstat
// Real fallocate(2), never the emulation; true if space was reserved, false where the file system has none
// (EOPNOTSUPP).
bool preallocate(const File& file, std::uint64_t nbytes);
void truncate(const File& file, std::uint64_t nbytes);  // ftruncate
// fsync; never call again on this file after it threw. `step` is what tests leave out (base/fault_hook.h): sync/STEP.
void sync(const File& file, const char* step = kUnnamedStep);
void sync(int fd, const std::string& path, const char* step);
// Sets O_DIRECT on the open file; false where the file system refuses it (EINVAL).
bool set_direct(int fd, const std::string& path);
// Clears O_DIRECT on the open file, for file systems that refuse it at write time; not through the seam.
void drop_direct(int fd) noexcept;
// Lets go of the file's pages in the page cache, but for dirty ones: reads after it are the device's. Best effort.
void drop_cached(const File& file) noexcept;

// Whole transfers: loop over short counts. pread_full throws CorruptError("file is shorter than recorded") at end of
// file.
void pwrite_full(int fd, const std::string& path, const void* source, std::uint64_t nbytes, std::uint64_t offset);
void pread_full(int fd, const std::string& path, void* target, std::uint64_t nbytes, std::uint64_t offset);

// O_EXCL create, write, close: one small file.
void write_file(int directory_fd, const std::string& directory_path, const std::string& name,
                std::span<const std::uint8_t> bytes);
// All of a file that was just created: write, fsync, close (the caller syncs the directory).
void write_durably(File file, std::span<const std::uint8_t> bytes, const char* step = kUnnamedStep);
// Whole small file; refuses non-regular files and more than `limit_nbytes` (CorruptError, before allocating). With
// `uncached` as the device has it.
std::vector<std::uint8_t> read_file(int directory_fd, const std::string& directory_path, const std::string& name,
                                    std::uint64_t limit_nbytes, bool uncached = false);

}  // namespace snapstone::os
