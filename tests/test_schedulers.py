"""scripts/slurm.sbatch with a fake srun and scontrol, and the command of scripts/k8s_jobset.yaml."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import small_world
import yaml

from dtm_jax.options.arguments import split_arguments
from dtm_jax.options.command_line import read_config
from dtm_jax.options.validation import check
from dtm_jax.training import startup

ROOT = Path(__file__).parents[1]
SCRIPTS = ROOT / "scripts"
SRUN = """#!{python}
import os, pathlib, signal, subprocess, sys, time
here, words = pathlib.Path(__file__).parent, sys.argv[1:]
while words[0].startswith("--"):
  print("srun option", words.pop(0))
count = int(os.environ["SLURM_NTASKS"])
tasks = [
  subprocess.Popen(words, env=os.environ | {{
    "SLURM_PROCID": str(n), "SLURM_LOCALID": str(n), "SLURM_STEP_NODELIST": "localhost",
    "SLURM_STEP_TASKS_PER_NODE": str(count)}})
  for n in range(count)
]
while None in [task.poll() for task in tasks]:  # a file asks for the signal before the time limit
  time.sleep(0.05)
  if (wanted := os.environ.get("SIGNAL_WHEN")) and pathlib.Path(wanted).exists():
    os.environ.pop("SIGNAL_WHEN")
    for task in tasks:
      task.send_signal(signal.SIGTERM)
sys.exit(max(task.returncode if task.returncode >= 0 else 128 - task.returncode for task in tasks))
"""
RECORDER = """#!/usr/bin/env bash
echo "$(basename "$0") $*" >> "$(dirname "$0")/calls"
"""


@pytest.fixture
def slurm(tmp_path):
  """Return a function that runs scripts/slurm.sbatch as a job of two tasks on this machine."""
  folder = tmp_path / "bin"
  folder.mkdir()
  for name, text in (("srun", SRUN.format(python=sys.executable)), ("scontrol", RECORDER)):
    (folder / name).write_text(text)
    (folder / name).chmod(0o755)

  def submit(
    *arguments: str, checkout: Path = ROOT, tasks: int = 2, **env: str
  ) -> subprocess.CompletedProcess:
    path = f"{folder}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    job = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_NTASKS": str(tasks), "SLURM_SUBMIT_DIR": str(checkout)}
    return subprocess.run(
      ["bash", str(SCRIPTS / "slurm.sbatch"), *arguments], cwd=tmp_path, text=True, check=False,
      env=small_world.environment(1, PATH=path, **job, **env), capture_output=True, timeout=280,
    )  # fmt: skip

  submit.calls = lambda: (folder / "calls").read_text() if (folder / "calls").exists() else ""
  return submit


def checkout_with(tmp_path: Path, launch: str) -> Path:
  """Return a folder whose scripts/launch.sh is this text."""
  (tmp_path / "checkout" / "scripts").mkdir(parents=True)
  (tmp_path / "checkout" / "scripts" / "launch.sh").write_text(launch)
  return tmp_path / "checkout"


@pytest.mark.parametrize(("code", "requeued"), [(0, False), (75, True), (1, False), (2, False)])
def test_only_a_run_that_was_stopped_goes_back_to_the_queue(slurm, tmp_path, code, requeued):
  launch = f'test "$DTM_JAX_STOPPED_CODE" = 75 && test "$*" = "--config=a.py b c" && exit {code}\nexit 9'
  done = slurm("--config=a.py", "b c", checkout=checkout_with(tmp_path, launch))
  assert done.returncode == code, done.stderr
  assert slurm.calls() == (f"scontrol requeue {os.getpid()}\n" if requeued else "")
  assert "srun option --kill-on-bad-exit=0" in done.stdout


def test_a_cancelled_job_stays_away_from_the_queue(slurm, tmp_path):
  launch = 'if [ "$SLURM_PROCID" = 0 ]; then kill -TERM "$(ps -o ppid= -p $PPID)"; fi; exit 75'
  done = slurm(checkout=checkout_with(tmp_path, launch))
  assert done.returncode == 75, done.stderr
  assert slurm.calls() == ""


def test_a_submission_from_elsewhere_is_refused(slurm, tmp_path):
  done = slurm("--config=a.py", checkout=tmp_path)
  assert done.returncode == 2
  assert f"scripts/launch.sh is not in {tmp_path}: submit from the checkout" in done.stderr


def test_the_options_of_the_job_are_those_of_the_text():
  options = re.findall(r"^#SBATCH (\S+)$", (SCRIPTS / "slurm.sbatch").read_text(), re.M)
  assert {"--signal=TERM@300", "--requeue", "--open-mode=append"} <= {*options}


def test_jax_finds_the_other_task_by_the_variables_of_slurm(slurm, tmp_path):
  program = """
from dtm_jax.training import startup
startup.start_distributed()
import jax, os
os.write(1, f"RESULT {jax.process_index()} {jax.process_count()} {jax.device_count()}\\n".encode())
startup.leave_distributed()
"""
  launch = f"cd {ROOT}; exec {sys.executable} -c {shlex.quote(program)}"
  done = slurm(checkout=checkout_with(tmp_path, launch))
  assert done.returncode == 0, done.stderr[-3000:]
  assert sorted(re.findall(r"RESULT (.*)", done.stdout)) == ["0 2 2", "1 2 2"]


@pytest.mark.slow
@pytest.mark.long  # the tasks join above, test_loop.py has two processes, test_checkpoints.py the signal
def test_two_tasks_train_together_and_stop_before_the_time_limit(slurm, world, tmp_path):
  """JAX finds the processes by SLURM's variables. After SIGTERM the run has saved and is queued again.

  test_loop.py has two processes that end by themselves, with code 0.
  """
  workdir = tmp_path / "endless"
  options = [
    "total_steps=1000000", "log.log_steps=1", "evals={}", "batch_size=16", "teacher.name=clip",
    f"teacher.path={world / 'clip'}", f"data.dataset.data_dir={world}",
  ]  # fmt: skip
  probe = "--config=configs/linear_probe_cifar10.py"  # it compiles the fastest
  flags = [probe, f"--workdir={workdir}", *(f"--config.{option}" for option in options)]
  done = slurm(*flags, SIGNAL_WHEN=str(workdir / "metrics.jsonl"))
  assert done.returncode == 75, done.stderr[-3000:]
  assert slurm.calls() == f"scontrol requeue {os.getpid()}\n"
  saved = max(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit())
  assert f"Stopped at step {saved} of 1000000" in done.stderr
  assert [*small_world.losses(workdir)] == [*range(1, saved + 1)]
  start = json.loads((workdir / "config.json").read_text())["starts"][0]
  assert (start["processes"], start["devices"]) == (2, "2 cpu")


# launch.sh and Kubernetes ---------------------------------------------------------------------------------

PYTHON = """#!/usr/bin/env bash
env | grep -E '^(JAX|DTM)_' | sort
printf '%s\\n' "$@"
"""


def run_with_fake_python(tmp_path: Path, command: list[str], **env: str) -> list[str]:
  """Run a command in the checkout and return what a fake python prints: its variables and arguments."""
  (tmp_path / "python").write_text(PYTHON)
  (tmp_path / "python").chmod(0o755)
  clean = {name: value for name, value in os.environ.items() if not name.startswith(("JAX", "SLURM", "DTM"))}
  done = subprocess.run(
    command, cwd=ROOT, env=clean | {"PATH": f"{tmp_path}:{os.environ['PATH']}"} | env, text=True, check=True,
    capture_output=True,
  )  # fmt: skip
  return done.stdout.splitlines()


@pytest.mark.parametrize(
  ("tasks", "gpus", "expected"),
  [
    ("1", "8", "0,1,2,3,4,5,6,7"),
    ("1(x4)", "2", "0,1"),
    ("8(x2)", "8", None),
    ("1", "1", None),
    ("16", "8", None),
  ],
)
def test_a_task_that_is_alone_on_its_node_gets_all_gpus(tmp_path, tasks, gpus, expected):
  lines = run_with_fake_python(
    tmp_path, ["bash", "scripts/launch.sh"], SLURM_STEP_TASKS_PER_NODE=tasks, SLURM_GPUS_ON_NODE=gpus
  )
  found = [line.partition("=")[2] for line in lines if line.startswith("JAX_LOCAL_DEVICE_IDS=")]
  assert found == ([expected] if expected else [])


@pytest.fixture
def jobset():
  return yaml.safe_load((SCRIPTS / "k8s_jobset.yaml").read_text())


def test_every_pod_of_two_slices_gets_its_place_and_a_command_that_we_read(jobset, tmp_path):
  spec = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
  container = spec["template"]["spec"]["containers"][0]
  fixed = {each["name"]: each["value"] for each in container["env"] if "value" in each}
  assert fixed["HOSTS"] == str(spec["parallelism"]) == str(spec["completions"])
  assert fixed["SLICES"] == str(jobset["spec"]["replicatedJobs"][0]["replicas"])
  fixed |= {"SLICES": "2", "HOSTS": "2"}
  places = []
  for job in range(2):
    for host in range(2):
      lines = run_with_fake_python(
        tmp_path, [*container["command"], *container["args"]], **fixed, SLICE=str(job),
        JOB_COMPLETION_INDEX=str(host),
      )  # fmt: skip
      variables = dict(line.split("=", 1) for line in lines if re.match(r"(JAX|DTM)_", line))
      places.append(startup.check_cluster(variables))
      assert startup.exit_code_when_stopped(variables) == 75
      words = lines[lines.index("dtm_jax.main") + 1 :]
  assert places == [(4, place) for place in range(4)]
  arguments = split_arguments(["main", *words])
  config, problems = read_config(arguments)
  check(config, problems)
  assert arguments.rest == ["main", "--workdir=gs://BUCKET/vitb16"]
  assert config.data.dataset.data_dir == "/data/imagenet"


def test_the_coordinator_is_the_first_pod_of_the_headless_service(jobset):
  """JobSet names pods <set>-<job>-<index of the job>-<index of the pod>.<subdomain>."""
  job = jobset["spec"]["replicatedJobs"][0]
  container = job["template"]["spec"]["template"]["spec"]["containers"][0]
  address = next(each["value"] for each in container["env"] if each["name"] == "JAX_COORDINATOR_ADDRESS")
  name, port = address.split(":")
  assert name == f"{jobset['metadata']['name']}-{job['name']}-0-0.{jobset['spec']['network']['subdomain']}"
  assert int(port) == container["ports"][0]["containerPort"]
  assert jobset["spec"]["network"]["enableDNSHostnames"] is True


def test_a_stopped_pod_restarts_the_set_and_a_users_error_ends_it(jobset):
  policy = jobset["spec"]["failurePolicy"]
  assert policy["maxRestarts"] > 0
  assert policy["rules"][0]["action"] == "FailJobSet"
  assert policy["rules"][0]["onJobFailureReasons"] == ["PodFailurePolicy"]
  job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
  rule = job["podFailurePolicy"]["rules"][0]
  assert (rule["action"], rule["onExitCodes"]["values"]) == ("FailJob", [2])
  pod = job["template"]["spec"]
  assert rule["onExitCodes"]["containerName"] == pod["containers"][0]["name"]
  assert (job["backoffLimit"], pod["restartPolicy"]) == (0, "Never")
  assert pod["terminationGracePeriodSeconds"] >= 60


@pytest.mark.parametrize("name", ["tpu_pod.sh", "slurm.sbatch", "launch.sh"])
def test_the_shell_can_parse_it(name):
  subprocess.run(["bash", "-n", str(SCRIPTS / name)], check=True)
  if shutil.which("shellcheck"):
    subprocess.run(["shellcheck", "--severity=warning", str(SCRIPTS / name)], check=True)
