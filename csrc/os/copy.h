// Bytes of one regular file copied to another inside the kernel. Same rules as file.h: seam first, EINTR loop, OsError.
#pragma once

#include <cstdint>

#include "os/file.h"

namespace snapstone::os {

// Copies `nbytes` at `source_offset` to `target_offset` of `target`: all of them, or it throws. copy_file_range(2), so
// that file systems that can share blocks or copy on the server do; pread and pwrite through a buffer of 1 MiB where
// there is no such call for these two files. Both files without O_DIRECT. CorruptError("file is shorter than recorded")
// when the source ends early.
void copy_range(const File& source, std::uint64_t source_offset, const File& target, std::uint64_t target_offset,
                std::uint64_t nbytes);

}  // namespace snapstone::os
