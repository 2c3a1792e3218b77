"""scripts/tpu_pod.sh against a fake gcloud, which records its arguments and plays slow, lost, broken pods."""

import json
import os
import shlex
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "scripts" / "tpu_pod.sh"
POD = ("--name=dtm", "--zone=us-central2-b", "--type=v4-64")
RUN = ("--", "--config=configs/vitb16.py", "--workdir=gs://bucket/run")
FAKE = """#!/usr/bin/env python3
import json, os, pathlib, sys
here, args = pathlib.Path(__file__).parent, sys.argv[1:]
with open(here / "calls.jsonl", "a") as file:
  print(json.dumps(args), file=file)
plan_file, states_file = here / "plan.json", here / "states.json"
plan = json.loads(plan_file.read_text())
states = json.loads(states_file.read_text()) if states_file.exists() else None
code = 0
def next_of(name, default):
  return plan[name].pop(0) if plan.get(name) else default
if "describe" in args and "buckets" in args:
  code = next_of("bucket", 0)
elif "describe" in args:
  if (broken := next_of("describe", None)) is not None:
    print(broken, file=sys.stderr)
    code = 1
  elif states is None:
    print("ERROR: (gcloud) NOT_FOUND: Resource not found", file=sys.stderr)
    code = 1
  else:
    print(states[0])
    states = states[1:] or states
elif "create" in args and "queued-resources" in args:
  code = next_of("create", 0)
  states = states if code else next_of("states", ["ACTIVE"])
elif "delete" in args:
  states = None
elif "ssh" in args and "host-train" in args[-2] + args[-1]:
  code, after = next_of("runs", [0, None])
  print("a line of the run")
  states = after or states
elif "ssh" in args:
  code = next_of("setups", 0)
plan_file.write_text(json.dumps(plan))
states_file.unlink(missing_ok=True)
if states is not None:
  states_file.write_text(json.dumps(states))
sys.exit(code)
"""


class Pod:
  """A folder with the fake gcloud. `plan` says how it behaves: lists of outcomes, used one by one."""

  def __init__(self, folder: Path):
    self.folder, self.log = folder, folder / "run.log"
    (folder / "gcloud").write_text(FAKE)
    (folder / "gcloud").chmod(0o755)

  def __call__(self, *arguments: str, **plan) -> subprocess.CompletedProcess:
    (self.folder / "plan.json").write_text(json.dumps(plan))
    env = os.environ | {"PATH": f"{self.folder}:{os.environ['PATH']}", "TPU_POD_POLL": "0"}
    return subprocess.run(
      ["bash", str(SCRIPT), *arguments], env=env, capture_output=True, text=True, timeout=60, check=False
    )

  def train(self, *options: str, **plan) -> subprocess.CompletedProcess:
    return self("train", *POD, f"--log={self.log}", *options, *RUN, **plan)

  @property
  def calls(self) -> list[list[str]]:
    return [json.loads(line) for line in (self.folder / "calls.jsonl").read_text().splitlines()]

  @property
  def verbs(self) -> list[str]:
    """The calls that change something, as single words."""
    words = []
    for call in self.calls:
      if "queued-resources" in call and "describe" not in call:
        words.append(call[3])
        if call[3] == "ssh":
          words[-1] = "run" if any("host-train" in word for word in call) else "setup"
    return words


@pytest.fixture
def pod(tmp_path):
  return Pod(tmp_path)


def test_create_makes_the_bucket_and_waits_for_a_slow_pod(pod):
  slow = ["ACCEPTED", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]
  done = pod(
    "create",
    *POD,
    "--spot",
    "--bucket=gs://mine",
    "--valid-until=6h",
    "--project=p",
    bucket=[1],
    states=[slow],
  )
  assert done.returncode == 0, done.stderr
  created = next(call for call in pod.calls if call[2:4] == ["queued-resources", "create"])
  assert created == [
    "compute", "tpus", "queued-resources", "create", "dtm", "--node-id=dtm", "--accelerator-type=v4-64",
    "--runtime-version=tpu-ubuntu2204-base", "--spot", "--valid-until-duration=6h", "--zone=us-central2-b",
    "--project=p",
  ]  # fmt: skip
  assert [
    "storage", "buckets", "create", "gs://mine", "--location=us-central2", "--uniform-bucket-level-access",
    "--project=p",
  ] in pod.calls  # fmt: skip
  for state in slow:
    assert f"The state of dtm is {state}." in done.stderr
  assert pod.verbs == ["create"]


def test_on_demand_slices_and_runtimes(pod):
  commands = {}
  for kind in ("v4-8", "v5litepod-16", "v5p-8", "v6e-8"):
    done = pod("create", "--dry-run", *POD[:2], f"--type={kind}", "--slices=2")
    words = shlex.split(done.stdout)
    assert "--spot" not in words
    assert {"--node-count=2", "--node-prefix=dtm"} <= {*words}
    commands[kind] = next(word.partition("=")[2] for word in words if word.startswith("--runtime-version="))
  assert commands == {
    "v4-8": "tpu-ubuntu2204-base",
    "v5litepod-16": "v2-alpha-tpuv5-lite",
    "v5p-8": "v2-alpha-tpuv5",
    "v6e-8": "v2-alpha-tpuv6e",
  }
  assert not (pod.folder / "calls.jsonl").exists()  # a dry run calls nothing


def test_a_dry_run_prints_lines_that_can_be_pasted(pod):
  """The words of the run survive the two shells that they pass, ours and that of the host."""
  odd = ["--config=configs/vitb16.py", "--workdir=gs://b/run", "--config.mesh.rules=((\".*\", 'fsdp'),)"]
  done = pod("train", "--dry-run", *POD, "--bucket=gs://b", "--", *odd)
  assert done.returncode == 0, done.stderr
  lines = [shlex.split(line) for line in done.stdout.splitlines()]
  assert [line[0] for line in lines] == ["gcloud", "bash", "gcloud", "gcloud", "gcloud", "gcloud"]
  setup, start = (
    next(word for word in line if word.startswith("--command=")).partition("=")[2] for line in lines[3:5]
  )
  assert "host-setup --bucket=gs://b" in setup
  words = shlex.split(start)
  assert words[words.index("--") + 1 :] == odd
  for line in lines[3:5]:
    assert {"--node=all", "--worker=all", "--batch-size=all"} <= {*line}
  assert not (pod.folder / "calls.jsonl").exists()


def test_train_sets_up_runs_and_ends_with_one_log(pod):
  done = pod.train("--bucket=gs://bucket")
  assert done.returncode == 0, done.stderr
  assert pod.verbs == ["create", "scp", "setup", "run"]
  assert "a line of the run" in pod.log.read_text()
  assert ["storage", "cp", str(pod.log), "gs://bucket/logs/dtm.log"] in pod.calls


def test_a_preempted_pod_is_requested_again_and_the_same_command_goes_on(pod):
  lost = ["SUSPENDING", "SUSPENDED"]
  done = pod.train(
    "--spot",
    runs=[[75, lost], [255, lost], [0, None]],
    states=[["ACTIVE"], ["WAITING_FOR_RESOURCES", "ACTIVE"], ["ACTIVE"]],
  )
  assert done.returncode == 0, done.stderr
  again = ["delete", "create", "scp", "setup", "run"]
  assert pod.verbs == ["create", "scp", "setup", "run", *again, *again]
  runs = [call for call in pod.calls if any("host-train" in word for word in call)]
  assert runs[0] == runs[1] == runs[2]
  assert pod.log.read_text().count("a line of the run") == 3


def test_a_stopped_run_on_a_healthy_pod_goes_on_without_a_new_setup(pod):
  assert pod.train(runs=[[75, None]] * 5 + [[0, None]]).returncode == 0
  assert pod.verbs == ["create", "scp", "setup", *["run"] * 6]


def test_a_users_error_ends_at_once(pod):
  done = pod.train(runs=[[2, None]])
  assert done.returncode == 2
  assert pod.verbs.count("run") == 1


@pytest.mark.parametrize(("retries", "code"), [(3, 1), (2, 134)])
def test_failures_in_a_row_on_a_healthy_pod_end_the_loop(pod, retries, code):
  done = pod.train(f"--retries={retries}", runs=[[code, None]] * 9)
  assert done.returncode == code
  assert pod.verbs.count("run") == retries
  assert f"failed {retries} times in a row on a healthy pod" in done.stderr + done.stdout


def test_a_failed_setup_is_tried_again(pod):
  assert pod.train(setups=[2, 0]).returncode == 0
  assert pod.verbs == ["create", "scp", "setup", "scp", "setup", "run"]


def test_a_request_that_fails_ends_with_a_message(pod):
  done = pod.train(states=[["WAITING_FOR_RESOURCES", "FAILED"]])
  assert done.returncode == 2
  assert "It may have expired (--valid-until)" in done.stderr
  assert "run" not in pod.verbs


def test_an_existing_request_that_failed_before_is_replaced(pod):
  (pod.folder / "states.json").write_text(json.dumps(["FAILED"]))
  assert pod("create", *POD).returncode == 0
  assert pod.verbs == ["delete", "create"]


def test_a_gcloud_that_keeps_failing_ends_the_loop(pod):
  done = pod("create", *POD, create=[1, 1, 1])
  assert done.returncode == 2
  assert "gcloud failed 3 times in a row" in done.stderr
  done = pod("create", *POD, describe=["You do not currently have an active account selected."] * 9)
  assert done.returncode == 2
  assert "active account" in done.stderr


def test_one_hiccup_of_gcloud_is_survived(pod):
  assert pod("create", *POD, create=[1], describe=["Internal error"]).returncode == 0


def test_status_logs_and_delete(pod):
  assert pod("status", *POD[:2]).stdout == "NONE\n"
  assert pod("create", *POD).returncode == 0
  assert pod("status", *POD[:2]).stdout == "ACTIVE\n"
  assert pod("delete", *POD[:2]).returncode == 0
  assert [word for word in pod.calls[-1] if word in ("--force", "--quiet")] == ["--force", "--quiet"]
  assert pod("logs", *POD[:2], "--bucket=gs://mine", f"--log={pod.log}").returncode == 0
  assert pod.calls[-1] == ["storage", "cat", "gs://mine/logs/dtm.log"]
  pod.log.write_text("a line\n")
  assert "tail -n 100 -F" in pod("logs", *POD[:2], "--dry-run", f"--log={pod.log}").stdout


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ([], "A command is missing: create, setup, train, logs, status or delete."),
    (["creat"], "Unknown command creat. Available: create, setup, train, logs, status, delete."),
    (["create", "--zone=z", "--type=v4-8"], "--name is missing"),
    (["create", "--name=a", "--type=v4-8"], "--zone is missing"),
    (["create", "--name=a", "--zone=z"], "--type is missing"),
    (["create", "--name=a", "--zone=z", "--type=h100-8"], "--type=h100-8: the types are v2-N"),
    (["create", "--name=A_b", "--zone=z", "--type=v4-8"], "--name=A_b must be lower-case letters"),
    (["create", *POD, "--slices=0"], "--slices=0 must be a whole number of at least 1."),
    (["create", *POD, "--bucket=mine"], "--bucket=mine must be gs://BUCKET."),
    (["create", *POD, "--spto"], "Unknown or empty option --spto."),
    (["create", *POD, "--project="], "Unknown or empty option --project=."),
    (["create", *POD, *RUN], "Unexpected arguments: --config=configs/vitb16.py"),
    (["train", *POD, "--", "--workdir=gs://b/x"], "The run has no --config."),
    (
      ["train", *POD, "--", "--config=a.py", "--workdir=runs/x"],
      "The run needs --workdir=gs://BUCKET/FOLDER",
    ),
  ],
)
def test_wrong_arguments_get_one_message(pod, arguments, message):
  done = pod(*arguments)
  assert done.returncode == 2
  assert message in done.stderr
  assert not (pod.folder / "calls.jsonl").exists()


def test_a_missing_gcloud_is_named(pod, tmp_path):
  folder = tmp_path / "bin"
  folder.mkdir()
  for name in ("bash", "dirname", "sed"):
    (folder / name).symlink_to(f"/bin/{name}" if os.path.exists(f"/bin/{name}") else f"/usr/bin/{name}")
  done = subprocess.run(
    ["/bin/bash", str(SCRIPT), "status", *POD[:2]], env={"PATH": str(folder)}, capture_output=True, text=True,
    check=False,
  )  # fmt: skip
  assert done.returncode == 2
  assert "gcloud is not installed" in done.stderr


def test_help_names_each_command_and_option(pod):
  text = pod("help").stdout
  for word in (
    "create",
    "setup",
    "train",
    "logs",
    "status",
    "delete",
    "--spot",
    "--dry-run",
    "--valid-until",
  ):
    assert word in text


def test_a_host_is_set_up_with_the_environment_and_the_mounted_bucket(tmp_path):
  """Without a Python 3.11 to 3.13, uv brings one."""
  folder = tmp_path / "bin"
  folder.mkdir()
  for name in ("bash", "dirname", "cat"):
    (folder / name).symlink_to(f"/usr/bin/{name}" if os.path.exists(f"/usr/bin/{name}") else f"/bin/{name}")
  done = subprocess.run(
    ["/bin/bash", str(SCRIPT), "host-setup", "--dry-run", "--bucket=gs://mine"],
    env={"PATH": str(folder), "HOME": str(tmp_path)}, capture_output=True, text=True, check=False,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  assert "python3 -m pip install --quiet --user uv" in done.stdout
  assert "source scripts/environment.sh requirements.txt requirements-tpu.txt" in done.stdout
  assert f"gcsfuse --implicit-dirs mine {tmp_path}/bucket" in done.stdout
