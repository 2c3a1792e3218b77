"""What each `student.remat` keeps for the backward pass, and what computing the rest again costs.

    python -m benchmarks.remat --config=configs/vitb16.py --batch=2 --repeats=5 [--config.student.variant=S]

Bytes are those of the traced shapes at `--plan` images in `--plan_dtype`, the same on any device. Times are
of the step's loss and gradient (teacher, student, morphing; no optimiser) here, in interleaved rounds.
"""

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp

from benchmarks import beginnings, measuring, memory, workload
from dtm_jax.models.vit import model as vit
from dtm_jax.training import mesh as meshes


def gradient(config):
  """round -> loss and the gradient's norm of the config's step."""
  task, mesh = workload.task_of(config), meshes.make_mesh(config.mesh.data, config.mesh.fsdp)
  state, frozen = workload.state_and_frozen(config, task, mesh)
  batch = workload.synthetic_batch(config, mesh)
  function = jax.jit(beginnings.of(config)[0]["backward"])
  return lambda i: function(state["params"], jnp.int32(i), frozen, batch)


def collect(args, overrides) -> dict:
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
  header = ["`student.remat`", f"GiB kept, batch {args.plan}, {args.plan_dtype}", "s", "time to none"]
  cells = [
    [
      name,
      f"{row['kept_gib']:.1f}",
      measuring.spread(row["seconds"], ".2f"),
      measuring.spread(row["to_none"]),
    ]
    for name, row in rows.items()
  ]
  return f"Loss and gradient, batch {args.batch}.\n\n{measuring.table(header, cells)}"


def parse(argv=None):
  """The benchmark's own options, and what is left for the config."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--config", default="configs/vitb16.py")
  for name, default in (("batch", 2), ("repeats", 5), ("plan", 256)):
    parser.add_argument(f"--{name}", type=int, default=default)
  parser.add_argument("--dtype", default="auto", help="of the products; auto: float32 on a CPU")
  parser.add_argument("--plan_dtype", default="bfloat16")
  parser.add_argument("--note", default="", help="a sentence on the machine's state, for the table")
  parser.add_argument("--out", type=Path, default=Path("results"))
  return parser.parse_known_args(argv)


def main(argv=None):
  args, overrides = parse(argv)
  rows = collect(args, overrides)
  print(measuring.report(
    args.out, "remat", title="What remat keeps and costs", module="benchmarks.remat", note=args.note,
    body=markdown(args, rows), record={"batch": args.batch, "remat": rows},
  ))  # fmt: skip


if __name__ == "__main__":
  main()
