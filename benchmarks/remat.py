"""Measure what each `student.remat` keeps for the backward pass and what it costs to compute the rest again.

    python -m benchmarks.remat --config=configs/vitb16.py --batch=2 --repeats=5 [--config.student.variant=S]

The bytes follow from the shapes at `--plan` images in `--plan_dtype` and are the same on any device. The
times are those of loss and gradient here (teacher, student, morphing; no optimiser), in interleaved rounds.
"""

import jax
import jax.numpy as jnp

from benchmarks import measuring, memory, prefixes, workload
from dtm_jax.models.vit import model as vit


def parse(argv=None):
  """Return the options of the benchmark and the remaining arguments, which override the config."""
  parser = measuring.make_parser(__doc__, "remat", config="configs/vitb16.py", batch=2, repeats=5, plan=256)
  parser.add_argument("--plan_dtype", default="bfloat16")
  return parser.parse_known_args(argv)


def gradient(config):
  """Return a function round -> (loss, norm of the gradient) of the config's step."""
  task, mesh, key = workload.task_of(config), workload.mesh_of(config), jax.random.key(config.seed)
  state, frozen = workload.state_and_frozen(config, task, mesh)
  batch = workload.synthetic_batch(config, mesh)
  function = jax.jit(prefixes.prefix_functions(task)["backward"])
  return lambda i: function(state["params"], jnp.int32(i), frozen, batch, key)


def collect(args, overrides) -> dict:
  """Return bytes and times of every `student.remat`, by name."""

  def config_of(remat: str, batch_size: int, dtype: str):
    config = workload.config_from(args.config, overrides, dtype)
    config.student.remat, config.batch_size = remat, batch_size
    return config

  kept = {name: memory.kept_for_backward(config_of(name, args.plan, args.plan_dtype)) for name in vit.REMATS}
  calls = {name: gradient(config_of(name, args.batch, args.dtype)) for name in vit.REMATS}
  times, _ = measuring.interleaved(calls, args.repeats)
  return {
    name: {
      "kept_gib": kept[name],
      "seconds": measuring.quartiles(times[name]),
      "to_none": measuring.quartiles(times[name] / times["none"]),
    }
    for name in vit.REMATS
  }


def markdown(args, rows) -> str:
  """Return a table with one row per `student.remat`."""
  header = ["`student.remat`", f"GiB kept, batch {args.plan}, {args.plan_dtype}", "s", "time to none"]
  spread = measuring.spread
  cells = [
    [name, f"{row['kept_gib']:.1f}", spread(row["seconds"], ".2f"), spread(row["to_none"])]
    for name, row in rows.items()
  ]
  return f"Loss and gradient, batch {args.batch}.\n\n{measuring.table(header, cells)}"


def main(argv=None):
  args, overrides = parse(argv)
  rows = collect(args, overrides)
  print(measuring.report(
    args.out, args.name, title="What remat keeps and costs", module="benchmarks.remat", note=args.note,
    body=markdown(args, rows), record={"batch": args.batch, "remat": rows},
  ))  # fmt: skip


if __name__ == "__main__":
  main()
