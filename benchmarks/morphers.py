"""Time every morpher, and compare it with bipartite matching and with the student's step.

    python -m benchmarks.morphers --batch=32 --student

This times every module of morphers/ at its defaults, and a few other options, on the same tokens and images.
The repeats are interleaved (benchmarks/measuring.py), and a ratio compares two times of the same round. The
tables are written to --out.
"""

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import measuring
from dtm_jax import morphing, plugins
from dtm_jax.models.vit import model as vit

MORE = {
  "bipartite, released": dict(name="bipartite", schedule="released", drawn_per="step", split="alternate"),
  "kmeans, random init": dict(name="kmeans", init="random"),
  "kmeans, at most 49 groups": dict(name="kmeans", max_groups=49),
  "kmedoids, random init": dict(name="kmedoids", init="random"),
  "kmedoids, at most 49 groups": dict(name="kmedoids", max_groups=49),
  "superpixel, at most 49 groups": dict(name="superpixel", max_groups=49),
}
YARDSTICK = "bipartite"
STUDENT = "ViT-B/16 student, forward and backward"


def tokens(batch_size, num_tokens, width, common, seed=0):
  """Make tokens like CLIP's: a direction that all share, a few objects, and noise."""
  rng = np.random.default_rng(seed)
  objects = rng.normal(size=(batch_size, 12, width))[:, rng.integers(0, 12, num_tokens)]
  noise = rng.normal(size=(batch_size, num_tokens, width))
  return (common * rng.normal(size=width) + objects + noise).astype(np.float32)


def images(batch_size, grid, patch=16):
  """Make images of smooth colours with noise, RGB in [0, 1], of `grid` by `grid` patches."""
  rng = np.random.default_rng(0)
  coarse = jnp.asarray(rng.random((batch_size, 4, 4, 3)), jnp.float32)
  smooth = jax.image.resize(coarse, (batch_size, grid * patch, grid * patch, 3), "cubic")
  return jnp.clip(smooth + 0.05 * rng.standard_normal(smooth.shape, np.float32), 0.0, 1.0)


def student_step(batch_size, image_BHW3, width):
  """Return a call that computes loss and gradients of a ViT-B/16 on the first `batch_size` images."""
  model = vit.build("B", out_dim=width)
  params = vit.init(model, jax.random.key(0), image_BHW3.shape[1])
  image_BHW3 = image_BHW3[:batch_size]
  num_tokens = (image_BHW3.shape[1] // model.patch_size) ** 2

  @jax.jit
  def step(key):
    mask_BN = jax.random.bernoulli(key, 0.4, (batch_size, num_tokens))
    target_BNC = jax.random.normal(key, (batch_size, num_tokens, width))
    label_SBN = jnp.zeros((1, batch_size, num_tokens), jnp.int32)

    def loss(params):
      outputs = model.apply({"params": params}, image_BHW3, mask_BN, train=True, rngs={"drop_path": key})
      return morphing.dtm_loss(outputs["prediction"], target_BNC, label_SBN)

    return jax.value_and_grad(loss)(params)

  return lambda i: step(jax.random.key(i))


def summary(times, first, args):
  """Return milliseconds per image, ratio to bipartite and share of the student's step for each morpher."""
  rows = {}
  for name, each in times.items():
    batch_size = args.student_batch if name == STUDENT else args.batch
    rows[name] = {
      "ms_per_image": measuring.quartiles(1e3 * each / batch_size),
      "ratio_to_bipartite": measuring.quartiles(each / batch_size / (times[YARDSTICK] / args.batch)),
      "first_call_s": round(first[name], 2),
    }
    if STUDENT in times:
      share = each / batch_size / (times[STUDENT] / args.student_batch)
      rows[name]["share_of_student"] = measuring.quartiles(share)
  return rows


def markdown(rows, rounds):
  header = ["morpher", "ms an image", "to bipartite", "of the student", "first call, s"]
  return (
    f"One label map a call; median and, in brackets, the quartiles of {rounds} interleaved rounds.\n\n"
    + measuring.table(header, [[name, *_cells(row)] for name, row in rows.items()])
  )


def _cells(row):
  ms, ratio, share = (row.get(name) for name in ("ms_per_image", "ratio_to_bipartite", "share_of_student"))
  percent = f"{share['median']:.2%}" if share else "-"
  return [measuring.spread(ms), measuring.spread(ratio), percent, f"{row['first_call_s']:.1f}"]


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  for name, default in (("batch", 8), ("tokens", 196), ("width", 512), ("rounds", 15), ("student_batch", 2)):
    parser.add_argument(f"--{name}", type=int, default=default)
  parser.add_argument("--student", action="store_true", help="also time a ViT-B/16")
  parser.add_argument("--note", default="", help="a sentence on the machine's state, for the table")
  parser.add_argument("--out", type=Path, default=Path("results"))
  args = parser.parse_args()

  target_BNC = jnp.asarray(tokens(args.batch, args.tokens, args.width, common=1.5))
  image_BHW3 = images(args.batch, round(args.tokens**0.5))
  options = {name: {"name": name} for name in plugins.available("morphers")} | MORE
  calls = {
    name: _call(plugins.build("morphers", each), target_BNC, image_BHW3) for name, each in options.items()
  }
  calls = dict(sorted(calls.items(), key=lambda item: not item[0].startswith(YARDSTICK)))
  if args.student:
    calls[STUDENT] = student_step(args.student_batch, image_BHW3, args.width)

  rows = summary(*measuring.interleaved(calls, args.rounds), args)
  sizes = {name: value for name, value in vars(args).items() if name not in ("out", "note")}
  print(
    measuring.report(
      args.out, "morphers", title="What a morpher costs", module="benchmarks.morphers", note=args.note,
      body=markdown(rows, args.rounds), record={**sizes, "morphers": rows},
    )
  )  # fmt: skip


def _call(assign, target_BNC, image_BHW3):
  jitted = jax.jit(assign)
  return lambda i: jitted(jax.random.key(i), target_BNC, image_BHW3)


if __name__ == "__main__":
  main()
