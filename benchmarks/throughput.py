"""Measure the whole train step alone: images a second, compile time and memory. Any option may be overridden.

    python -m benchmarks.throughput --config=configs/vitb16.py --batch=256 --config.student.remat=none

`benchmarks.step` also times the parts of the step, for which it compiles five more programs. This benchmark
compiles one. The batch is synthetic and on the device. If the CLIP weights of the config are not on this
machine, the teacher gets random weights. If the results of `benchmarks.ceiling` are in the folder --out, the
table has the share of the ceiling. --again=0 leaves out the second compilation, from the cache.
"""

import json
import time
from pathlib import Path

import jax
import numpy as np

from benchmarks import ceiling, measuring, memory, operations, workload
from benchmarks.step import Step


def parse(argv=None):
  """Return the options of the benchmark and the remaining arguments, which override the config."""
  parser = measuring.make_parser(
    __doc__, "throughput", config="configs/vitb16.py", batch=256, rounds=3, steps=5, warm_up=3, again=1
  )
  return parser.parse_known_args(argv)


def collect(args, overrides) -> dict:
  """Return the numbers of one variant."""
  config = workload.config_from(args.config, overrides, args.dtype)
  config.batch_size = args.batch
  print(f"{args.name}: compiling", flush=True)
  step = Step(config)
  print(f"{args.name}: compiled in {step.compile_seconds:.1f} s", flush=True)
  for _ in range(args.warm_up):
    measurements = jax.block_until_ready(step())
  loss = float(measurements["loss"])
  times = []
  for _ in range(args.rounds):
    start = time.perf_counter()
    for _ in range(args.steps):
      measurements = step()
    jax.block_until_ready(measurements)
    times.append((time.perf_counter() - start) / args.steps)
  rate = args.batch / np.array(times)
  record = {
    "config": args.config,
    "overrides": overrides,
    "batch": args.batch,
    "dtype": config.student.dtype,
    "loss_after_warm_up": loss,
    "images_per_s": measuring.quartiles(rate),
    "ms": measuring.quartiles(1e3 * np.array(times)),
    "compile_s": step.compile_seconds,
    "memory": memory.memory_by_kind(step.compiled),
  }
  record["compile_again_s"] = step.compile_again() if args.again else None
  return record | share_of_ceiling(config, step, rate, args.out)


def share_of_ceiling(config, step: Step, rate: np.ndarray, folder: Path) -> dict:
  """Return the GFLOP per image and the share of the ceiling, if operations and ceiling are known."""
  try:
    forward = operations.student_forward(step.task.student, step.task.grid)
    gflop = (operations.teacher_forward(step.task.teacher) + 3 * forward) / 1e9
    rates = json.loads((folder / "ceiling.json").read_text())["rates"]
    share = rate * gflop / 1e3 / rates[ceiling.BF16]["median"]
    return {"gflop_an_image": gflop, "mfu": measuring.quartiles(share)}
  except (ValueError, FileNotFoundError, KeyError):
    return {}


def markdown(record, args) -> str:
  """Return the table of one variant."""
  rows = [
    ["images/s", measuring.spread(record["images_per_s"], ".4g")],
    ["ms a step", measuring.spread(record["ms"], ".4g")],
    *([["share of the ceiling", measuring.spread(record["mfu"], ".1%")]] if "mfu" in record else []),
    ["compilation, s", f"{record['compile_s']:.1f}"],
    *([["compilation from the cache, s", f"{again:.1f}"]] if (again := record["compile_again_s"]) else []),
    *([f"memory: {name}, GiB", f"{value:.2f}"] for name, value in record["memory"].items()),
    [f"loss after {args.warm_up} steps", f"{record['loss_after_warm_up']:.5f}"],
  ]
  about = (
    f"`{args.config}` {' '.join(record['overrides'])}: batch {args.batch}, {record['dtype']}; median and "
    f"quartiles of {args.rounds} rounds of {args.steps} steps."
  )
  return about + "\n\n" + measuring.table(["whole step", "value"], rows)


def main(argv=None):
  args, overrides = parse(argv)
  record = collect(args, overrides)
  print(measuring.report(
    args.out, args.name, title=f"The train step: {args.name}", module="benchmarks.throughput", note=args.note,
    body=markdown(record, args), record=record,
  ))  # fmt: skip


if __name__ == "__main__":
  main()
