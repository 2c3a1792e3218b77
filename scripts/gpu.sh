#!/usr/bin/env bash
# Measures everything that a GPU decides, and saves every result as it comes, in results/gpu/.
#   bash scripts/gpu.sh                runs all sections, in about half an hour
#   bash scripts/gpu.sh --minutes=8    chooses what fits
#   bash scripts/gpu.sh --list         shows the sections with their estimates
#   bash scripts/gpu.sh --smoke        runs all sections at toy size, on any device
# It needs JAX with CUDA and the packages of the model (flax, optax, ml_collections), but no network, TensorFlow or CLU.
# It uses the Python of the shell, or $PYTHON, and installs nothing. Section peer also needs PyTorch and transformers.
set -euo pipefail
cd "$(dirname "$0")/.."
exec "${PYTHON:-python}" -m benchmarks.gpu "$@"
