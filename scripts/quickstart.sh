#!/usr/bin/env bash
# Pre-trains a small student from a clean clone: environment, CIFAR-10, DTM, kNN, and a picture of the groups. It
# prints the numbers at the end. The training takes a few minutes on two CPU cores. Arguments are --config overrides.
set -euo pipefail
[[ " $* " != *" --help "* ]] || { sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"; exit; }
cd "$(dirname "$0")/.."
source scripts/environment.sh requirements.txt requirements-studies.txt
export TF_CPP_MIN_LOG_LEVEL=3
workdir=${DTM_JAX_WORKDIR:-runs/quickstart}
python -m dtm_jax.main --config=configs/quickstart.py --workdir="$workdir" "$@"
python -m scripts.reports.draw_groups --run="$workdir"
python -m scripts.reports.summarize "$workdir"
