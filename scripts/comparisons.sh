#!/usr/bin/env bash
# Runs the paper's comparisons on CIFAR-10 with the tiny CLIP: bash scripts/comparisons.sh a|b|c|d|e [study.py's flags]
#   a  the target: the paper's morphing, a draw per step, 32 groups, the released code, single tokens, one token
#   b  other morphers      c  N̄ and K      d  the distance      e  number of schedules in a step
# Each run is configs/comparisons_cifar10.py with kNN and a linear probe, then 80 steps of fine-tuning. All
# comparisons share the run "DTM". The results are in results/cifar10_<letter>.
set -euo pipefail
[[ " $* " != *" --help "* ]] || { sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"; exit; }
cd "$(dirname "$0")/.."
source scripts/environment.sh requirements.txt requirements-studies.txt
# These runs are short: less optimisation saves a third of the compilation and does not slow these steps down.
# Two runs at a time with one thread each are faster than one run with two threads.
export XLA_FLAGS="${XLA_FLAGS:-} --xla_backend_optimization_level=1 --xla_cpu_multi_thread_eigen=false"
export TF_CPP_MIN_LOG_LEVEL=3
letter=${1:?a, b, c, d or e}
shift
# The quickstart's section morphers.tokens has weight 0. These overrides move the loss from "dtm" to "tokens".
instead="--config.morphers.dtm.weight=0 --config.morphers.tokens.weight=1"
dtm="--config.morphers.dtm"
case $letter in
  a) variants=(
    "DTM, drawn per image"
    "DTM, drawn per step: $dtm.drawn_per=step"
    "DTM, 32 groups: $dtm.min_groups=32 $dtm.max_groups=32"
    "released: $dtm.schedule=released $dtm.drawn_per=step $dtm.split=alternate $dtm.protect_first=True"
    "token-wise: $instead"
    "image-level: $instead --config.morphers.tokens.name=image") ;;
  b) variants=(
    "DTM"
    "superpixel: $instead --config.morphers.tokens.name=superpixel"
    "k-means: $instead --config.morphers.tokens.name=kmeans"
    "k-medoids: $instead --config.morphers.tokens.name=kmedoids"
    "random groups: $instead --config.morphers.tokens.name=random") ;;
  c) variants=(
    "N̄ 1, K 6" "N̄ 1, K 1: $dtm.max_rounds=1" "N̄ 1, K 14: $dtm.max_rounds=14"
    "N̄ 16, K 6: $dtm.min_groups=16" "N̄ 32, K 6: $dtm.min_groups=32") ;;
  d) variants=(
    "smooth L1" "L1: --config.loss.distance=l1" "L2: --config.loss.distance=l2"
    "cosine: --config.loss.distance=cosine") ;;
  e) variants=("S 2" "S 1: --config.loss.schedules=1" "S 4: --config.loss.schedules=4") ;;
  *) echo "Which comparison? a, b, c, d or e, not $letter" >&2; exit 2 ;;
esac
flags=()
for variant in "${variants[@]}"; do flags+=("--variant=$variant"); done
python -m scripts.studies.study --config=configs/comparisons_cifar10.py --out="results/cifar10_$letter" --jobs=2 \
  --metrics=knn/student_accuracy,linear/student_accuracy,finetune/test/top1 --curves=loss_tokens,grad_norm \
  --then="finetune: --config=configs/finetune_cifar10.py --config.init_from.path={workdir} \
    --config.batch_size=64 --config.total_steps=80 --config.optim.warmup_steps=10 --config.ema.decay=0 \
    --config.model.width=64 --config.model.num_heads=2 \
    --config.evals.test.outputs=\"('logits',)\" --config.evals.test.split=test[:5000]" \
  "${flags[@]}" "$@"
