"""Start runs of the real command in a tiny world, break them at a chosen moment, resume and compare them."""

import dataclasses
import json
import multiprocessing
import os
import random
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import forkserver
from pathlib import Path
from unittest import mock

from tests import small_world, xla_flags

ROOT = Path(__file__).parents[2]
LAST_STEP, SAVE_STEPS, EVALUATION_STEPS = 12, 3, 4
TIMEOUT = 300.0
ENVIRONMENT = {
  "JAX_PLATFORMS": "cpu",
  "XLA_FLAGS": f"--xla_force_host_platform_device_count=2 {xla_flags.QUICK}",
  "TF_CPP_MIN_LOG_LEVEL": "3",
  "HF_HUB_OFFLINE": "1",
  "PYTHONUNBUFFERED": "1",
  "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
}


@dataclasses.dataclass(frozen=True)
class World:
  """A folder with a data set and a teacher, and a place for compiled programs."""

  folder: Path

  @classmethod
  def make(cls, folder: Path) -> "World":
    small_world.write_cifar10(folder)
    small_world.write_clip(folder / "clip")
    return cls(folder)

  def arguments(self, workdir: Path, *more: str) -> list[str]:
    """The command line of a run of 12 steps: a save every 3, an evaluation every 4, a line every step."""
    return [
      "--config=configs/debug.py", f"--workdir={workdir}",
      f"--config.teacher.path={self.folder / 'clip'}", f"--config.data.dataset.data_dir={self.folder}",
      f"--config.evals.knn.dataset.data_dir={self.folder}", f"--config.total_steps={LAST_STEP}",
      f"--config.checkpoint.save_steps={SAVE_STEPS}", "--config.log.log_steps=1",
      f"--config.evals.knn.every_steps={EVALUATION_STEPS}", "--config.checkpoint.keep=3", *more,
    ]  # fmt: skip


class Process:
  """A started run; its output goes to a file.

  With `warm=True` the process is forked from one that has the libraries imported, which saves most of a
  start; otherwise it is `python -m dtm_jax.main`, whose start can be interrupted too. A forked process calls
  `run` with the arguments.
  """

  def __init__(
    self,
    arguments: Sequence[str],
    log: Path,
    *,
    env: Mapping[str, str] | None = None,
    warm: bool = True,
    run: Callable[[list[str]], None] | None = None,
  ):
    self.log = log
    environment = ENVIRONMENT | {"JAX_COMPILATION_CACHE_DIR": str(CACHE)} | dict(env or {})
    log.parent.mkdir(parents=True, exist_ok=True)
    if warm:
      started = (run or run_command, list(arguments), str(log), environment)
      # Python kills a daemon at its own end. It would wait for another process, also for one that hangs.
      self._process = _forkserver().Process(target=_run_forked, args=started, daemon=True)
      self._process.start()
      self.pid = self._process.pid
    else:
      with log.open("ab") as out:
        command = [sys.executable, "-m", "dtm_jax.main", *arguments]
        self._process = subprocess.Popen(
          command, cwd=ROOT, env=os.environ | environment, stdout=out, stderr=out
        )
      self.pid = self._process.pid

  @property
  def returncode(self) -> int | None:
    if isinstance(self._process, subprocess.Popen):
      return self._process.poll()
    return self._process.exitcode

  def text(self) -> str:
    """Return what the run has printed so far."""
    return self.log.read_text(errors="replace") if self.log.exists() else ""

  def send(self, number: signal.Signals) -> None:
    if self.returncode is None:
      os.kill(self.pid, number)

  def wait(self, timeout: float = TIMEOUT) -> int:
    """Return the exit code, or minus the signal that ended the run. A run that hangs is killed."""
    deadline = time.monotonic() + timeout
    while self.returncode is None:
      if time.monotonic() > deadline:
        self.send(signal.SIGKILL)
        raise AssertionError(f"no end within {timeout:.0f} s:\n{self.text()[-2000:]}")
      time.sleep(0.02)
    return self.returncode

  def wait_for(self, moment: Callable[["Process"], bool], timeout: float = TIMEOUT) -> bool:
    """Wait until the moment has come. Return False if the run ended before."""
    deadline = time.monotonic() + timeout
    while not moment(self):
      if self.returncode is not None:
        return False
      assert time.monotonic() < deadline, f"the moment did not come:\n{self.text()[-2000:]}"
      time.sleep(0.004)
    return True


def finish(arguments: Sequence[str], log: Path, **options) -> Process:
  """Run to the end. Another exit code than 0 raises an error with the log."""
  process = Process(arguments, log, **options)
  code = process.wait()
  assert code == 0, f"exit code {code}:\n{process.text()[-2000:]}"
  return process


def lines(workdir: Path) -> list[dict]:
  """Return the lines of metrics.jsonl, which must all be complete."""
  path = workdir / "metrics.jsonl"
  return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def steps(workdir: Path) -> list[int]:
  """Return the saved steps, ascending."""
  folder = workdir / "checkpoints"
  return sorted(int(path.name) for path in folder.glob("*") if path.name.isdigit()) if folder.exists() else []


def checksums(workdir: Path, step: int = LAST_STEP) -> dict[str, int]:
  """Return the checksum of every array of a saved state. A restore compares them with the bytes."""
  meta = json.loads((workdir / "checkpoints" / str(step) / "meta" / "metadata").read_text())
  return {name: entry["checksum"] for name, entry in meta["arrays"].items()}


def results(workdir: Path) -> dict[int, dict[str, float]]:
  """Return the numbers of a run that do not depend on time, by step. Two lines of a step are an error."""
  found = {}
  for line in lines(workdir):
    assert line["step"] not in found, f"two lines of step {line['step']}"
    assert len(line) > 1, f"an empty line of step {line['step']}"
    timeless = ("loss", "grad_norm", "groups", "learning_rate", "knn/")
    found[line["step"]] = {key: value for key, value in line.items() if key.startswith(timeless)}
  return found


def assert_equal_runs(workdir: Path, reference: Path) -> None:
  """Check that the final state and every number of every step equal the reference to the bit."""
  assert steps(workdir)[-1] == steps(reference)[-1] == LAST_STEP, f"saved {steps(workdir)}"
  assert checksums(workdir) == checksums(reference), "the final state differs"
  ours, theirs = results(workdir), results(reference)
  assert ours.keys() == theirs.keys(), f"lines of steps {sorted(ours)}, expected {sorted(theirs)}"
  differing = [step for step in theirs if ours[step] != theirs[step]]
  assert not differing, f"numbers of steps {differing}: {ours[differing[0]]} != {theirs[differing[0]]}"


def pause(rng: random.Random, most: float) -> None:
  """Sleep for a random time, so that a moment does not always hit the same instruction."""
  time.sleep(rng.uniform(0, most))


CACHE = Path(os.environ.get("TMPDIR", "/tmp")) / f"dtm_jax_campaign_{os.getuid()}" / "xla"


def _forkserver():
  context = multiprocessing.get_context("forkserver")
  context.set_forkserver_preload(["tests.campaign.warm"])
  with mock.patch.dict(os.environ, ENVIRONMENT):  # the server inherits it: JAX reads it when it is imported
    forkserver.ensure_running()
  return context


def run_command(arguments: list[str]) -> None:
  """Do what `python -m dtm_jax.main` does with the arguments."""
  sys.argv = ["dtm_jax.main", *arguments]
  runpy.run_module("dtm_jax.main", run_name="__main__", alter_sys=True)


def _run_forked(
  run: Callable[[list[str]], None], arguments: list[str], log: str, environment: dict[str, str]
) -> None:
  """Call `run` in the forked process, with the output in `log`."""
  os.chdir(ROOT)
  os.environ.update(environment)
  file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
  os.dup2(file, 1)
  os.dup2(file, 2)
  sys.stdout = os.fdopen(1, "w", buffering=1)
  sys.stderr = os.fdopen(2, "w", buffering=1)
  _share_programs_between_processes()
  run(arguments)


def _share_programs_between_processes() -> None:
  """Let process 0 of a run compile the programs of all its processes; the others read them from JAX's cache.

  JAX would compile in every process, because its key of a program depends on the place of the process. The
  processes of our runs have the same kind of device.
  """
  import jax
  from jax._src import cache_key, compiler

  cache_key._hash_accelerator_config = cache_key._hash_devices
  if "JAX_NUM_PROCESSES" not in os.environ:
    return
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
  read = compiler._cache_read

  def read_or_wait(module, key, options, backend, devices):
    shared = min(device.process_index for device in devices) != jax.process_index()
    deadline = time.monotonic() + 60  # then it compiles itself
    while (found := read(module, key, options, backend, devices))[0] is None and shared:
      if time.monotonic() > deadline:
        break
      time.sleep(0.02)
    return found

  compiler._cache_read = read_or_wait
