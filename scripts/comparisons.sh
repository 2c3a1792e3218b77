#!/usr/bin/env bash
# Runs the paper's comparisons on CIFAR-10 with the tiny CLIP: bash scripts/comparisons.sh a|b|c|d|e|f|g [study.py's flags]
#   a  the target: the paper's morphing, a draw per step, 32 groups, the released code, single tokens, one token
#   b  other morphers      c  N̄ and K      d  the distance      e  number of schedules in a step
# Each run is configs/comparisons_cifar10.py with kNN and a linear probe, then 80 steps of fine-tuning. All
# comparisons share the run "DTM". The results are in results/cifar10_<letter>.
#   f  the paper's claim: token-wise, morphing and controls, each with a clean and a noisier teacher, five seeds. A run is
#      configs/claim_cifar10.py (50 epochs, width 192, depth 12), then ten epochs of fine-tuning; meant for a GPU
#   g  the same with the student of (a) to (e), 240 steps of 32 images, three seeds and 2,000 test images, for a CPU
# --minutes=60 stops after an hour. The same command goes on from there.
set -euo pipefail
[[ " $* " != *" --help "* ]] || { sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"; exit; }
cd "$(dirname "$0")/.."
source scripts/environment.sh requirements.txt requirements-studies.txt
export TF_CPP_MIN_LOG_LEVEL=3
letter=${1:?a, b, c, d, e, f or g}
shift
# The runs for a CPU are short: less optimisation saves a third of the compilation and does not slow these steps
# down. Two runs at a time with one thread each are faster than one run with two threads.
[[ $letter == f ]] || \
  export XLA_FLAGS="${XLA_FLAGS:-} --xla_backend_optimization_level=1 --xla_cpu_multi_thread_eigen=false"
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
  f|g) variants=(
    "token-wise: $instead"
    "DTM"
    "released: $dtm.schedule=released $dtm.drawn_per=step $dtm.split=alternate $dtm.protect_first=True"
    "image-level: $instead --config.morphers.tokens.name=image"
    "random groups: $instead --config.morphers.tokens.name=random") ;;
  *) echo "Which comparison? a, b, c, d, e, f or g, not $letter" >&2; exit 2 ;;
esac
config=configs/comparisons_cifar10.py
finetune="--config=configs/finetune_cifar10.py --config.init_from.path={workdir}"
short="--config.batch_size=64 --config.total_steps=80 --config.optim.warmup_steps=10 --config.ema.decay=0 \
  --config.model.width=64 --config.model.num_heads=2 --config.evals.test.outputs=\"('logits',)\""
flags=()
case $letter in
  f) config=configs/claim_cifar10.py
    finetune+=" --config.batch_size=256 --config.total_epochs=10 --config.optim.warmup_epochs=1 \
      --config.model.width=192 --config.model.depth=12 --config.evals.test.outputs=\"('logits',)\""
    finetune+=" --config.data.device_resident=True --config.train.steps_per_call=50"
    flags+=(--seeds=0,1,2,3,4 --jobs=1 --vmap_seeds) ;;
  g) finetune+=" $short --config.evals.test.split=test[:2000]"
    knn="--config.evals.knn.bank=train[:2000] --config.evals.knn.queries=test[:2000]"
    linear="--config.evals.linear.fit=train[:2000] --config.evals.linear.held_out=train[2000:2500]"
    flags+=("--each=--config.batch_size=32 --config.total_steps=240 $knn $linear
      --config.evals.linear.split=test[:2000] --config.log.report=False") ;;
  *) finetune+=" $short --config.evals.test.split=test[:5000]" ;;
esac
[[ $letter != [fg] ]] || flags+=("--setting=clean teacher" "--setting=noisy teacher: --config.teacher.noise=1")
for variant in "${variants[@]}"; do flags+=("--variant=$variant"); done
python -m scripts.studies.study --config="$config" --out="results/cifar10_$letter" --jobs=2 \
  --metrics=knn/student_accuracy,linear/student_accuracy,finetune/test/top1 --curves=loss_tokens,grad_norm \
  --then="finetune: $finetune" "${flags[@]}" "$@"
