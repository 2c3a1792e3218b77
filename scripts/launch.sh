#!/usr/bin/env bash
# Trains on a cluster. Each host, or each task of a scheduler, runs this command:
#   bash scripts/launch.sh --config=configs/vitb16.py --workdir=gs://BUCKET/vitb16
#   TPU pod   gcloud compute tpus tpu-vm ssh NAME --worker=all --command="cd dtm_jax && bash scripts/launch.sh ..."
#   SLURM     srun --ntasks-per-node=1 bash scripts/launch.sh ...       (JAX detects the cluster)
#   others    JAX_COORDINATOR_ADDRESS=host:port JAX_NUM_PROCESSES=n JAX_PROCESS_ID=i bash scripts/launch.sh ...
# XLA flags are set only with DTM_JAX_XLA=overlap, because their effect is not measured yet.
set -euo pipefail
cd "$(dirname "$0")/.."
case ${DTM_JAX_XLA:-none} in
  none) ;;
  overlap)
    # On GPUs, collectives run at the same time as operations that do not depend on them.
    export XLA_FLAGS="${XLA_FLAGS:-} --xla_gpu_enable_latency_hiding_scheduler=true" ;;
  *)
    echo "DTM_JAX_XLA is none or overlap, not ${DTM_JAX_XLA}" >&2
    exit 2 ;;
esac
# Huge pages for large buffers of the host save 6 % of ViT-B's step on a CPU (docs/performance.md).
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}
exec python -m dtm_jax.main "$@"
