#!/usr/bin/env bash
# Makes a folder that installs Sortline without network: wheels (checked against the locks), locks, installer, units.
# Run it on a machine with network, with the same kind of processor and the same Python version as the target.
set -euo pipefail
umask 022

usage() { echo "usage: deploy/kit.sh FOLDER agent|control-plane|devices... [--python PROGRAM]"; }
fail() { echo "kit.sh: $*" >&2; exit 1; }

here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
folder='' python=python3 locks=()
while [ $# -gt 0 ]; do
  case "$1" in
    -h | --help) usage; exit 0 ;;
    --python) [ $# -ge 2 ] || fail "--python needs a value"; python=$2; shift ;;
    agent | devices) locks+=("$1") ;;
    control-plane) locks+=(runtime) ;;
    -*) fail "unknown option $1" ;;
    *) [ -z "$folder" ] || fail "one folder only: $1"; folder=$1 ;;
  esac
  shift
done
if [ -z "$folder" ] || [ "${#locks[@]}" = 0 ]; then
  usage >&2
  exit 2
fi
[ ! -e "$folder" ] || [ -z "$(ls -A "$folder")" ] || fail "$folder is not empty"

mkdir -p "$folder/wheelhouse"
folder=$(cd "$folder" && pwd)
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
"$python" -m venv "$scratch/venv"
pip() { "$scratch/venv/bin/pip" --disable-pip-version-check --quiet "$@"; }
for lock in "${locks[@]}"; do
  pip download --require-hashes --only-binary :all: --dest "$folder/wheelhouse" -r "$here/requirements/$lock.lock"
done
# The build tool is in the locks: what was just checked builds the project.
pip install --no-index --find-links "$folder/wheelhouse" hatchling
pip wheel --no-deps --no-build-isolation --no-index --wheel-dir "$folder/wheelhouse" "$here"
cp -r "$here/deploy" "$here/requirements" "$here/LICENSE" "$folder"
mkdir "$folder/docs"
cp "$here/docs/install.md" "$folder/docs"
(cd "$folder" && find . -type f -print0 | sort -z | xargs -0 sha256sum) >"$scratch/sums"
mv "$scratch/sums" "$folder/SHA256SUMS"
echo "$folder: $(find "$folder/wheelhouse" -name '*.whl' | wc -l) wheels, $(du -sm "$folder" | cut -f1) MB" >&2
