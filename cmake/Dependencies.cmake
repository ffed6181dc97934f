# System libraries as imported targets: snapstone::xxhash, snapstone::zstd, snapstone::liburing, each unless it is missing
# or named in SNAPSTONE_WITHOUT. Sets SNAPSTONE_HAVE_XXHASH, SNAPSTONE_HAVE_ZSTD and SNAPSTONE_HAVE_LIBURING to 1 or 0.
include(CheckCXXSourceCompiles)
include(CMakePushCheckState)

set(SNAPSTONE_WITHOUT "" CACHE STRING "Libraries to build without even if installed: any of xxhash;zstd;liburing")
foreach(name IN LISTS SNAPSTONE_WITHOUT)
  if(NOT name MATCHES "^(xxhash|zstd|liburing)$")
    message(FATAL_ERROR "SNAPSTONE_WITHOUT=${name}: must be a list of xxhash, zstd and liburing")
  endif()
endforeach()

# Declares snapstone::<name> from one header and one library file, and sets <result>; or says what the build lacks.
function(snapstone_find name header packages lack result)
  set(${result} 0 PARENT_SCOPE)
  if(name IN_LIST SNAPSTONE_WITHOUT)
    message(STATUS "${name}: left out; ${lack}")
    return()
  endif()
  find_path(SNAPSTONE_${name}_INCLUDE_DIR ${header})
  find_library(SNAPSTONE_${name}_LIBRARY ${name})
  if(NOT SNAPSTONE_${name}_INCLUDE_DIR OR NOT SNAPSTONE_${name}_LIBRARY)
    message(STATUS "${name}: ${header} or lib${name} not found; ${lack} (install ${packages} to have it)")
    return()
  endif()
  add_library(snapstone::${name} UNKNOWN IMPORTED)
  set_target_properties(snapstone::${name} PROPERTIES
    IMPORTED_LOCATION "${SNAPSTONE_${name}_LIBRARY}"
    INTERFACE_INCLUDE_DIRECTORIES "${SNAPSTONE_${name}_INCLUDE_DIR}")
  set(${result} 1 PARENT_SCOPE)
endfunction()

snapstone_find(xxhash xxhash.h "libxxhash-dev (Debian, Ubuntu) or xxhash-devel (Fedora)"
  "digests come from csrc/base/xxh3.h, several times slower" SNAPSTONE_HAVE_XXHASH)
snapstone_find(zstd zstd.h "libzstd-dev (Debian, Ubuntu) or libzstd-devel (Fedora)"
  "codecs with zstd are refused" SNAPSTONE_HAVE_ZSTD)

# A static liburing spares the user's machine the package, but only an archive of position-independent code can go into
# an extension module; linking a trial shared object is the only way to tell.
function(snapstone_check_static_liburing archive include_dir result)
  cmake_push_check_state(RESET)
  set(CMAKE_REQUIRED_INCLUDES "${include_dir}")
  set(CMAKE_REQUIRED_FLAGS "-fPIC")
  set(CMAKE_REQUIRED_LINK_OPTIONS -shared)
  set(CMAKE_REQUIRED_LIBRARIES "${archive}")
  check_cxx_source_compiles("
    #include <liburing.h>
    extern \"C\" int snapstone_probe() { io_uring ring; return io_uring_queue_init(1, &ring, 0) + io_uring_submit(&ring); }
    int main() { return snapstone_probe(); }" ${result})
  cmake_pop_check_state()
endfunction()

set(SNAPSTONE_HAVE_LIBURING 0)
if(NOT "liburing" IN_LIST SNAPSTONE_WITHOUT)
  find_path(SNAPSTONE_liburing_INCLUDE_DIR liburing.h)
  find_library(SNAPSTONE_liburing_ARCHIVE NAMES liburing.a)
  find_library(SNAPSTONE_liburing_SHARED NAMES uring)
  set(uring_library "${SNAPSTONE_liburing_SHARED}")
  if(SNAPSTONE_liburing_INCLUDE_DIR AND SNAPSTONE_liburing_ARCHIVE)
    snapstone_check_static_liburing("${SNAPSTONE_liburing_ARCHIVE}" "${SNAPSTONE_liburing_INCLUDE_DIR}"
      SNAPSTONE_LIBURING_ARCHIVE_IS_PIC)
    if(SNAPSTONE_LIBURING_ARCHIVE_IS_PIC)
      set(uring_library "${SNAPSTONE_liburing_ARCHIVE}")
    endif()
  endif()
  if(SNAPSTONE_liburing_INCLUDE_DIR AND uring_library)
    set(SNAPSTONE_HAVE_LIBURING 1)
    add_library(snapstone::liburing UNKNOWN IMPORTED)
    set_target_properties(snapstone::liburing PROPERTIES
      IMPORTED_LOCATION "${uring_library}"
      INTERFACE_INCLUDE_DIRECTORIES "${SNAPSTONE_liburing_INCLUDE_DIR}")
    message(STATUS "liburing: ${uring_library}")
  endif()
endif()
if(NOT SNAPSTONE_HAVE_LIBURING)
  message(STATUS "liburing: left out or not found; building without the io_uring rungs (install liburing-dev to have them)")
endif()
