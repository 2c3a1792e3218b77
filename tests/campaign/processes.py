"""Kill, stop or break one of two processes of a run, and change the number of processes."""

import math
import random
import shutil
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

from tests import xla_flags
from tests.campaign import faulty_io, runs
from tests.campaign.trial import Trial

TITLE = "two processes, and another number of them"
ONE_DEVICE = f"--xla_force_host_platform_device_count=1 {xla_flags.QUICK}"


def trials(world: runs.World, reference: Path, seed: int, smoke: bool) -> Iterator[Trial]:
  """Yield trials that break one of two processes and resume with two, or change their number."""
  parts = {
    "2, 1, 2 processes, stopped by SIGTERM": lambda folder: _elastic(world, reference, folder),
    "SIGTERM to one of two": lambda folder: _signal_one(world, reference, signal.SIGTERM, 5, folder),
    "kill -9 of process 0 at step 2": lambda folder: _kill_one(world, reference, 0, 2, folder),
    "kill -9 of process 1 at step 2": lambda folder: _kill_one(world, reference, 1, 2, folder),
    "kill -9 of process 0 at step 7": lambda folder: _kill_one(world, reference, 0, 7, folder),
    "kill -9 of process 1 at step 7": lambda folder: _kill_one(world, reference, 1, 7, folder),
    "process 1 cannot read arrays": lambda folder: _unreadable(world, reference, "state", -1, folder),
    "process 1 cannot read arrays at first": lambda folder: _unreadable(world, reference, "state", 2, folder),
    "process 1 cannot read the meta data": lambda folder: _unreadable(world, reference, "meta", -1, folder),
    "a flipped bit for both": lambda folder: _damaged(world, reference, seed, folder),
  }
  for name, run in list(parts.items())[:1] if smoke else parts.items():
    yield Trial(name, run)


class Pair:
  """Two processes of one run on this machine, with one device each."""

  def __init__(self, arguments: list[str], folder: Path, name: str, env: tuple[dict, dict] = ({}, {})):
    with socket.socket() as free:
      free.bind(("127.0.0.1", 0))
      port = free.getsockname()[1]
    cluster = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": "2"}
    self.processes = [
      runs.Process(
        arguments, folder / f"{name}_{index}.log", warm="LD_PRELOAD" not in env[index],
        env=cluster | {"JAX_PROCESS_ID": str(index), "XLA_FLAGS": ONE_DEVICE} | env[index],
      )
      for index in range(2)
    ]  # fmt: skip

  def wait(self, timeout: float = runs.TIMEOUT) -> list[int]:
    return [process.wait(timeout) for process in self.processes]

  def text(self) -> str:
    return "\n----\n".join(process.text()[-1500:] for process in self.processes)


def _finish(arguments: list[str], folder: Path, name: str) -> None:
  pair = Pair(arguments, folder, name)
  assert pair.wait() == [0, 0], pair.text()


def _kill_one(world: runs.World, reference: Path, index: int, step: int, folder: Path) -> str:
  workdir = folder / "run"
  arguments = world.arguments(workdir)
  pair = Pair(arguments, folder, "first")
  written = lambda process: any(line["step"] >= step for line in _complete_lines(workdir))
  assert pair.processes[0].wait_for(written), pair.text()
  pair.processes[index].send(signal.SIGKILL)
  code = pair.processes[1 - index].wait(timeout=90)
  assert code != 0, "the other process ended as if all were well"
  _finish(arguments, folder, "last")
  _assert_close_runs(workdir, reference)
  return f"the other ended with {code}"


def _signal_one(world: runs.World, reference: Path, number: signal.Signals, step: int, folder: Path) -> str:
  workdir = folder / "run"
  arguments = world.arguments(workdir)
  pair = Pair(arguments, folder, "first")
  written = lambda process: any(line["step"] >= step for line in _complete_lines(workdir))
  assert pair.processes[0].wait_for(written), pair.text()
  pair.processes[1].send(number)
  assert pair.wait(timeout=120) == [0, 0], pair.text()
  saved = runs.steps(workdir)[-1]
  _finish(arguments, folder, "last")
  _assert_close_runs(workdir, reference)
  return f"saved step {saved}"


def _unreadable(world: runs.World, reference: Path, part: str, count: int, folder: Path) -> str:
  workdir = folder / "run"
  shutil.copytree(reference, workdir)
  shutil.rmtree(workdir / "checkpoints" / "12")
  arguments = world.arguments(workdir)
  env = faulty_io.environment(f"{workdir}/checkpoints/9/{part}", "read", "EIO", count=count)
  pair = Pair(arguments, folder, "faulty", env=({}, env))
  codes = pair.wait(timeout=180)
  assert not (workdir / "checkpoints" / "corrupt").exists(), "a sound checkpoint was moved aside"
  assert len({code == 0 for code in codes}) == 1, f"exit codes {codes}: {pair.text()}"
  if codes[0]:
    assert count < 0, pair.text()
    assert runs.steps(workdir)[-1] == 9, f"the run went on to {runs.steps(workdir)}"
  _finish(arguments, folder, "last")
  _assert_close_runs(workdir, reference)
  return "both stopped" if codes[0] else "both went on"


def _damaged(world: runs.World, reference: Path, seed: int, folder: Path) -> str:
  workdir = folder / "run"
  shutil.copytree(reference, workdir)
  files = [path for path in (workdir / "checkpoints" / "12" / "state").rglob("d/*") if path.is_file()]
  largest = max(files, key=lambda path: path.stat().st_size)
  contents = bytearray(largest.read_bytes())
  contents[random.Random(seed).randrange(len(contents))] ^= 1
  largest.write_bytes(contents)
  _finish(world.arguments(workdir), folder, "last")
  _assert_close_runs(workdir, reference)
  return "both fell back" if (workdir / "checkpoints" / "corrupt").exists() else "no value changed"


def _elastic(world: runs.World, reference: Path, folder: Path) -> str:
  """Run two processes to about step 4, one to about step 8, and two to the end: the losses stay the same."""
  workdir = folder / "run"
  arguments = world.arguments(workdir)
  stops = []
  for count, step in ((2, 4), (1, 8)):
    name = f"{count}_processes"
    processes = (
      Pair(arguments, folder, name).processes
      if count == 2
      else [runs.Process(arguments, folder / f"{name}.log")]
    )
    reached = lambda process, step=step: any(line["step"] >= step for line in _complete_lines(workdir))
    assert processes[0].wait_for(reached), processes[0].text()[-1500:]
    for process in processes:
      process.send(signal.SIGTERM)
    codes = [process.wait(120) for process in processes]
    assert codes == [0] * count, "\n".join(process.text()[-1500:] for process in processes)
    stops.append(runs.steps(workdir)[-1])
  _finish(arguments, folder, "last")
  _assert_close_runs(workdir, reference)
  return f"stopped at steps {stops}"


def _complete_lines(workdir: Path) -> list[dict]:
  try:
    return runs.lines(workdir)
  except ValueError:  # the run is writing
    return []


def _assert_close_runs(workdir: Path, reference: Path) -> None:
  """Compare every number of every step within 1e-5, because sums over devices have another order."""
  assert runs.steps(workdir)[-1] == runs.LAST_STEP
  ours, theirs = runs.results(workdir), runs.results(reference)
  assert ours.keys() == theirs.keys(), f"lines of steps {sorted(ours)}, expected {sorted(theirs)}"
  for step, numbers in theirs.items():
    for name, value in numbers.items():
      tolerance = 0.05 if name.startswith("knn/") else 1e-5  # one of 32 images may change its neighbours
      close = math.isclose(ours[step][name], value, rel_tol=tolerance, abs_tol=1e-7)
      assert close, f"{name} of step {step}: {ours[step][name]}, expected {value}"
