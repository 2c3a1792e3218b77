#!/usr/bin/env bash
# Installs this checkout for a notebook on Colab, with the JAX for its device. Not needed where dtm_jax is installed.
set -euo pipefail
cd "$(dirname "$0")/.."
extras=studies
if command -v nvidia-smi >/dev/null && nvidia-smi >/dev/null 2>&1; then
  extras+=,cuda
elif compgen -G "/dev/accel*" >/dev/null || [ -e /dev/vfio/0 ] || [ -n "${TPU_NAME:-}${COLAB_TPU_ADDR:-}" ]; then
  extras+=,tpu
fi
echo "Installing dtm_jax[$extras]. This takes some minutes."
python3 -m pip install --quiet --disable-pip-version-check --editable ".[$extras]"
