"""Compare our train step with the same work in PyTorch, on the same machine, in turns.

    python -m benchmarks.peer --config=configs/vitb16.py --batch=4 --repeats=9

Each side has its own process with all cores, because two thread pools in one process would compete. One side
works while the other waits. In each round, each side makes two steps, and the benchmark times the second one.
The first step fills the caches, which the other side has overwritten. The order of the sides changes from
round to round. Each ratio compares two times from the same round. The type is float32 on a CPU and bf16 on a
GPU, where PyTorch uses autocast and torch.compile. The GPU branch has not been run yet, because there was no
GPU.
"""

import argparse
import importlib.util
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from benchmarks import measuring

SIDES = ("jax", "torch")


def jax_step(config):
  """Return a function that makes one step of our train step and returns the loss."""
  from benchmarks import step

  own = step.Step(config)
  return lambda: float(own()["loss"])  # waits for the device


def torch_step(config):
  """Return a function that makes one step in PyTorch and returns the loss."""
  import torch

  from benchmarks import peer_torch
  from dtm_jax.models.clip import weights as clip_weights
  from dtm_jax.models.vit import model as vit

  device = "cuda" if torch.cuda.is_available() else "cpu"
  clip, _ = clip_weights.load(config.teacher.path)
  return peer_torch.Step(config, vit.build(**config.student), clip, device=device)


def work(side: str, args, overrides) -> None:
  """Make two warm-up steps. Then make two steps for every input line, and print the time of the second."""
  from benchmarks import workload

  config = workload.config_from(args.config, overrides, args.dtype)
  config.batch_size = args.batch
  step = {"jax": jax_step, "torch": torch_step}[side](config)
  for _ in range(2):
    step()
  print("ready", flush=True)
  for _ in sys.stdin:
    step()  # fills the caches again after the other side's turn
    start = time.perf_counter()
    loss = step()
    print(f"{time.perf_counter() - start} {loss}", flush=True)


class Worker:
  """Runs one side in a process, which makes its steps on demand."""

  def __init__(self, side: str, argv):
    command = [sys.executable, "-m", "benchmarks.peer", f"--worker={side}", *argv]
    self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

  def answer(self) -> str:
    line = self.process.stdout.readline().strip()
    if not line:
      raise RuntimeError(f"The worker {self.process.args} ended with {self.process.wait()}.")
    return line

  def step(self) -> float:
    """Make an untimed step and then a timed step, and return the seconds of the second."""
    self.process.stdin.write("go\n")
    self.process.stdin.flush()
    seconds, loss = map(float, self.answer().split())
    if not np.isfinite(loss):
      raise FloatingPointError(f"{self.process.args}: the loss is {loss}.")
    return seconds

  def close(self):
    self.process.stdin.close()
    self.process.wait()


def in_turns(args, argv) -> dict[str, np.ndarray]:
  """Return the seconds of every round of both sides."""
  workers = {}
  try:
    for side in SIDES:  # one after the other, because both use all cores
      workers[side] = Worker(side, argv)
      if (answer := workers[side].answer()) != "ready":
        raise RuntimeError(f"The worker of {side} said {answer!r}.")
    times = {side: [] for side in SIDES}
    for i in range(args.repeats):
      for side in random.Random(i).sample(SIDES, len(SIDES)):
        times[side].append(workers[side].step())
  finally:
    for worker in workers.values():
      worker.close()
  return {side: np.array(each) for side, each in times.items()}


def main(argv=None):
  argv = sys.argv[1:] if argv is None else argv
  args, overrides = parse(argv)
  if args.worker:
    return work(args.worker, args, overrides)
  if importlib.util.find_spec("torch") is None:
    sys.exit("The peer needs PyTorch: pip install -r requirements-test.txt")
  times = in_turns(args, argv)
  rate = {side: measuring.quartiles(args.batch / each) for side, each in times.items()}
  ratio = measuring.quartiles(times["torch"] / times["jax"])
  rows = [
    ["ours, images/s", measuring.spread(rate["jax"])],
    ["PyTorch, images/s", measuring.spread(rate["torch"])],
    ["ours to PyTorch", measuring.spread(ratio, ".2f")],
  ]
  body = (
    f"Batch {args.batch}; median and quartiles of {args.repeats} rounds. In each, a side makes two steps "
    "and the second is timed. In PyTorch, masks are random patches, colour jitter has a fixed order, and one "
    "schedule is drawn for the whole batch.\n\n" + measuring.table([Path(args.config).stem, "value"], rows)
  )
  record = {"batch": args.batch, "repeats": args.repeats, "images_per_s": rate, "ours_to_torch": ratio}
  record["seconds"] = {side: each.tolist() for side, each in times.items()}
  text = measuring.report(
    args.out, args.name, title="Beside PyTorch", module="benchmarks.peer", note=args.note, body=body,
    record=record, packages=("torch", "transformers"),
  )  # fmt: skip
  print(text)


def parse(argv):
  """Return the options of the benchmark and the remaining arguments, which override the config."""
  parser = measuring.make_parser(__doc__, "peer", config="configs/vitb16.py", batch=4, repeats=9)
  parser.add_argument("--worker", choices=SIDES, help=argparse.SUPPRESS)
  return parser.parse_known_args(argv)


if __name__ == "__main__":
  main()
