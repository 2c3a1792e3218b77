"""Four ways to compute the same matching, timed and held against float64: why morphing.py is as it is.

    python -m benchmarks.morphing --batch_size=32

product     every round compares the tokens anew and moves them by a one-hot product (morphing.py)
scatter     the same, moved by a segment sum
gram        one Gram matrix, computed once; its rows and columns merge
early_exit  product, stopping after the last round in which any image merges

For each: milliseconds a call (median, and the quartiles between which half the calls fall), with a schedule
for each image and with one for the batch; and in how many images the groups differ from float64's.
"""

import argparse
import platform
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from dtm_jax import morphing

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))
import oracle_morphing as oracle


def product(live, num_merges):
  """One round of `morphing.bipartite_match`."""
  sim_FS = morphing._similarity(live.feature_NC[0::2], live.feature_NC[1::2])
  to_N, count = morphing._pair(sim_FS, live.count, num_merges, False)
  return morphing._merge(live, to_N, count, "size_weighted")


def scatter(live, num_merges):
  sim_FS = morphing._similarity(live.feature_NC[0::2], live.feature_NC[1::2])
  to_N, count = morphing._pair(sim_FS, live.count, num_merges, False)
  feature_NC = jax.ops.segment_sum(live.feature_NC, to_N, num_segments=to_N.size)
  return morphing.Live(feature_NC, to_N[live.slot_N], count)


def gram(live, num_merges):
  """`live.feature_NC` is the Gram matrix of the sums here."""
  gram_NN = live.feature_NC
  norm_N = jnp.sqrt(jnp.maximum(jnp.diagonal(gram_NN), 1e-30))
  sim_FS = gram_NN[0::2, 1::2] / norm_N[0::2, None] / norm_N[None, 1::2]
  to_N, count = morphing._pair(sim_FS, live.count, num_merges, False)
  into_NN = jax.nn.one_hot(to_N, to_N.size, axis=0)
  gram_NN = jnp.einsum("ij,jk,lk->il", into_NN, gram_NN, into_NN, precision=morphing.HIGHEST)
  return morphing.Live(gram_NN, to_N[live.slot_N], count)


def matcher(round_, *, early_exit=False):
  """match(target_BNC, merges_BK) -> label_BN, jitted."""

  def match(target_BNC, merges_BK):
    batch_size, num_tokens, _ = target_BNC.shape
    if round_ is gram:
      target_BNC = jnp.einsum("bnc,bmc->bnm", target_BNC, target_BNC, precision=morphing.HIGHEST)
    slot_BN = jnp.broadcast_to(jnp.arange(num_tokens), (batch_size, num_tokens))
    live = morphing.Live(target_BNC, slot_BN, jnp.full(batch_size, num_tokens))
    merges_KB = merges_BK.T
    if early_exit:
      body = lambda p, live: jax.vmap(round_)(live, merges_KB[p])
      rounds = jnp.max(jnp.where(merges_KB > 0, 1 + jnp.arange(len(merges_KB))[:, None], 0))
      live = jax.lax.fori_loop(0, rounds, body, live)
    else:
      live, _ = jax.lax.scan(lambda live, r_B: (jax.vmap(round_)(live, r_B), None), live, merges_KB)
    return morphing.canonical_labels(live.slot_N)

  return jax.jit(match)


VARIANTS = {
  "product": matcher(product),
  "scatter": matcher(scatter),
  "gram": matcher(gram),
  "early_exit": matcher(product, early_exit=True),
}


def tokens(batch_size, num_tokens, width, common):
  """Tokens like CLIP's: a direction common to all, a few objects, noise."""
  rng = np.random.default_rng(0)
  objects = rng.normal(size=(batch_size, 12, width))[:, rng.integers(0, 12, num_tokens)]
  noise = rng.normal(size=(batch_size, num_tokens, width))
  return (common * rng.normal(size=width) + objects + noise).astype(np.float32)


def milliseconds(match, target_BNC, schedules, repeats):
  match(target_BNC, schedules[0]).block_until_ready()
  times = []
  for i in range(repeats):
    start = time.perf_counter()
    match(target_BNC, schedules[i % len(schedules)]).block_until_ready()
    times.append(1e3 * (time.perf_counter() - start))
  low, median, high = np.percentile(times, (25, 50, 75))
  return f"{median:7.1f} ({low:.0f}-{high:.0f})"


def main():
  parser = argparse.ArgumentParser()
  for name, default in (("batch_size", 32), ("num_tokens", 196), ("width", 512), ("max_rounds", 14)):
    parser.add_argument(f"--{name}", type=int, default=default)
  parser.add_argument("--repeats", type=int, default=16)
  parser.add_argument("--common", type=float, default=1.5, help="10 makes all tokens nearly parallel")
  args = parser.parse_args()
  print(f"{platform.machine()} {jax.devices()[0].device_kind}, Python {platform.python_version()}", end=", ")
  print(f"JAX {jax.__version__}; {vars(args)}")

  target_BNC = tokens(args.batch_size, args.num_tokens, args.width, args.common)
  draw = lambda key: morphing.paper_schedule(key, args.num_tokens, 1, args.max_rounds)
  per_image = [jax.vmap(draw)(jax.random.split(jax.random.key(i), args.batch_size)) for i in range(8)]
  per_step = [jnp.broadcast_to(merges_BK[:1], merges_BK.shape) for merges_BK in per_image]
  exact = [oracle.match(v, merges)[0] for v, merges in zip(target_BNC, np.asarray(per_image[0]), strict=True)]

  print(f"{'':12}{'per image':>20}{'per step':>20}{'differ from float64':>24}")
  for name, match in VARIANTS.items():
    differ = np.any(np.asarray(match(target_BNC, per_image[0])) != np.stack(exact), axis=1).sum()
    each = [milliseconds(match, target_BNC, schedules, args.repeats) for schedules in (per_image, per_step)]
    print(f"{name:12}{each[0]:>20}{each[1]:>20}{differ:>16} of {args.batch_size}")


if __name__ == "__main__":
  main()
