#!/usr/bin/env bash
# Trains on a Cloud TPU pod, from the request for it to the end of the run (docs/clusters.md):
#   bash scripts/tpu_pod.sh create --name=dtm --zone=us-central2-b --type=v4-64 --spot --bucket=gs://BUCKET
#   bash scripts/tpu_pod.sh train  --name=dtm --zone=us-central2-b --type=v4-64 --spot --bucket=gs://BUCKET \
#     -- --config=configs/vitb16.py --workdir=gs://BUCKET/vitb16 --config.data.dataset.data_dir=~/bucket/imagenet
#
#   create   requests the pod, makes the bucket if it is missing, and waits until the pod is ready
#   setup    copies this checkout to every host, makes the environment there, and mounts the bucket at ~/bucket
#   train    starts the run on every host. If the pod is lost, it is requested and set up again, and the same
#            command goes on from the newest checkpoint. Ends with the run, or with an error that a restart repeats
#   logs     follows the log of `train`, or prints the copy in the bucket
#   status   prints the state of the request, such as WAITING_FOR_RESOURCES, ACTIVE or SUSPENDED
#   delete   gives the pod back. The bucket stays
#
#   --name=NAME            name of the request and of the pod
#   --zone=ZONE            zone that has the type
#   --type=TYPE            v4-64, v5litepod-32, v5p-64, v6e-64 and so on (create, train)
#   --project=PROJECT      default: gcloud's own setting
#   --spot                 cheaper, and Google may take the pod back at any moment
#   --slices=N             N pods of this type as one run; the mesh splits the batch across them (default: 1)
#   --valid-until=DURATION the request expires after this time, such as 6h
#   --runtime=VERSION      software of the hosts; default: the one for JAX on this type
#   --bucket=gs://BUCKET   for data, checkpoints and the log; in the region of the zone
#   --network=NAME --service-account=EMAIL   of the pod; default: the project's
#   --log=FILE             one log of all hosts (default: runs/NAME.log)
#   --retries=N            failures in a row on a healthy pod before `train` gives up (default: 3)
#   --dry-run              prints the commands and runs none
# TPU_POD_POLL gives the seconds between two looks at the state (default: 30); waits after a failure begin with it.
set -euo pipefail
TOP=$(cd "$(dirname "$0")/.." && pwd)
USER_ERROR=2  # of dtm_jax.main: a restart would repeat it
STOPPED=75  # of dtm_jax.main with DTM_JAX_STOPPED_CODE: a SIGTERM stopped the run, which has saved its state

fail() {
  echo "tpu_pod.sh: $1" >&2
  exit $USER_ERROR
}

say() {
  echo "[tpu_pod.sh $(date -u +%FT%TZ)] $1" >&2
}

# Prints a command so that it can be pasted.
show() {
  local words
  printf -v words ' %q' "$@"
  echo "${words:1}"
}

# Runs a command, or prints it with --dry-run.
run() {
  if [ -n "$dry" ]; then show "$@"; else "$@"; fi
}

# Runs `gcloud compute tpus queued-resources VERB NAME ...` in the zone and project.
tpus() {
  run gcloud compute tpus queued-resources "$1" "${@:2}" --zone="$zone" ${project:+"--project=$project"}
}

# Runs a command on every host at the same time: on_hosts COMMAND.
on_hosts() {
  tpus ssh "$name" --node=all --worker=all --batch-size=all --command="$1"
}

# Prints the state of the request, or NONE if there is no such request.
state() {
  local text
  if text=$(gcloud compute tpus queued-resources describe "$name" --zone="$zone" ${project:+"--project=$project"} \
    --format="value(state.state)" 2>&1); then
    echo "$text"
  elif [[ $text == *NOT_FOUND* || $text == *"not found"* ]]; then
    echo NONE
  else
    echo "$text" >&2
    return 1
  fi
}

default_runtime() {
  case $type in
    v2-* | v3-* | v4-*) echo tpu-ubuntu2204-base ;;
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
    *) fail "--type=$type: the types are v2-N, v3-N, v4-N, v5litepod-N, v5p-N and v6e-N. For others give --runtime." ;;
  esac
}

# Prints twice the seconds, but ten minutes at most.
longer() {
  echo $(($1 * 2 > 600 ? 600 : $1 * 2))
}

# Requests the pod. It does not wait.
request() {
  local nodes=("--node-id=$name")
  [ "$slices" = 1 ] || nodes=("--node-count=$slices" "--node-prefix=$name")
  tpus create "$name" "${nodes[@]}" --accelerator-type="$type" --runtime-version="$runtime" \
    ${spot:+--spot} ${valid_until:+"--valid-until-duration=$valid_until"} \
    ${network:+"--network=$network"} ${service_account:+"--service-account=$service_account"}
}

make_bucket() {
  [ -n "$bucket" ] || return 0
  if [ -n "$dry" ] || ! gcloud storage buckets describe "$bucket" ${project:+"--project=$project"} >/dev/null 2>&1; then
    run gcloud storage buckets create "$bucket" --location="${zone%-*}" --uniform-bucket-level-access \
      ${project:+"--project=$project"}
  fi
}

# Waits until the pod is ready. Requests it if it was lost or never requested; then `fresh` is "yes".
ensure_pod() {
  local now last="" refused=0 wait=$poll
  fresh=""
  if [ -n "$dry" ]; then
    request
    return
  fi
  while :; do
    now=$(state) || now=UNKNOWN
    [ "$now" = "$last" ] || say "The state of $name is $now."
    [ "$now" = UNKNOWN ] || [ "$now" = NONE ] || refused=0 wait=$poll
    case $now in
      ACTIVE) return ;;
      UNKNOWN)
        refused=$((refused + 1)) ;;
      NONE)
        fresh=yes
        request && refused=0 || refused=$((refused + 1)) ;;
      SUSPENDED | FAILED)
        if [ "$now" = FAILED ] && [ -n "$fresh" ]; then
          fail "The request failed; \`status\` shows why. It may have expired (--valid-until)."
        fi
        tpus delete "$name" --force --quiet || say "$name could not be deleted yet." ;;
    esac
    [ $refused -lt "$retries" ] || fail "gcloud failed $refused times in a row; see its messages above."
    [ $refused = 0 ] || wait=$(longer "$wait")
    last=$now
    sleep "$wait"
  done
}

setup_hosts() {
  local archive=/tmp/dtm_jax_$name.tar.gz
  # The files that git knows, as they are now. Weights and data belong in the bucket.
  run bash -c 'git -C "$1" ls-files -z | tar -czf "$2" -C "$1" --null -T -' pack "$TOP" "$archive" &&
    tpus scp "$archive" "$name:dtm_jax.tar.gz" --node=all --worker=all --batch-size=all &&
    on_hosts "mkdir -p dtm_jax && tar -xzf dtm_jax.tar.gz -C dtm_jax && cd dtm_jax && bash scripts/tpu_pod.sh host-setup${bucket:+ --bucket=$bucket}"
}

# On a host: makes the environment and mounts the bucket.
host_setup() {
  cd "$TOP"
  if ! command -v python3.11 python3.12 python3.13 >/dev/null; then
    run python3 -m pip install --quiet --user uv
    run ~/.local/bin/uv python install 3.12
    [ -n "$dry" ] || PATH="$(dirname "$(~/.local/bin/uv python find 3.12)"):$PATH"
  fi
  if [ -n "$dry" ]; then
    show source scripts/environment.sh requirements.txt requirements-tpu.txt
  else
    source scripts/environment.sh requirements.txt requirements-tpu.txt
  fi
  [ -n "$bucket" ] || return 0
  run mkdir -p ~/bucket
  if ! command -v gcsfuse >/dev/null; then
    run sudo bash -c 'echo "deb [signed-by=/usr/share/keyrings/cloud.google.asc] https://packages.cloud.google.com/apt gcsfuse-$(lsb_release -cs) main" >/etc/apt/sources.list.d/gcsfuse.list && curl -fsS https://packages.cloud.google.com/apt/doc/apt-key.gpg >/usr/share/keyrings/cloud.google.asc && apt-get update -qq && apt-get install -y -qq gcsfuse'
  fi
  mountpoint -q ~/bucket || run gcsfuse --implicit-dirs "${bucket#gs://}" ~/bucket
}

# On a host: ends what an earlier start has left, and trains.
host_train() {
  cd "$TOP"
  local seconds=0
  pkill -TERM -f '[d]tm_jax\.main' && say "An earlier run on this host gets SIGTERM, so that it saves and ends."
  while pgrep -f '[d]tm_jax\.main' >/dev/null; do
    sleep 1
    seconds=$((seconds + 1))
    [ $seconds -lt 120 ] || pkill -KILL -f '[d]tm_jax\.main' || true
  done
  source .venv/bin/activate
  export DTM_JAX_STOPPED_CODE=$STOPPED PYTHONUNBUFFERED=1
  exec bash scripts/launch.sh "$@"
}

# Starts the run on all hosts once. Output goes to the terminal and to the one log.
train_once() {
  local words
  printf -v words ' %q' "$@"
  on_hosts "bash dtm_jax/scripts/tpu_pod.sh host-train --$words"
}

keep_log() {
  [ -z "$bucket" ] || run gcloud storage cp "$log" "$bucket/logs/$name.log" || say "The log was not copied to $bucket."
}

train() {
  local code failures=0 wait=$poll
  if [ -n "$dry" ]; then
    ensure_pod
    setup_hosts
    train_once "$@"
    keep_log
    return
  fi
  mkdir -p "$(dirname "$log")"
  trap 'say "Interrupted. The pod and perhaps the run go on: \`train\` continues, \`delete\` gives the pod back."; exit 130' INT
  while :; do
    ensure_pod
    code=0
    if [ -n "$fresh" ] || [ -z "${ready:-}" ]; then
      setup_hosts 2>&1 | tee -a "$log" && ready=yes || code=1
    fi
    if [ $code = 0 ]; then
      say "The run starts." 2>&1 | tee -a "$log"
      train_once "$@" 2>&1 | tee -a "$log" || code=$?
      say "The run ended with exit code $code." 2>&1 | tee -a "$log"
      keep_log
    fi
    case $code in
      0) return ;;
      "$USER_ERROR") return $code ;;
      "$STOPPED") failures=0 wait=$poll ;;
    esac
    sleep "$wait"  # the state of a lost pod changes some seconds after its hosts are gone
    if [ "$(state || echo UNKNOWN)" != ACTIVE ]; then
      failures=0 ready="" wait=$poll
    elif [ $code != $STOPPED ]; then
      failures=$((failures + 1))
      if [ $failures -ge "$retries" ]; then
        say "The run failed $failures times in a row on a healthy pod. See $log." 2>&1 | tee -a "$log"
        return $code
      fi
      wait=$(longer "$wait")
    fi
  done
}

show_logs() {
  if [ -e "$log" ]; then
    run tail -n 100 -F "$log"
  elif [ -n "$bucket" ]; then
    run gcloud storage cat "$bucket/logs/$name.log"
  else
    fail "There is no log $log here. Give --log=FILE, or the --bucket that has a copy."
  fi
}

usage() {
  sed -n '2,/^set -/p' "$0" | sed '$d;s/^# \{0,1\}//'
}

command=${1:-}
[ $# = 0 ] || shift
case $command in
  create | setup | train | logs | status | delete | host-setup | host-train) ;;
  help | --help | -h) usage; exit 0 ;;
  "") usage >&2; fail "A command is missing: create, setup, train, logs, status or delete." ;;
  *) fail "Unknown command $command. Available: create, setup, train, logs, status, delete." ;;
esac
name="" zone="" type="" project="" spot="" slices=1 valid_until="" runtime="" bucket="" network="" service_account=""
log="" retries=3 dry="" poll=${TPU_POD_POLL:-30}
while [ $# -gt 0 ]; do
  case $1 in
    --) shift; break ;;
    --spot) spot=yes ;;
    --dry-run) dry=yes ;;
    --name=?* | --zone=?* | --type=?* | --project=?* | --slices=?* | --valid-until=?* | --runtime=?* | --bucket=?* | \
      --network=?* | --service-account=?* | --log=?* | --retries=?*)
      option=${1%%=*}
      option=${option#--}
      printf -v "${option//-/_}" %s "${1#*=}" ;;
    --help | -h) usage; exit 0 ;;
    *) fail "Unknown or empty option $1. \`bash scripts/tpu_pod.sh help\` lists the options. Arguments of the run follow --." ;;
  esac
  shift
done
case $command in
  host-setup) host_setup; exit ;;
  host-train) host_train "$@" ;;
esac
[ -n "$name" ] || fail "--name is missing: the name of the pod, such as --name=dtm."
[ -n "$zone" ] || fail "--zone is missing: a zone that has the type, such as --zone=us-central2-b."
[[ $name =~ ^[a-z]([-a-z0-9]*[a-z0-9])?$ ]] || fail "--name=$name must be lower-case letters, digits and hyphens, and begin with a letter."
[[ $slices =~ ^[1-9][0-9]*$ ]] || fail "--slices=$slices must be a whole number of at least 1."
[[ $retries =~ ^[1-9][0-9]*$ ]] || fail "--retries=$retries must be a whole number of at least 1."
[[ -z $bucket || $bucket =~ ^gs://[^/]+$ ]] || fail "--bucket=$bucket must be gs://BUCKET."
log=${log:-$TOP/runs/$name.log}
case $command in
  create | train)
    [ -n "$type" ] || fail "--type is missing: the type of the pod, such as --type=v4-64."
    [ -n "$runtime" ] || runtime=$(default_runtime) || exit $USER_ERROR ;;
esac
case $command in
  train)
    [[ " $*" == *" --config"[=\ ]* ]] || fail "The run has no --config. Write its arguments after --, such as -- --config=configs/vitb16.py."
    [[ " $*" == *" --workdir"[=\ ]gs://* ]] || fail "The run needs --workdir=gs://BUCKET/FOLDER: a lost pod loses its disks." ;;
  *) [ $# = 0 ] || fail "Unexpected arguments: $*" ;;
esac
if [ -z "$dry" ] && [ "$command" != logs ]; then
  command -v gcloud >/dev/null || fail "gcloud is not installed: https://cloud.google.com/sdk/docs/install. With --dry-run it is not needed."
fi
case $command in
  create) make_bucket; ensure_pod; say "$name is ready. Next: setup or train." ;;
  setup) setup_hosts ;;
  train) train "$@" ;;
  logs) show_logs ;;
  status) if [ -n "$dry" ]; then tpus describe "$name" --format="value(state.state)"; else state; fi ;;
  delete) tpus delete "$name" --force --quiet ;;
esac
