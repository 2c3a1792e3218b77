"""Time the implementations of attention at the size of a student: forward, and forward with backward.

    python -m benchmarks.attention --batch=256 --tokens=197 --heads=12 --repeats=15

Each call is one layer with heads of width 64 and a bias that all images share, and the backward pass has the
gradient of the bias. "differs" is the largest difference of output or gradient from "xla" in float32,
relative to the largest value. An implementation that this device lacks gets a line with its error.
"""

import jax
import jax.numpy as jnp

from benchmarks import measuring
from dtm_jax.models import attention

WIDTH = 64
PASSES = ("forward", "forward and backward")


def parse(argv=None):
  parser = measuring.make_parser(__doc__, "attention", batch=256, tokens=197, heads=12, repeats=15)
  parser.add_argument("--dtype", default="bfloat16")
  return parser.parse_args(argv)


def inputs(args, dtype):
  """Return random queries, keys, values [B, T, A, d] and a bias [1, A, T, T]."""
  keys = jax.random.split(jax.random.key(0), 4)
  shape = (args.batch, args.tokens, args.heads, WIDTH)
  query, key, value = (jax.random.normal(key, shape).astype(dtype) for key in keys[:3])
  return query, key, value, jax.random.normal(keys[3], (1, args.heads, args.tokens, args.tokens))


def passes(name):
  """Return the jitted forward pass of an implementation, and its forward and backward pass."""
  forward = lambda *arrays: attention.attend(*arrays, implementation=name)
  loss = lambda *arrays: jnp.sum(jnp.sin(forward(*arrays).astype(jnp.float32)))
  both = jax.value_and_grad(loss, argnums=(0, 1, 2, 3))
  return {PASSES[0]: jax.jit(forward), PASSES[1]: jax.jit(both)}


def difference(found, expected) -> float:
  """Return the largest difference of two trees of arrays, relative to the largest value of each array."""
  relative = lambda x, y: jnp.max(jnp.abs(x.astype(jnp.float32) - y)) / jnp.max(jnp.abs(y))
  return max(float(each) for each in jax.tree.leaves(jax.tree.map(relative, found, expected)))


def collect(args) -> dict:
  """Return milliseconds, differences and errors by implementation."""
  arrays = inputs(args, args.dtype)
  exact = {name: call(*inputs(args, "float32")) for name, call in passes("xla").items()}
  rows, calls = {}, {}
  for name in attention.IMPLEMENTATIONS:
    rows[name] = {}
    for which, call in passes(name).items():
      print(f"{name}, {which}", flush=True)
      try:
        rows[name][f"{which}, differs"] = difference(call(*arrays), exact[which])
      except Exception as error:  # each implementation fails in its own way where it cannot run
        rows[name]["error"] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
        break
      calls[name, which] = lambda i, call=call: call(*arrays)
  times, _ = measuring.interleaved(calls, args.repeats)
  for (name, which), seconds in times.items():
    rows[name][which] = measuring.quartiles(1e3 * seconds)
  return rows


def markdown(rows, args) -> str:
  lines = []
  for name, row in rows.items():
    cells = [measuring.spread(row.get(which)) for which in PASSES]
    differs = [f"{row[key]:.1e}" if (key := f"{which}, differs") in row else "-" for which in PASSES]
    lines.append([name, *cells, *differs, row.get("error", "")])
  header = [f"{which}, ms" for which in PASSES] + [f"{which}, differs" for which in PASSES]
  about = (
    f"One layer: {args.batch} images, {args.tokens} tokens, {args.heads} heads of width {WIDTH}, "
    f"{args.dtype}; median and quartiles of {args.repeats} interleaved rounds."
  )
  return about + "\n\n" + measuring.table(["implementation", *header, ""], lines)


def main(argv=None):
  args = parse(argv)
  rows = collect(args)
  print(measuring.report(
    args.out, args.name, title="What attention costs", module="benchmarks.attention", note=args.note,
    body=markdown(rows, args), record={"implementations": rows},
  ))  # fmt: skip


if __name__ == "__main__":
  main()
