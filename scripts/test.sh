#!/usr/bin/env bash
# Runs the tests from a clean clone: environment, ruff, mypy, and pytest in two processes. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh requirements.txt requirements-studies.txt requirements-test.txt requirements-test-no-deps.txt
ruff check .
ruff format --check .
mypy
python -m pytest -n 2 --dist worksteal "$@"
