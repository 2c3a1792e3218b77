#!/usr/bin/env bash
# Trains on a cluster. Each host, or each task of a scheduler, runs this command:
#   bash scripts/launch.sh --config=configs/vitb16.py --workdir=gs://BUCKET/vitb16
#   TPU pod   scripts/tpu_pod.sh train, or gcloud compute tpus tpu-vm ssh NAME --worker=all --command="..."
#   SLURM     sbatch scripts/slurm.sbatch ..., or srun bash scripts/launch.sh ...   (JAX detects the cluster)
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
# JAX gives a task of SLURM the one GPU with the task's local number. A task that is alone on its node gets all.
if [[ ${SLURM_STEP_TASKS_PER_NODE:-} =~ ^1(\(|$) && ${SLURM_GPUS_ON_NODE:-1} -gt 1 ]]; then
  export JAX_LOCAL_DEVICE_IDS=${JAX_LOCAL_DEVICE_IDS:-$(seq -s, 0 $((SLURM_GPUS_ON_NODE - 1)))}
fi
# Huge pages for large buffers of the host save 6 % of ViT-B's step on a CPU (docs/performance.md).
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}
exec python -m dtm_jax.main "$@"
