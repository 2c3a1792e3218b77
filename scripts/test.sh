#!/usr/bin/env bash
# Runs the tests from a clean clone: environment, ruff, mypy, and pytest in two processes. Arguments go to pytest.
# The first run compiles what the tests run; later runs find these programs in .pytest_cache.
#   bash scripts/test.sh --fast                 in about a minute: ruff, and the quickest tests of every file
#   bash scripts/test.sh tests/test_loop.py     one file
#   bash scripts/test.sh -m long                the long tests, each of which is close to a quicker one
set -euo pipefail
[[ " $* " != *" --help "* ]] || { sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"; exit; }
cd "$(dirname "$0")/.."
source scripts/environment.sh requirements.txt requirements-{studies,docs,test,test-no-deps}.txt
ruff check .
ruff format --check .
check_types=mypy
case " $* " in *" --fast "*) check_types=true ;; esac
report=$(mktemp)
$check_types > "$report" 2>&1 & types=$!  # beside pytest, which waits for files and processes now and then
trap 'kill "$types" 2> /dev/null || true; rm -f "$report"' EXIT
status=0
python -m pytest -n 2 --dist worksteal "$@" || status=$?
wait "$types" || { cat "$report" >&2; exit 1; }
exit "$status"
