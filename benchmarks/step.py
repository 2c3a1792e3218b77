"""Images a second of the whole train step and of its parts, the share of the machine's peak, and memory.

    python -m benchmarks.step --config=configs/vitb16.py --batch=8 --repeats=5 [--config.student.variant=S]
    python -m benchmarks.step --input=real --data_dir=FOLDER_OF_JPEGS --plan=256

The config's own step is timed, jitted as the loop jits it; a CLIP that is not here gets random weights. The
parts are what is left between nested beginnings of that step, timed in the same rounds (beginnings.py); the
last of them is held against the step itself. The ceiling is a large square matrix product in the same rounds.
`--plan` compiles for another batch without running it and reads what the compiler plans for memory.
"""

import argparse
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import beginnings, measuring, memory, operations, workload
from benchmarks.beginnings import PARTS
from dtm_jax import loop, plugins
from dtm_jax.training import mesh as meshes

STEP, ALONE, PER_STEP = "whole step", "morphing + loss", "morphing + loss, a schedule a step"
CEILING = "matrix product"


def morphing_alone(config, teacher, grid, batch_size: int):
  """round -> the loss and its gradient to the student's tokens, on random tokens."""
  shape = (batch_size, grid[0] * grid[1], teacher.width)
  target, prediction = jax.random.normal(jax.random.key(0), (2, *shape))
  image = jnp.zeros((batch_size, *(config.data.image_size,) * 2, 3))
  step = jax.jit(jax.value_and_grad(beginnings.morph_and_loss(config), argnums=1))
  return lambda i: step(jax.random.key(i), prediction, target, image)


def ceiling(size: int, dtype: str):
  """round -> a product of two square matrices of this size."""
  left, right = jax.random.normal(jax.random.key(0), (2, size, size)).astype(dtype)
  product = jax.jit(jnp.matmul)
  return lambda i: product(left, right)


class Step:
  """The config's own step with its state, compiled once."""

  def __init__(self, config):
    task, self.mesh = workload.task_of(config), meshes.make_mesh(config.mesh.data, config.mesh.fsdp)
    self.state, self.frozen = workload.state_and_frozen(config, task, self.mesh)
    self.batch = workload.synthetic_batch(config, self.mesh)
    step = loop.jit_train_step(task, self.state, self.frozen, self.mesh)
    self.key = jax.random.key(config.seed)
    self.lowered = step.lower(self.state, self.frozen, self.batch, self.key)
    self.compiled = self.lowered.compile()

  def __call__(self, batch=None):
    self.state, measurements = self.compiled(self.state, self.frozen, batch or self.batch, self.key)
    return measurements


def beginnings_on(step: Step, functions):
  """{name: round -> result}, on copies of the step's state that it does not take away."""
  params = jax.tree.map(jnp.copy, step.state["params"])
  bind = lambda function: lambda i: function(params, jnp.int32(i), step.frozen, step.batch)
  return {name: bind(jax.jit(function)) for name, function in functions.items()}


def require_same(step: Step, calls) -> dict[str, float]:
  """The loss and the norm of the gradient as the last beginning and as the step itself have them.

  Raises:
    AssertionError: they differ: the beginnings are not those of the step.
  """
  loss, norm = calls["backward"](0)
  own = step()
  np.testing.assert_allclose(float(loss), float(own["loss"]), rtol=1e-5)
  np.testing.assert_allclose(float(norm), float(own["grad_norm"]), rtol=1e-3)
  return {"loss": float(own["loss"]), "grad_norm": float(own["grad_norm"])}


def with_real_input(config, step: Step, steps: int) -> dict:
  """The step fed by the loop's own input, steps back to back; what was made ahead of time is not counted."""
  dataset = plugins.build("datasets", config.data.dataset, split=config.data.split)
  batches = loop.device_batches(config, dataset, step.mesh, 0)
  waits, times = [], []
  for _ in range(config.data.num_threads + 3 + steps):
    start = time.perf_counter()
    batch = {"image": next(batches)["image"]}
    waits.append(time.perf_counter() - start)
    jax.block_until_ready(step(batch))
    times.append(time.perf_counter() - start)
  waits, times = np.array(waits[-steps:]), np.array(times[-steps:])
  return {
    "images_per_s": measuring.quartiles(config.batch_size / times),
    "input_wait": float(waits.sum() / times.sum()),
    "steps": steps,
  }


def parts(times) -> dict[str, np.ndarray]:
  """{part: seconds of each round}: each beginning less the one before; the optimiser is what is left."""
  ends = [*(times[name] for name in PARTS[:-1]), times[STEP]]
  return {
    name: end - before for name, end, before in zip(PARTS, ends, [0 * ends[0], *ends[:-1]], strict=True)
  }


def flops(config, teacher, student, grid) -> dict[str, float]:
  """GFLOP an image, by part."""
  patches = grid[0] * grid[1]
  forward, frozen = operations.student_forward(student, grid), operations.teacher_forward(teacher)
  rounds = sum(m.get("max_rounds", 0) for m in config.morphers.values())
  morph = operations.morphing_and_loss(patches, teacher.width, config.loss.schedules, rounds)
  each = {"teacher": frozen, "student": 3 * forward, "step": frozen + 3 * forward, "morphing": morph}
  return {name: value / 1e9 for name, value in each.items()}


def measure(config, args) -> dict:
  """All numbers of one run."""
  step = Step(config)
  functions, teacher, student, grid = beginnings.of(config)
  dtype, size = config.student.dtype, args.matmul
  calls = beginnings_on(step, functions)
  same = require_same(step, calls)
  once = config.copy_and_resolve_references()
  for morpher in once.morphers.values():
    if "drawn_per" in morpher:
      morpher.drawn_per = "step"
  calls |= {
    STEP: lambda i: step(),
    ALONE: morphing_alone(config, teacher, grid, args.batch),
    PER_STEP: morphing_alone(once, teacher, grid, args.batch),
    CEILING: ceiling(size, dtype),
  }
  times, first = measuring.interleaved(calls, args.repeats)
  work = flops(config, teacher, student, grid)
  peak = 2 * size**3 / times[CEILING]
  rate = work["step"] * 1e9 * args.batch / times[STEP]
  quartiles = lambda each: {name: measuring.quartiles(values) for name, values in each.items()}
  seconds = parts(times)
  return {
    "batch": args.batch,
    "dtype": dtype,
    "images_per_s": measuring.quartiles(args.batch / times[STEP]),
    "seconds": quartiles(times),
    "first_call_s": first,
    "parts_s": quartiles(seconds),
    "parts_share": quartiles({name: each / times[STEP] for name, each in seconds.items()}),
    "alone_share": quartiles({name: times[name] / times[STEP] for name in (ALONE, PER_STEP)}),
    "per_image_to_per_step": measuring.quartiles(1 + (times[ALONE] - times[PER_STEP]) / times[STEP]),
    "gflop_an_image": work,
    "gflop_by_xla": memory.flops_by_xla(step.lowered, step.compiled, args.batch),
    "ceiling_gflop_per_s": measuring.quartiles(peak / 1e9),
    "mfu": measuring.quartiles(rate / peak),
    "memory": memory.of(step.compiled),
    "checked": same,
    **({"real_input": with_real_input(config, step, max(args.repeats, 5))} if args.input == "real" else {}),
  }


def main():
  args, overrides = arguments()
  config = workload.config_from(args.config, overrides, args.dtype)
  config.batch_size = args.batch
  if args.input == "real":
    folder = args.data_dir or workload.photos(workload.temporary_folder(), 64)
    config.data.dataset = {"name": "folder", "data_dir": str(folder), "labels": False}
    config.data.num_threads = args.threads
  record = measure(config, args) if args.repeats else {}
  record["plans"] = [memory.plan(args.config, overrides, batch, args.plan_dtype) for batch in args.plan]
  print(
    measuring.report(
      args.out, args.name, title="The train step", module="benchmarks.step", note=args.note,
      body=body(record, args.repeats), record=record,
    )
  )  # fmt: skip


def body(record, repeats: int) -> str:
  sections = []
  if repeats:
    sections = [summary(record, repeats), rows_of_parts(record)]
  if record["plans"]:
    sections.append(memory.markdown(record["plans"]))
  return "\n\n".join(sections)


def summary(record, repeats: int) -> str:
  show, plan = measuring.spread, record["memory"]
  rows = [
    ["images/s", show(record["images_per_s"])],
    ["share of the ceiling (MFU)", show(record["mfu"], ".1%")],
    [f"ceiling: {record['dtype']} matrix product, GFLOP/s", show(record["ceiling_gflop_per_s"], ".0f")],
    ["GFLOP an image: teacher and student", f"{record['gflop_an_image']['step']:.4g}"],
    ["GFLOP an image: morphing and loss", f"{record['gflop_an_image']['morphing']:.3g}"],
    *([f"GFLOP an image by XLA, {k}", f"{v:.4g}"] for k, v in record["gflop_by_xla"].items()),
    ["a schedule an image, to one a step", show(record["per_image_to_per_step"], ".4f")],
    *([f"memory: {name}, GiB", f"{value:.2f}"] for name, value in plan.items()),
  ]
  if real := record.get("real_input"):
    rows.append(["images/s with real input", show(real["images_per_s"])])
    rows.append(["of that, waiting for input", f"{real['input_wait']:.1%}"])
  intro = (
    f"Batch {record['batch']}, {record['dtype']}; median and quartiles of {repeats} interleaved rounds. The "
    f"beginnings' loss and gradient are the step's own (loss {record['checked']['loss']:.5f})."
  )
  return intro + "\n\n" + measuring.table(["whole step", "value"], rows)


def rows_of_parts(record) -> str:
  per_image = 1e3 / record["batch"]
  rows = []
  for name in PARTS:
    seconds = {k: v * per_image for k, v in record["parts_s"][name].items()}
    rows.append(
      [name, measuring.spread(seconds, ".1f"), measuring.spread(record["parts_share"][name], ".1%")]
    )
  for name in (ALONE, PER_STEP):
    seconds = {k: v * per_image for k, v in record["seconds"][name].items()}
    share = measuring.spread(record["alone_share"][name], ".2%")
    rows.append([f"{name}, timed alone with its gradient", measuring.spread(seconds, ".2f"), share])
  return measuring.table(["part, by differences", "ms an image", "of the step"], rows)


def arguments(argv=None):
  """The benchmark's own options, and what is left for the config."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--config", default="configs/vitb16.py")
  for name, default in (("batch", 8), ("repeats", 5), ("matmul", 0), ("threads", 2)):
    parser.add_argument(f"--{name}", type=int, default=default)
  parser.add_argument("--input", choices=("synthetic", "real"), default="synthetic")
  parser.add_argument("--data_dir", help="JPEGs for --input=real; by default some are made up")
  parser.add_argument("--dtype", default="auto", help="of the products; auto: float32 on a CPU")
  parser.add_argument("--plan", type=int, nargs="*", default=[], help="batches to compile for, only")
  parser.add_argument("--plan_dtype", default="bfloat16")
  parser.add_argument("--name", default="step", help="of the result's files")
  parser.add_argument("--note", default="", help="a sentence on the machine's state, for the table")
  parser.add_argument("--out", type=Path, default=Path("results"))
  args, overrides = parser.parse_known_args(argv)
  args.matmul = args.matmul or (2048 if jax.default_backend() == "cpu" else 8192)
  return args, overrides


if __name__ == "__main__":
  main()
