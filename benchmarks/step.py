"""Measure the whole train step: throughput, the time of each part, MFU and memory.

    python -m benchmarks.step --config=configs/vitb16.py --batch=8 --repeats=5 [--config.student.variant=S]
    python -m benchmarks.step --input=real --data_dir=FOLDER_OF_JPEGS --plan=256

The benchmark times the step of the config, jitted as in training. If the CLIP weights are not on this
machine, the teacher gets random weights. Each part's time is the difference between two prefixes of the step
(prefixes.py). The longest prefix must compute the same loss and gradient as the step. The ceiling for MFU is
the rate of a large square matrix product. All of these are timed in the same rounds. `--plan` compiles the
step for other batch sizes without running it, and reports the memory that the compiler plans.
"""

import time

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import measuring, memory, operations, photos, prefixes, workload
from benchmarks.prefixes import PARTS
from dtm_jax import plugins
from dtm_jax.tasks.pretrain import Pretraining
from dtm_jax.training import sharded_step
from dtm_jax.training.feeds import open_feed

STEP, ALONE, PER_STEP = "whole step", "morphing + loss", "morphing + loss, a schedule a step"
CEILING = "matrix product"


def parse(argv=None):
  """Return the options of the benchmark and the remaining arguments, which override the config."""
  parser = measuring.make_parser(
    __doc__, "step", config="configs/vitb16.py", batch=8, repeats=5, matmul=0, threads=2
  )
  parser.add_argument("--input", choices=("synthetic", "real"), default="synthetic")
  parser.add_argument("--data_dir", help="folder of JPEGs for --input=real; default: generated photos")
  parser.add_argument("--plan", type=int, nargs="*", default=[], help="batch sizes to compile, not run")
  parser.add_argument("--plan_dtype", default="bfloat16")
  args, overrides = parser.parse_known_args(argv)
  args.matmul = args.matmul or (2048 if jax.default_backend() == "cpu" else 8192)
  return args, overrides


class Step:
  """Holds the compiled train step of the config and its state. Each call makes one step.

  Attributes:
    compile_seconds: the time of tracing, lowering and compiling the step.
  """

  def __init__(self, config):
    self.task, self.mesh = workload.task_of(config), workload.mesh_of(config)
    self.state, self.frozen = workload.state_and_frozen(config, self.task, self.mesh)
    self.batch = workload.synthetic_batch(config, self.mesh)
    self.key = jax.random.key(config.seed)
    self.lowered, self.compiled, self.compile_seconds = self._compile()

  def _compile(self):
    start = time.perf_counter()
    step = sharded_step.jit_train_step(self.task, self.state, self.frozen, self.mesh)
    lowered = step.lower(self.state, self.frozen, self.batch, self.key)
    return lowered, lowered.compile(), time.perf_counter() - start

  def compile_again(self) -> float | None:
    """Return the seconds of a second compilation, from the persistent cache; None without such a cache."""
    if not jax.config.jax_compilation_cache_dir:
      return None
    jax.clear_caches()
    return self._compile()[2]

  def __call__(self, batch=None):
    self.state, measurements = self.compiled(self.state, self.frozen, batch or self.batch, self.key)
    return measurements


def prefixes_on(step: Step, task: Pretraining):
  """Return a function round -> result for every prefix.

  The functions use a copy of the parameters, because the step donates its state.
  """
  params = jax.tree.map(jnp.copy, step.state["params"])
  bind = lambda function: lambda i: function(params, jnp.int32(i), step.frozen, step.batch, step.key)
  return {name: bind(jax.jit(function)) for name, function in prefixes.prefix_functions(task).items()}


def require_same(step: Step, calls) -> dict[str, float]:
  """Return the loss and the gradient norm, after a check that the longest prefix and the step agree on both.

  Raises:
    AssertionError: they do not agree.
  """
  loss, norm = calls["backward"](int(step.state["step"]))
  own = step()
  np.testing.assert_allclose(float(loss), float(own["loss"]), rtol=1e-5)
  np.testing.assert_allclose(float(norm), float(own["grad_norm"]), rtol=1e-3)
  return {"loss": float(own["loss"]), "grad_norm": float(own["grad_norm"])}


def morphing_alone(task: Pretraining, batch_size: int):
  """Return a function round -> the loss and its gradient with respect to random student tokens."""
  shape = (batch_size, task.grid[0] * task.grid[1], task.teacher.width)
  target, prediction = jax.random.normal(jax.random.key(0), (2, *shape))
  image = jnp.zeros((batch_size, *(task.image_size,) * 2, 3))
  step = jax.jit(jax.value_and_grad(prefixes.morph_and_loss(task), argnums=1))
  return lambda i: step(jax.random.key(i), prediction, target, image)


def ceiling(size: int, dtype: str):
  """Return a function round -> the product of two square matrices of this size."""
  left, right = jax.random.normal(jax.random.key(0), (2, size, size)).astype(dtype)
  product = jax.jit(jnp.matmul)
  return lambda i: product(left, right)


def with_real_input(config, step: Step, steps: int) -> dict:
  """Time the step with the input pipeline of training, without the first batches, which were prefetched."""
  dataset = plugins.build("datasets", config.data.dataset, split=config.data.split)
  batches = open_feed(config, dataset, step.mesh).batches(0)
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
  """Return the seconds of each part in each round: each prefix minus the one before it."""
  ends = [*(times[name] for name in PARTS[:-1]), times[STEP]]
  return {
    name: end - before for name, end, before in zip(PARTS, ends, [0 * ends[0], *ends[:-1]], strict=True)
  }


def flops(config, task: Pretraining) -> dict[str, float]:
  """Return the GFLOP per image of every part."""
  patches = task.grid[0] * task.grid[1]
  forward, frozen = (
    operations.student_forward(task.student, task.grid),
    operations.teacher_forward(task.teacher),
  )
  rounds = sum(m.get("max_rounds", 0) for m in config.morphers.values())
  morph = operations.morphing_and_loss(patches, task.teacher.width, task.num_schedules, rounds)
  each = {"teacher": frozen, "student": 3 * forward, "step": frozen + 3 * forward, "morphing": morph}
  return {name: value / 1e9 for name, value in each.items()}


def with_one_draw_per_step(config):
  """Return a copy of the config in which every morpher draws one schedule for the whole batch."""
  config = config.copy_and_resolve_references()
  for morpher in config.morphers.values():
    if "drawn_per" in morpher:
      morpher.drawn_per = "step"
  return config


def measure(config, args) -> dict:
  """Return all numbers of one run."""
  step = Step(config)
  dtype, size = config.student.dtype, args.matmul
  calls = prefixes_on(step, step.task)
  same = require_same(step, calls)
  calls |= {
    STEP: lambda i: step(),
    ALONE: morphing_alone(step.task, args.batch),
    PER_STEP: morphing_alone(workload.task_of(with_one_draw_per_step(config)), args.batch),
    CEILING: ceiling(size, dtype),
  }
  times, first = measuring.interleaved(calls, args.repeats)
  work = flops(config, step.task)
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
    "memory": memory.memory_by_kind(step.compiled),
    "checked": same,
    **({"real_input": with_real_input(config, step, max(args.repeats, 5))} if args.input == "real" else {}),
  }


def collect(args, overrides) -> dict:
  """Return the numbers of the step and the plans of `--plan`. With --repeats=0, return only the plans."""
  config = workload.config_from(args.config, overrides, args.dtype)
  config.batch_size = args.batch
  if args.input == "real":
    folder = args.data_dir
    if folder is None:
      folder = workload.temporary_folder()
      photos.write_photos(folder, 64)
    config.data.dataset = {"name": "folder", "data_dir": str(folder), "labels": False}
    config.data.num_threads = args.threads
  record = measure(config, args) if args.repeats else {}
  plans = [memory.plan(args.config, overrides, batch, args.plan_dtype) for batch in args.plan]
  return record | {"plans": plans}


def main(argv=None):
  args, overrides = parse(argv)
  record = collect(args, overrides)
  print(
    measuring.report(
      args.out, args.name, title="The train step", module="benchmarks.step", note=args.note,
      body=markdown(record, args.repeats), record=record,
    )
  )  # fmt: skip


def markdown(record, repeats: int) -> str:
  """Return the tables of the step, of its parts, and of the plans."""
  sections = []
  if repeats:
    sections = [summary(record, repeats), rows_of_parts(record)]
  if record["plans"]:
    sections.append(memory.markdown(record["plans"]))
  return "\n\n".join(sections)


def summary(record, repeats: int) -> str:
  """Return the table of the whole step."""
  show, plan = measuring.spread, record["memory"]
  rows = [
    ["images/s", show(record["images_per_s"])],
    ["share of the ceiling (MFU)", show(record["mfu"], ".1%")],
    [f"ceiling: {record['dtype']} matrix product, GFLOP/s", show(record["ceiling_gflop_per_s"], ".0f")],
    ["GFLOP an image: teacher and student", f"{record['gflop_an_image']['step']:.4g}"],
    ["GFLOP an image: morphing and loss", f"{record['gflop_an_image']['morphing']:.3g}"],
    *([f"GFLOP an image by XLA, {k}", f"{v:.4g}"] for k, v in record["gflop_by_xla"].items()),
    ["step time, one schedule per image / per step", show(record["per_image_to_per_step"], ".4f")],
    *([f"memory: {name}, GiB", f"{value:.2f}"] for name, value in plan.items()),
  ]
  if real := record.get("real_input"):
    rows.append(["images/s with real input", show(real["images_per_s"])])
    rows.append(["share of the time spent waiting for real input", f"{real['input_wait']:.1%}"])
  intro = (
    f"Batch {record['batch']}, {record['dtype']}; median and quartiles of {repeats} interleaved rounds. The "
    f"longest prefix and the step have the same loss ({record['checked']['loss']:.5f}) and gradient norm."
  )
  return intro + "\n\n" + measuring.table(["whole step", "value"], rows)


def rows_of_parts(record) -> str:
  """Return the table of the parts, in milliseconds per image."""
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


if __name__ == "__main__":
  main()
