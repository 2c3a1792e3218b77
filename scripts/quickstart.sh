#!/usr/bin/env bash
# From a clean clone to a pre-trained student: environment, CIFAR-10, DTM, kNN, and a picture of the groups.
# The numbers come last. On two CPU cores the training takes a few minutes. Arguments are --config overrides.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh requirements.txt
export TF_CPP_MIN_LOG_LEVEL=3
workdir=${DTM_JAX_WORKDIR:-runs/quickstart}
python -m dtm_jax.main --config=configs/quickstart.py --workdir="$workdir" "$@"
python scripts/draw_groups.py --run="$workdir"
python scripts/summarize.py "$workdir"
