#!/usr/bin/env bash
# .venv-integrations/: the trainers that the integrations are for, on top of .venv/; does only what is out of date.
#
# A package that cannot be installed fails this, with pip's reason. Megatron-core needs Python 3.12, of which its
# Python part makes no use: each generation is unpacked into build/integrations/megatron-core-VERSION/ instead, for
# tests to put on PYTHONPATH, and so is Megatron-Bridge.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly VENV=.venv-integrations
readonly UNPACKED=build/integrations
readonly MEGATRON=(megatron-core==0.16.1 megatron-core==0.18.2 megatron-core==0.19.2 megatron-bridge==0.6.2)
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1

key=$(cat constraints.txt constraints-integrations.txt tools/integrations.sh | sha256sum | cut -d' ' -f1)
stamp=$VENV/.stamp
if [[ -f $stamp && $(<"$stamp") == "$key" ]]; then exit 0; fi

echo "integrations: installing trainers into $VENV"
rm -rf "$VENV"
.venv/bin/python -m venv "$VENV"
# addsitedir rather than a bare path: it also runs the .pth file by which snapstone is installed there.
site=$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
own=$("$VENV/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
echo "import site; site.addsitedir('$site')" >"$own/snapstone-base.pth"
grep -v '^#' constraints-integrations.txt >"$VENV/requirements.txt"
"$VENV/bin/pip" install -qq -c constraints.txt -r "$VENV/requirements.txt"

for requirement in "${MEGATRON[@]}"; do
  folder=$UNPACKED/${requirement/==/-}
  rm -rf "$folder"
  mkdir -p "$folder"
  "$VENV/bin/pip" download -qq --no-deps --only-binary=:all: --python-version 3.12 -d "$folder" "$requirement"
  "$VENV/bin/python" -m zipfile -e "$folder"/*.whl "$folder"
  rm "$folder"/*.whl
done
printf '%s\n' "$key" >"$stamp"
