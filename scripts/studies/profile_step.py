"""Profile the train step: milliseconds by part of the model and by kind of kernel.

    python scripts/profile_step.py --config=configs/vitb16.py --config.batch_size=256 --steps=3
    python scripts/profile_step.py --config=configs/debug.py --config.batch_size=8 --json=profile.json

The step is the one of `dtm_jax.main`, with random values in place of parameters, teacher and images. If the
CLIP of the config is not a local folder, the teacher has the shapes of ViT-B/16. The profiler of JAX times
every kernel. The table adds up their times: the rows are the boxes of the step, which are named scopes in the
code, and the columns are kinds of kernels. "attention" is attention without its linear maps, and
"elementwise" is everything that no other column names, such as norms, activations and sums.

On a CPU, kernels run on several threads at once, so their times add up to more than the time of the step. On
a GPU, `XLA_FLAGS=--xla_gpu_enable_command_buffer=` makes XLA start every kernel by itself, with its name.
"""

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from dtm_jax.arrays import PyTree
from dtm_jax.errors import OptionError
from dtm_jax.options.command_line import parse_with_config, run_script, script_parser, start_above
from dtm_jax.storage import paths
from dtm_jax.training import mesh as meshes

if not __package__:
  start_above(__file__)

from .communication import compile_step
from .kernel_times import KINDS, Kernel, kernels

SLOWEST = 15
"""The number of kernels in the second table."""


def main(argv: Sequence[str] | None = None) -> None:
  """Run the command line of the module's docstring."""
  parser = script_parser(__doc__)
  add = parser.add_argument
  add("--steps", type=int, default=3, help="number of steps to profile (default: 3)")
  add("--trace", help="folder to keep the profile in, for xprof or Perfetto (default: deleted)")
  add("--json", help="file to write the numbers to")
  config, args = parse_with_config(parser, argv)
  if args.steps < 1:
    raise OptionError(f"--steps={args.steps} must be at least 1.")
  record = profile(config, args.steps, args.trace)
  print(markdown(record))
  if args.json:
    paths.resolve(args.json).write_text(json.dumps(record, indent=2) + "\n")


def profile(config: ConfigDict, steps: int, folder: str | None = None) -> dict:
  """Profile `steps` training steps of the config.

  Args:
    folder: where the profile stays; None deletes it.

  Returns:
    "ms", the milliseconds a step by part and kind; "wall_ms", the time of a step by the clock; and "slowest",
    the kernels that take most time.
  """
  mesh = meshes.make_mesh(config.mesh.data, config.mesh.fsdp)
  compiled, state, frozen = compile_step(config, mesh)
  state, frozen = random_values(state), random_values(frozen)
  batch = random_batch(config, mesh)
  key = jax.random.key(config.seed)
  for _ in range(2):
    state, _ = jax.block_until_ready(compiled(state, frozen, batch, key))
  with TemporaryDirectory(prefix="dtm_jax_profile_") as temporary:
    trace = Path(folder or temporary)
    start = time.perf_counter()
    with jax.profiler.trace(str(trace)):
      for _ in range(steps):
        state, _ = jax.block_until_ready(compiled(state, frozen, batch, key))
      wall = time.perf_counter() - start
    found = kernels(trace, compiled.as_text() or "")
  per_step = lambda each: each.nanoseconds / 1e6 / steps
  return {
    "device": jax.devices()[0].device_kind,
    "batch": config.batch_size,
    "steps": steps,
    "wall_ms": 1e3 * wall / steps,
    "total_ms": sum(map(per_step, found)),
    "ms": by_part_and_kind(found, per_step),
    "slowest": [
      {"ms": per_step(each), "part": each.part, "kind": each.kind, "kernel": each.name}
      for each in found[:SLOWEST]
    ],
  }


def random_values(shapes: PyTree) -> PyTree:
  """Return arrays of these shapes: small random numbers, or zeros for whole numbers."""
  rng = np.random.default_rng(0)

  def draw(x: jax.ShapeDtypeStruct) -> jax.Array:
    floating = jnp.issubdtype(x.dtype, jnp.floating)
    values = 0.03 * np.abs(rng.standard_normal(x.shape, np.float32)) if floating else np.zeros(x.shape)
    return jax.device_put(values.astype(x.dtype), x.sharding)

  return jax.tree.map(draw, shapes)


def random_batch(config: ConfigDict, mesh: jax.sharding.Mesh) -> PyTree:
  """Return the batch that `compile_step` expects."""
  size, rows = config.data.image_size, config.batch_size
  image = np.random.default_rng(1).integers(0, 256, (rows, size, size, 3), np.uint8)
  numbers = np.zeros(rows)
  batch = {"image": image, "label": numbers.astype(np.int32), "index": numbers.astype(jnp.result_type(int))}
  return meshes.to_device(batch, mesh)


def by_part_and_kind(
  found: Sequence[Kernel], per_step: Callable[[Kernel], float]
) -> dict[str, dict[str, float]]:
  """Return the milliseconds of each part by kind, the slowest part first."""
  parts: dict[str, dict[str, float]] = {}
  for each in found:
    kinds = parts.setdefault(each.part, {})
    kinds[each.kind] = kinds.get(each.kind, 0.0) + per_step(each)
  return dict(sorted(parts.items(), key=lambda item: -sum(item[1].values())))


def markdown(record: dict) -> str:
  """Return the two tables."""
  total = record["total_ms"]
  kinds = [kind for kind in KINDS if any(kind in row for row in record["ms"].values())]
  lines = [["part", *kinds, "sum", "share"]]
  for part, row in record["ms"].items():
    lines.append([part, *(_ms(row.get(kind)) for kind in kinds), *_sum(sum(row.values()), total)])
  columns = [sum(row.get(kind, 0.0) for row in record["ms"].values()) for kind in kinds]
  lines.append(["sum", *map(_ms, columns), *_sum(total, total)])
  slowest = [["kernel", "part", "kind", "ms"]]
  slowest += [[f"`{x['kernel'][:60]}`", x["part"], x["kind"], _ms(x["ms"])] for x in record["slowest"]]
  about = (
    f"{record['device']}, batch {record['batch']}: milliseconds a step, from {record['steps']} steps. By the "
    f"clock, a step took {record['wall_ms']:.1f} ms with the profiler on."
  )
  return "\n\n".join([about, _table(lines), "The slowest kernels:", _table(slowest)])


def _ms(value: float | None) -> str:
  return "" if value is None else f"{value:.2f}"


def _sum(value: float, total: float) -> list[str]:
  return [f"{value:.2f}", f"{value / total:.1%}" if total else ""]


def _table(lines: Sequence[Sequence[str]]) -> str:
  header, *rows = ["| " + " | ".join(line) + " |" for line in lines]
  return "\n".join([header, "|---|" + "---:|" * (len(lines[0]) - 1), *rows])


if __name__ == "__main__":
  run_script(main)
