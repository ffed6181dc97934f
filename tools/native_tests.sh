#!/usr/bin/env bash
# Builds and runs tests/native, plainly or under a sanitizer: native_tests.sh [address,undefined | thread]
#
# Without GoogleTest, libxxhash or libzstd the run is skipped with a message; FAIL_WITHOUT_GTEST=1 makes that a failure.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

sanitize=${1:-}
directory=build/native${sanitize:+-${sanitize//,/-}}
export PATH="$PWD/.venv/bin:$PATH"

missing=""
for library in gtest/gtest.h:gtest:libgtest-dev xxhash.h:xxhash:libxxhash-dev zstd.h:zstd:libzstd-dev; do
  IFS=: read -r header name package <<<"$library"
  echo "#include <$header>" | "${CXX:-c++}" -x c++ -shared -fPIC -o /dev/null - -l"$name" 2>/dev/null || missing+=" $package"
done
if [[ -n $missing ]]; then
  echo "native tests: skipped, not installed:$missing"
  [[ -z ${FAIL_WITHOUT_GTEST:-} ]] || exit 1
  exit 0
fi

mkdir -p build
cmake -G Ninja -S . -B "$directory" -DSNAPSTONE_PYTHON=OFF -DSNAPSTONE_NATIVE_TESTS=ON \
  -DSNAPSTONE_SANITIZE="$sanitize" >"$directory.log" 2>&1 || { cat "$directory.log"; exit 1; }
cmake --build "$directory"

# ThreadSanitizer maps its shadow at fixed addresses, which some kernels' address randomisation collides with.
runner=()
export TSAN_OPTIONS="suppressions=$PWD/tests/native/thread_sanitizer.supp ${TSAN_OPTIONS:-}"
if [[ $sanitize == thread ]] && setarch "$(uname -m)" -R true 2>/dev/null; then
  runner=(setarch "$(uname -m)" -R)
fi
"${runner[@]}" ctest --test-dir "$directory" --output-on-failure
