"""`scripts/gpu.sh` runs to its end at toy size, and its sections do not depend on one another."""

import importlib.util
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import without_clu

from benchmarks import gpu, peer

ROOT = Path(__file__).parents[1]
RUN_MODULE = """
import runpy
del sys.argv[:2]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


@pytest.fixture
def python_without_clu(tmp_path):
  """Return a program that is Python for `-m MODULE`, but finds neither CLU nor TensorFlow."""
  program = tmp_path / "python"
  command = shlex.join([sys.executable, "-c", without_clu.HIDE + RUN_MODULE])
  program.write_text(f'#!/bin/sh\nexec {command} "$@"\n')
  program.chmod(0o755)
  return program


@pytest.fixture
def smoke(python_without_clu, tmp_path):
  """Return a function that runs the smoke form of the script, and returns its output, folder and statuses."""

  def run(*flags):
    out = tmp_path / "out"
    done = subprocess.run(
      ["bash", "scripts/gpu.sh", "--smoke", f"--out={out}", *flags], cwd=ROOT, capture_output=True, text=True,
      env=os.environ | {"PYTHON": str(python_without_clu), "XLA_FLAGS": ""},  # one device
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    summary = json.loads((out / "summary.json").read_text())
    for each in summary:
      assert f"=== {each['section']}: " in done.stdout
    return out, {each["section"]: each["status"] for each in summary}

  return run


def test_one_section_runs_without_clu_and_tensorflow(smoke):
  out, statuses = smoke("--only=ceiling")
  assert statuses == {"ceiling": "done"}
  assert "# Ceilings of the device" in (out / "summary.md").read_text()


@pytest.mark.slow
@pytest.mark.long  # one section runs above
def test_all_sections_run_without_clu_and_tensorflow(smoke):
  out, statuses = smoke()
  assert [*statuses] == [each.name for each in gpu.sections(True, None)]
  for name, status in statuses.items():
    optional = name == "attention" or name.startswith("step, ")
    assert status == "done" or (optional and status.startswith("skipped without ")), (name, status)
  beside = json.loads((out / "peer.json").read_text())
  sides = {"jax", "torch"} if importlib.util.find_spec("torch") else {"jax"}
  assert {side: len(each) for side, each in beside["seconds"].items()} == dict.fromkeys(sides, 1)
  text = (out / "summary.md").read_text()
  for heading in (
    "Ceilings of the device",
    "The train step",
    "What morphing costs",
    "Beside PyTorch",
    "Images on the device",
  ):
    assert f"# {heading}" in text
  assert "| matching |" in text  # a row of the profile
  assert "share of the ceiling" in text


def test_minutes_choose_the_most_important_sections_in_their_order():
  every = gpu.sections(False, None)
  names = [each.name for each in gpu.choose(every, minutes=8)]
  assert names[:2] == ["ceiling", "step"]
  assert names[-4:] == ["profile", "matching", "attention", "peer"]
  assert sum(each.seconds for each in gpu.choose(every, 8)) <= 8 * 60
  assert gpu.choose(every, None) == every
  assert gpu.choose(every, 0.1) == []


def test_a_section_is_skipped_without_its_option_or_module():
  config = {"student": {"unroll": 1}}
  section = lambda *needs: gpu.Section("x", (), 1, 1, needs=needs)
  assert gpu.lacking(section("student.unroll", "benchmarks.step"), config) is None
  assert gpu.lacking(section("student.unrolled"), config) == "the option student.unrolled"
  assert gpu.lacking(section("benchmarks.no_such"), config) == "the module benchmarks.no_such"


@pytest.mark.parametrize(
  ("command", "limit", "status"),
  [
    (("json.no_such",), 60, "failed with code 1"),
    (("timeit", "-n1", "-r1", "import time; time.sleep(60)"), 1, "too slow"),
    (("this",), 60, "done"),
  ],
)
def test_a_section_that_fails_or_is_slow_has_a_status(command, limit, status, tmp_path, capsys):
  section = gpu.Section("a, b=c", command, 1, 1, saves=False)
  assert gpu.run(section, tmp_path, limit, [], {})["status"] == status
  assert f"=== a, b=c: {status}" in capsys.readouterr().out
  assert (tmp_path / "a_b_c.log").exists()
  assert (tmp_path / "a_b_c.md").exists() == (status == "done")


def test_unknown_arguments_are_refused(capsys):
  with pytest.raises(SystemExit):
    gpu.parse(["--minuts=8"])
  assert "unknown arguments: --minuts=8" in capsys.readouterr().err
  with pytest.raises(SystemExit):
    gpu.parse(["--only=step,nothing"])
  assert "--only=step,nothing: unknown nothing; the sections are ceiling, step" in capsys.readouterr().err
  assert gpu.parse(["--only=profile,peer", "--smoke"])[0].only == "profile,peer"


class FakeWorker:
  """Answers at once. PyTorch fails as `failure` says: it cannot start, or it fails in its second round."""

  failure = ""

  def __init__(self, side, argv):
    self.side, self.rounds = side, 0

  def answer(self, limit):
    if self.side == "torch" and self.failure == "start":
      raise TimeoutError(f"no answer within {limit} s.")
    return "ready"

  def step(self, limit):
    self.rounds += 1
    if self.side == "torch" and self.failure == "second round" and self.rounds == 2:
      raise RuntimeError("the process ended with -9.")
    return 0.5

  def close(self):
    pass


@pytest.mark.parametrize("failure", ["", "start", "second round"])
def test_the_peer_keeps_what_it_has_when_a_side_fails(failure, tmp_path, monkeypatch, capsys):
  pytest.importorskip("torch")
  monkeypatch.setattr(peer, "Worker", type("Worker", (FakeWorker,), {"failure": failure}))
  peer.main(["--batch=2", "--repeats=3", f"--out={tmp_path}", "--compile_limit=7"])
  record = json.loads((tmp_path / "peer.json").read_text())
  rounds = {side: len(each) for side, each in record["seconds"].items()}
  expected = {"": {"jax": 3, "torch": 3}, "start": {"jax": 3}, "second round": {"jax": 3, "torch": 1}}
  assert rounds == expected[failure]
  assert set(record["errors"]) == ({"torch"} if failure else set())
  assert ("ours_to_torch" in record) == (not failure)
  assert "round 3 of 3: ours 500 ms" in capsys.readouterr().out
