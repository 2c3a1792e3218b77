#!/usr/bin/env bash
# Sourced: makes the virtual environment .venv from the given requirement files, and enters it.
# What a file *-no-deps.txt names is installed without its dependencies.
# The files' checksum is kept beside it, so that an unchanged environment is entered at once.
python=""
for candidate in python3.11 python3.12 python3.13 python3; do
  if command -v "$candidate" >/dev/null && "$candidate" -c \
    'import ensurepip, sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then
    python=$candidate
    break
  fi
done
if [ -z "$python" ]; then
  echo "Python 3.11, 3.12 or 3.13 with venv is needed; found: $(python3 --version 2>&1 || echo none)" >&2
  exit 1
fi
requirements=("$@")
stamp=.venv/requirements.sha256
wanted=$(cat "${requirements[@]}" | sha256sum)
if [ ! -f "$stamp" ] || [ "$(cat "$stamp")" != "$wanted" ]; then
  echo "Making .venv with $("$python" --version) from ${requirements[*]}"
  "$python" -m venv --clear .venv
  with_deps=()
  no_deps=()
  for file in "${requirements[@]}"; do
    case $file in
      *-no-deps.txt) no_deps+=("--requirement=$file") ;;
      *) with_deps+=("--requirement=$file") ;;
    esac
  done
  .venv/bin/python -m pip install --quiet --disable-pip-version-check "${with_deps[@]}"
  if [ ${#no_deps[@]} -gt 0 ]; then
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps "${no_deps[@]}"
  fi
  echo "$wanted" >"$stamp"
fi
source .venv/bin/activate
# Large buffers come and go in every step: huge pages, where the kernel gives them to those who ask, spare most of
# their page faults (a fifth of the quickstart's time on a CPU).
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}
export PYTHONPATH=$PWD
