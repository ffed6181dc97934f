#!/usr/bin/env bash
# Prepares this checkout: system libraries where they are missing, .venv/, the pinned packages, the extension module.
#
# Safe to run at any time: each step keeps a stamp, the digest of the files it depends on, and is skipped while that
# digest holds. A change under csrc/ rebuilds and reinstalls the extension only.
# Environment: PYTHON names the interpreter (default: the first usable of python3, python3.13, python3.12, python3.11).
#              SNAPSTONE_NO_APT=1 never installs system packages.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly VENV=.venv
readonly STAMPS=$VENV/.stamps
readonly CXX=${CXX:-c++}
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1

say() { printf 'setup: %s\n' "$*"; }
die() { printf 'setup: error: %s\n' "$*" >&2; exit 1; }

digest_of() { find "$@" -type f ! -name '*.pyc' -print0 | sort -z | xargs -0 sha256sum | sha256sum | cut -d' ' -f1; }
is_done() { [[ -f $STAMPS/$1 && $(<"$STAMPS/$1") == "$2" ]]; }
mark_done() { mkdir -p "$STAMPS" && printf '%s\n' "$2" >"$STAMPS/$1"; }

# --- system packages ---------------------------------------------------------------------------------------------

apt_updated=no

# Installs one Debian package if this user may; says what to install otherwise. Never fails.
apt_install() {
  local sudo=()
  if [[ -n ${SNAPSTONE_NO_APT:-} ]] || ! command -v apt-get >/dev/null; then
    say "missing $1 (Debian, Ubuntu name): install it with the system's package manager"
    return 0
  fi
  if [[ $(id -u) != 0 ]]; then
    if ! sudo -n true 2>/dev/null; then
      say "missing $1: run 'sudo apt-get install $1'"
      return 0
    fi
    sudo=(sudo -n)
  fi
  if [[ $apt_updated == no ]]; then
    "${sudo[@]}" apt-get update -qq || say "apt-get update failed; trying with the lists at hand"
    apt_updated=yes
  fi
  say "installing $1"
  # A fresh machine updates itself while people begin to work on it, and holds the lock meanwhile.
  "${sudo[@]}" env DEBIAN_FRONTEND=noninteractive \
    apt-get -o DPkg::Lock::Timeout=300 install -y -qq --no-install-recommends "$1" >/dev/null ||
    say "could not install $1: run 'apt-get install $1' as root"
}

# True when a shared object that includes header $1 links with library $2: header and library are both there.
has_library() { echo "#include <$1>" | "$CXX" -x c++ -shared -fPIC -o /dev/null - -l"$2" 2>/dev/null; }

need() {  # need PACKAGE CHECK...: installs PACKAGE unless CHECK succeeds
  local package=$1
  shift
  "$@" >/dev/null 2>&1 || apt_install "$package"
}

install_system_packages() {
  local key
  key=$(digest_of tools/setup.sh)
  is_done system "$key" && return 0
  need g++ command -v "$CXX"
  command -v "$CXX" >/dev/null || die "no C++ compiler ($CXX): install g++ 12 or newer (package g++), or set CXX"
  need libxxhash-dev has_library xxhash.h xxhash
  need libzstd-dev has_library zstd.h zstd
  need liburing-dev has_library liburing.h uring
  need libgtest-dev has_library gtest/gtest.h gtest
  need xxhash command -v xxh128sum
  has_library xxhash.h xxhash || say "no libxxhash: digests are computed by this package's own code, more slowly"
  has_library zstd.h zstd || say "no libzstd: building without compression"
  has_library liburing.h uring || say "no liburing: building without io_uring; files are written by pwrite threads"
  has_library gtest/gtest.h gtest || say "no GoogleTest: the native tests will be skipped"
  mark_done system "$key"
}

# --- Python ------------------------------------------------------------------------------------------------------

# Usable: 3.11 or newer, able to make a virtual environment, with the headers an extension module needs. Running it is
# the test: a version manager's shim may exist for a version that is not selected.
is_usable_python() {
  "$1" - <<'PY' >/dev/null 2>&1
import ensurepip, os, sys, sysconfig, venv
assert sys.version_info >= (3, 11)
assert os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h"))
PY
}

find_python() {
  local candidate
  for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11}; do
    if is_usable_python "$candidate"; then
      command -v "$candidate"
      return 0
    fi
  done
  return 1
}

make_venv() {
  if [[ -x $VENV/bin/python ]] && is_usable_python "$VENV/bin/python"; then return 0; fi
  local python
  if ! python=$(find_python); then
    apt_install python3-venv
    apt_install python3-dev
    python=$(find_python) || die "no usable Python >= 3.11: it needs the venv module and Python.h" \
      "(packages python3-venv and python3-dev); name another one with PYTHON="
  fi
  say "creating $VENV with $("$python" --version)"
  rm -rf "$VENV"
  "$python" -m venv "$VENV"
}

install_python_packages() {
  local key
  key=$(digest_of constraints.txt)
  is_done packages "$key" && return 0
  say "installing the pinned Python packages (torch first)"
  "$VENV/bin/pip" install -qq -c constraints.txt torch
  "$VENV/bin/pip" install -qq -r constraints.txt
  mark_done packages "$key"
}

# --- the package -------------------------------------------------------------------------------------------------

# scikit-build-core's build/{wheel_tag} of this interpreter.
build_dir() {
  "$VENV/bin/python" -c 'import sys, sysconfig
tag = "cp{}{}".format(*sys.version_info)
print("build", "{0}-{0}-{1}".format(tag, sysconfig.get_platform().replace("-", "_").replace(".", "_")), sep="/")'
}

install_package() {
  local package_key native_key directory
  package_key=$(digest_of pyproject.toml CMakeLists.txt cmake constraints.txt)
  native_key=$(digest_of csrc CMakeLists.txt cmake)
  directory=$(build_dir)
  if ! is_done package "$package_key" || [[ ! -f $directory/CMakeCache.txt ]]; then
    say "building and installing snapstone (editable)"
    PATH="$PWD/$VENV/bin:$PATH" "$VENV/bin/pip" install -qq --no-build-isolation --no-deps -e .
    mark_done package "$package_key"
    mark_done native "$native_key"
  elif ! is_done native "$native_key"; then
    say "csrc changed: rebuilding the extension"
    "$VENV/bin/cmake" --build "$directory"
    "$VENV/bin/cmake" --install "$directory" \
      --prefix "$("$VENV/bin/python" -c 'import sysconfig; print(sysconfig.get_path("platlib"))')" >/dev/null
    mark_done native "$native_key"
  fi
}

make_venv
install_system_packages
install_python_packages
install_package
