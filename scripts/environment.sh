#!/usr/bin/env bash
# Source this file to enter the virtual environment .venv with the given requirement files installed.
#   source scripts/environment.sh requirements.txt
#   DTM_JAX_VENV=FOLDER bash scripts/quickstart.sh     uses or makes the environment FOLDER instead
# The file installs missing requirements into an environment that it made. It removes nothing, so one environment
# serves all scripts. It uses your own environment if that has all requirements, and never changes it.
# It installs the packages of a file *-no-deps.txt without their dependencies.
if [[ " $* " == *" --help "* ]]; then
  sed -n '2,/^[^#]/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
  return 0 2>/dev/null || exit 0  # `return` works in a file that is sourced
fi

# Prints the requirements that an environment lacks, and fails if there are any: missing_requirements VENV FILES.
missing_requirements() {
  "$1/bin/python" -I - "${@:2}" <<'PYTHON'
import sys
from importlib import metadata

def lines(path):
  with open(path) as file:
    return [text for line in file if (text := line.partition("#")[0].strip())]

wanted = [line for path in sys.argv[1:] for line in lines(path)]
try:
  from packaging.requirements import Requirement
except ImportError:
  try:
    from pip._vendor.packaging.requirements import Requirement
  except ImportError:  # Every environment that satisfies the requirements has `packaging`.
    Requirement = None

def missing(line):
  if Requirement is None:
    return True
  requirement = Requirement(line)
  if requirement.marker and not requirement.marker.evaluate():
    return False
  try:
    return not requirement.specifier.contains(metadata.version(requirement.name), prereleases=True)
  except (metadata.PackageNotFoundError, TypeError):  # TypeError: a damaged installation has no version
    return True

lacking = [line for line in wanted if missing(line)]
print(*lacking, sep="\n", end="\n" * bool(lacking))
sys.exit(bool(lacking))
PYTHON
}

# Succeeds if the given command is a Python that the packages run on.
suitable_python() {
  "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null
}

# Succeeds if this file made the environment, for this checkout or for one that has been moved or removed since.
made_here() {
  local owner
  owner=$(cat "$1/dtm_jax/checkout" 2>/dev/null) || [ -f "$1/requirements.sha256" ] || return 1
  [ -z "$owner" ] || [ "$owner" = "$PWD" ] || [ ! -e "$owner" ]
}

# Succeeds if `import dtm_jax` in the environment imports this checkout.
package_installed() {
  [ ! -f pyproject.toml ] || "$1/bin/python" -I - "$PWD" <<'PYTHON'
import importlib.util, os, sys
found = importlib.util.find_spec("dtm_jax")
origin = found and found.origin  # None if the installation is older than the package's __init__.py
sys.exit(not origin or os.path.realpath(origin) != os.path.realpath(f"{sys.argv[1]}/dtm_jax/__init__.py"))
PYTHON
}

# Succeeds if an environment of ours lacks nothing: up_to_date VENV FILES. This check needs no network.
up_to_date() {
  [ -d "$1/dtm_jax" ] && [ ! -e "$1/dtm_jax/installing" ] && suitable_python "$1/bin/python" &&
    missing_requirements "$1" "${@:2}" >/dev/null && package_installed "$1"
}

# Makes the environment, or repairs one with a broken Python or pip.
make_environment() {
  local candidate
  for candidate in python3.11 python3.12 python3.13 python3 python; do
    if command -v "$candidate" >/dev/null && suitable_python "$candidate" &&
      "$candidate" -c 'import ensurepip' 2>/dev/null; then
      echo "Making $1 with $("$candidate" --version). The packages need about 3 GB and some minutes."
      rm -f "$1"/bin/python*  # links to a Python that is gone
      "$candidate" -m venv "$(cd "$1" && pwd -P)"  # venv refuses a link
      return
    fi
  done
  echo "Python 3.11, 3.12 or 3.13 with venv is needed. Found: $(python3 --version 2>&1 || echo none)." >&2
  return 1
}

# Makes or extends an environment of ours: install_requirements VENV FILES.
install_requirements() {
  local venv=$1 file with_deps=() no_deps=() isolation=() cut_off=""
  shift
  mkdir -p "$venv/dtm_jax" && echo "$PWD" >"$venv/dtm_jax/checkout" || return 1
  if ! suitable_python "$venv/bin/python" || ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    make_environment "$venv" || return 1
  fi
  if [ -e "$venv/dtm_jax/installing" ]; then
    cut_off=yes
    echo "The last installation into $venv was cut off. This one completes it."
    for file in "$venv"/lib/python3*/site-packages/*.dist-info; do
      [ -e "$file/INSTALLER" ] || rm -rf "$file"  # pip writes INSTALLER last, so the package is incomplete
    done
  fi
  touch "$venv/dtm_jax/installing"
  local pip=("$venv/bin/python" -m pip install --disable-pip-version-check --no-input)
  if [ -n "$cut_off" ] || ! missing_requirements "$venv" "$@" >/dev/null; then
    echo "Installing the packages of $* into $venv"
    for file in "$@"; do
      case $file in
        *-no-deps.txt) no_deps+=("--requirement=$file") ;;
        *) with_deps+=("--requirement=$file") ;;
      esac
    done
    [ ${#with_deps[@]} -eq 0 ] || "${pip[@]}" "${with_deps[@]}" || return 1
    [ ${#no_deps[@]} -eq 0 ] || "${pip[@]}" --no-deps "${no_deps[@]}" || return 1
  fi
  if ! package_installed "$venv"; then
    # setuptools comes with the requirements. Without a new one, pip fetches it for this installation alone.
    "$venv/bin/python" -c 'import setuptools as s; assert int(s.__version__.split(".")[0]) >= 77' 2>/dev/null &&
      isolation=(--no-build-isolation)
    "${pip[@]}" --no-deps ${isolation[@]+"${isolation[@]}"} --editable . || return 1
  fi
  rm "$venv/dtm_jax/installing"
}

# Takes the lock of the environment on file descriptor 9. Python's fcntl also serves systems without `flock`.
lock() {
  local python
  for python in python3 python python3.11 python3.12 python3.13; do
    command -v "$python" >/dev/null && "$python" -c 'import fcntl' 2>/dev/null || continue
    "$python" -c 'import fcntl; fcntl.flock(9, fcntl.LOCK_EX | fcntl.LOCK_NB)' 2>/dev/null && return
    echo "Another script is installing into $1; waiting for it."
    "$python" -c 'import fcntl; fcntl.flock(9, fcntl.LOCK_EX)'
    return
  done
}

# Uses an environment that this file did not make, if it has all requirements: use_foreign VENV FILES.
use_foreign() {
  local missing
  if [ -L "$1" ] && [ ! -e "$1" ]; then
    echo "$1 is a link to $(readlink "$1"), which is not there." >&2
  elif ! suitable_python "$1/bin/python"; then
    echo "$1 was not made by this script, and its bin/python is not Python 3.11, 3.12 or 3.13." >&2
  else
    if missing=$(missing_requirements "$@"); then
      package_installed "$1" || echo "To run scripts/*.py by themselves: $1/bin/python -m pip install --no-deps -e ."
      return 0
    fi
    echo "$1 was not made by this script, which therefore leaves it as it is. It lacks:" >&2
    printf '%s\n' "$missing" | sed 's/^/  /' >&2
    echo "To install that yourself: $1/bin/python -m pip install$(printf ' -r %s' "${@:2}")" >&2
  fi
  echo "To have another environment made, give its folder: DTM_JAX_VENV=.venv-dtm_jax, then the same command." >&2
  return 1
}

enter_environment() {
  local venv=${DTM_JAX_VENV:-.venv} active=${VIRTUAL_ENV:-${CONDA_PREFIX:-}}
  venv=${venv%/}
  if [ -n "$active" ] && [ ! "$active" -ef "$venv" ]; then
    echo "This script uses the environment $venv, not the active one. To use that: DTM_JAX_VENV=$active"
  fi
  # A folder that is empty or missing becomes an environment of ours. A link may lead to it.
  if ! made_here "$venv" && { [ -n "$(ls -A "$venv" 2>/dev/null)" ] || { [ -L "$venv" ] && [ ! -e "$venv" ]; }; }; then
    use_foreign "$venv" "$@" || return 1
  elif ! up_to_date "$venv" "$@"; then
    mkdir -p "$(dirname "$venv")" || return 1
    ( lock "$venv" && { up_to_date "$venv" "$@" || install_requirements "$venv" "$@"; } ) 9>"$venv.lock" || return 1
  fi
  # What bin/activate does. Environments of conda have no such file.
  VIRTUAL_ENV=$(cd "$venv" && pwd)
  export VIRTUAL_ENV PATH="$VIRTUAL_ENV/bin:$PATH"
  unset PYTHONHOME
}

enter_environment "$@" || return 1
# The kernel gives huge pages to programs that ask for them. They avoid most page faults of the large buffers that
# every step allocates and frees, which take a fifth of the quickstart's time on a CPU.
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}
