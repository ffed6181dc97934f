# System libraries as imported targets: snapstone::xxhash and snapstone::zstd (required), snapstone::liburing (optional).
# Sets SNAPSTONE_HAVE_LIBURING to 1 or 0.
include(CheckCXXSourceCompiles)
include(CMakePushCheckState)

# Declares snapstone::<name> from one header and one library file, or fails with the packages that provide them.
function(snapstone_require name header library packages)
  find_path(SNAPSTONE_${name}_INCLUDE_DIR ${header})
  find_library(SNAPSTONE_${name}_LIBRARY ${library})
  if(NOT SNAPSTONE_${name}_INCLUDE_DIR OR NOT SNAPSTONE_${name}_LIBRARY)
    message(FATAL_ERROR "${name}: ${header} or lib${library} not found; install ${packages}, or run 'make setup'")
  endif()
  add_library(snapstone::${name} UNKNOWN IMPORTED)
  set_target_properties(snapstone::${name} PROPERTIES
    IMPORTED_LOCATION "${SNAPSTONE_${name}_LIBRARY}"
    INTERFACE_INCLUDE_DIRECTORIES "${SNAPSTONE_${name}_INCLUDE_DIR}")
endfunction()

snapstone_require(xxhash xxhash.h xxhash "libxxhash-dev (Debian, Ubuntu) or xxhash-devel (Fedora)")
snapstone_require(zstd zstd.h zstd "libzstd-dev (Debian, Ubuntu) or libzstd-devel (Fedora)")

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

option(SNAPSTONE_LIBURING "Use liburing when it is installed" ON)
set(SNAPSTONE_HAVE_LIBURING 0)
if(SNAPSTONE_LIBURING)
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
  message(STATUS "liburing: not found; building without the io_uring rungs (install liburing-dev to have them)")
endif()
