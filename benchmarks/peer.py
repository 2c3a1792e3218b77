"""Compare our train step with the same work in PyTorch, on the same machine, in turns.

    python -m benchmarks.peer --config=configs/vitb16.py --batch=4 --repeats=9

Each side has its own process with all cores, because two thread pools in one process would compete. One side
works while the other waits. In each round, each side makes two steps, and the benchmark times the second one.
The first step fills the caches, which the other side has overwritten. The order of the sides changes from
round to round. Each ratio compares two times from the same round. The type is float32 on a CPU and bf16 on a
GPU, where PyTorch uses autocast, torch.compile, channels-last images, TF32 and a fused optimiser.

The sides compile one after the other, each within --compile_limit seconds, and share the memory of a GPU. If
a side fails or is too slow, the report has its error and the numbers of the other side. The GPU branch has
not been run yet, because there was no GPU.
"""

import argparse
import contextlib
import importlib.util
import os
import queue
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np

from benchmarks import measuring

SIDES = ("jax", "torch")
NAMES = {"jax": "ours", "torch": "PyTorch"}
SHARE = 0.45
"""The share of a GPU's memory that each side may use."""
PROGRESS = "# "
"""The beginning of a worker's lines that report progress. Its other lines are answers."""


def jax_step(config):
  """Return a function that makes one step of our train step and returns the loss."""
  from benchmarks import step

  own = step.Step(config)
  return lambda: float(own()["loss"])  # waits for the device


def torch_step(config):
  """Return a function that makes one step in PyTorch and returns the loss."""
  import torch

  from benchmarks import peer_torch
  from dtm_jax import device_options, devices
  from dtm_jax.models.clip import weights as clip_weights
  from dtm_jax.models.vit import model as vit

  device = "cuda" if torch.cuda.is_available() else "cpu"
  if device == "cuda":
    torch.cuda.set_per_process_memory_fraction(SHARE)
  clip, _ = clip_weights.load(config.teacher.path)
  config, _ = device_options.resolve(config, devices.Device("cpu"))  # JAX must not take the GPU here
  return peer_torch.Step(config, vit.build(**config.student), clip, device=device)


def work(side: str, args, overrides) -> None:
  """Make two warm-up steps. Then make two steps for every input line, and print the time of the second."""
  start = time.perf_counter()
  progress = lambda text: print(f"{PROGRESS}{text} after {time.perf_counter() - start:.0f} s", flush=True)
  from benchmarks import workload

  config = workload.config_from(args.config, overrides, args.dtype)
  config.batch_size = args.batch
  progress("imported")
  step = {"jax": jax_step, "torch": torch_step}[side](config)
  progress("built")
  for name in ("first", "second"):
    step()
    progress(f"{name} step done")
  print("ready", flush=True)
  for _ in sys.stdin:
    step()  # fills the caches again after the other side's turn
    start = time.perf_counter()
    loss = step()
    print(f"{time.perf_counter() - start} {loss}", flush=True)


class Worker:
  """Runs one side in a process, which makes its steps on demand, and prints its progress."""

  def __init__(self, side: str, argv):
    self.side = side
    command = [sys.executable, "-m", "benchmarks.peer", f"--worker={side}", *argv]
    environment = os.environ | {"XLA_PYTHON_CLIENT_MEM_FRACTION": str(SHARE)}
    self.process = subprocess.Popen(
      command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
      start_new_session=True,
    )  # fmt: skip
    self.lines = queue.Queue()
    threading.Thread(target=self._read, daemon=True).start()

  def _read(self):
    for line in self.process.stdout:
      if line.startswith(PROGRESS):
        print(f"{NAMES[self.side]}: {line.removeprefix(PROGRESS).strip()}", flush=True)
      else:
        self.lines.put(line.strip())
    self.lines.put("")

  def answer(self, limit: float) -> str:
    """Return the next answer.

    Raises:
      TimeoutError: it does not come within `limit` seconds.
      RuntimeError: the process has ended.
    """
    try:
      line = self.lines.get(timeout=limit)
    except queue.Empty:
      raise TimeoutError(f"{NAMES[self.side]}: no answer within {limit:.0f} s.") from None
    if not line:
      raise RuntimeError(f"{NAMES[self.side]}: the process ended with {self.process.wait()}.")
    return line

  def step(self, limit: float) -> float:
    """Make an untimed step and then a timed step, and return the seconds of the second."""
    try:
      self.process.stdin.write("go\n")
      self.process.stdin.flush()
    except BrokenPipeError:
      raise RuntimeError(f"{NAMES[self.side]}: the process ended with {self.process.wait()}.") from None
    seconds, loss = map(float, self.answer(limit).split())
    if not np.isfinite(loss):
      raise FloatingPointError(f"{NAMES[self.side]}: the loss is {loss}.")
    return seconds

  def close(self):
    """End the process and its children, such as the compilers of torch.compile."""
    with contextlib.suppress(ProcessLookupError):
      os.killpg(self.process.pid, signal.SIGKILL)
    self.process.wait()


def in_turns(args, argv) -> tuple[dict[str, np.ndarray], dict[str, str]]:
  """Return the seconds of every round of each side, and the errors of the sides that failed."""
  workers, errors = {}, {}
  times = {side: [] for side in SIDES}

  def attempt(side: str, call, *limits):
    """Return what the call returns. If it fails, keep the error, end this side, and return None."""
    try:
      return call(*limits)
    except (RuntimeError, TimeoutError, FloatingPointError, ValueError) as error:
      print(error, flush=True)
      errors[side] = str(error)
      workers.pop(side).close()

  try:
    for side in SIDES:  # one after the other, because both use all cores
      if side == "torch" and importlib.util.find_spec("torch") is None:
        errors[side] = "PyTorch is not installed: pip install -r requirements-test.txt"
        continue
      workers[side] = Worker(side, argv)
      attempt(side, workers[side].answer, args.compile_limit)
    for i in range(args.repeats):
      for side in random.Random(i).sample(SIDES, len(SIDES)):
        if side in workers and (seconds := attempt(side, workers[side].step, args.step_limit)) is not None:
          times[side].append(seconds)
      print(f"round {i + 1} of {args.repeats}: " + ", ".join(_last(times)), flush=True)
  finally:
    for worker in workers.values():
      worker.close()
  return {side: np.array(each) for side, each in times.items()}, errors


def _last(times) -> list[str]:
  return [f"{NAMES[side]} {1e3 * each[-1]:.0f} ms" for side, each in times.items() if each]


def main(argv=None):
  argv = sys.argv[1:] if argv is None else argv
  args, overrides = parse(argv)
  if args.worker:
    return work(args.worker, args, overrides)
  times, errors = in_turns(args, argv)
  times = {side: each for side, each in times.items() if len(each)}
  if not times:
    sys.exit("\n".join(errors.values()))
  record = {"batch": args.batch, "repeats": args.repeats, "errors": errors}
  record["seconds"] = {side: each.tolist() for side, each in times.items()}
  rates = {side: measuring.quartiles(args.batch / each) for side, each in times.items()}
  record["images_per_s"] = rates
  rows = [[f"{NAMES[side]}, images/s", measuring.spread(rate)] for side, rate in rates.items()]
  if len({len(each) for each in times.values()}) == 1 and len(times) == 2:
    record["ours_to_torch"] = measuring.quartiles(times["torch"] / times["jax"])
    rows.append(["ours to PyTorch", measuring.spread(record["ours_to_torch"], ".2f")])
  rows += [[f"{NAMES[side]} failed", error] for side, error in errors.items()]
  body = (
    f"Batch {args.batch}; median and quartiles of {args.repeats} rounds. In each, a side makes two steps "
    "and the second is timed. In PyTorch, masks are random patches, colour jitter has a fixed order, and one "
    "schedule is drawn for the whole batch.\n\n" + measuring.table([Path(args.config).stem, "value"], rows)
  )
  packages = [name for name in ("torch", "transformers") if importlib.util.find_spec(name)]
  text = measuring.report(
    args.out, args.name, title="Beside PyTorch", module="benchmarks.peer", note=args.note, body=body,
    record=record, packages=packages,
  )  # fmt: skip
  print(text)


def parse(argv):
  """Return the options of the benchmark and the remaining arguments, which override the config."""
  parser = measuring.make_parser(
    __doc__, "peer", config="configs/vitb16.py", batch=4, repeats=9, compile_limit=300, step_limit=120
  )
  parser.add_argument("--worker", choices=SIDES, help=argparse.SUPPRESS)
  return parser.parse_known_args(argv)


if __name__ == "__main__":
  main()
