#!/usr/bin/env bash
# Builds the documentation into site/, and fails on a broken link. site/index.html opens in a browser.
#   bash scripts/docs.sh --serve     serves the pages on http://127.0.0.1:8000 and rebuilds them after a change
set -euo pipefail
[[ " $* " != *" --help "* ]] || { sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"; exit; }
cd "$(dirname "$0")/.."
source scripts/environment.sh requirements.txt requirements-docs.txt
export NO_MKDOCS_2_WARNING=true
case ${1:-} in
  --serve) shift; exec python -m mkdocs serve --strict "$@" ;;
  *) exec python -m mkdocs build --strict "$@" ;;
esac
