#!/usr/bin/env bash
# Breaks runs in every way that users report, and prints the outcome: kill -9, damaged checkpoints, failing file
# systems, full disks, lost processes, bad inputs, a long run. Takes about an hour on two CPU cores. Some parts only:
#   bash scripts/campaign.sh --parts=damage,soak
set -euo pipefail
[[ " $* " != *" --help "* ]] || { sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"; exit; }
cd "$(dirname "$0")/.."
source scripts/environment.sh requirements.txt requirements-test.txt requirements-test-no-deps.txt
exec python -m tests.campaign "$@"
