"""What morphing costs beside the student's step, and the other ways to compute the same groups.

    python -m benchmarks.morphing --batch=8 --repeats=15 --step

morphing.py what is used: compare, the best counterpart by a maximum and a minimum, and on a CPU scatter
product     a round compares the tokens anew, ranks by sorting, moves by a one-hot product
compare     product, a rank being a count of comparisons
top_k       product, ranked by one sort and a scatter of its inverse
threshold   product, what merges chosen by the r-th value and not by rank; for a protected first token alone,
            since else the order of what is left decides the next split
scatter     product, moved by a segment sum; on a GPU it adds in any order
gram        one Gram matrix, computed once; its rows and columns merge
gram_compare  both
early_exit  product, stopping after the last round in which any image merges
kernel      matching_kernel.py, where there is a TPU

For each: milliseconds an image, with a schedule for each image and with one for the batch, and in how many
images the groups differ from float64's: the oracle of the tests. What differs by a similarity of less than
3e-7 is counted apart, for float32 may decide it either way. The split alternates.
"""

import argparse
import functools
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import measuring
from dtm_jax import morphing
from dtm_jax.matching import tpu_kernel as matching_kernel
from dtm_jax.morphers import bipartite

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))
import oracle_morphing as oracle

DECIDABLE = 3e-7
STUDENT, STEP = "student, forward and backward", "student and teacher"


def sort_rank(value_F, num_merges):
  return jnp.argsort(jnp.argsort(-value_F))


def compare_rank(value_F, num_merges):
  return morphing._rank(-value_F)


def top_k_rank(value_F, num_merges):
  _, from_F = jax.lax.top_k(value_F, value_F.size)
  return jnp.zeros_like(from_F).at[from_F].set(jnp.arange(value_F.size))


def threshold_rank(value_F, num_merges):
  """0 for the `num_merges` largest, of equals the first; behind all else for the others."""
  falling_F = jnp.sort(value_F, descending=True)
  threshold = falling_F[jnp.maximum(num_merges - 1, 0)]
  equal_F = value_F == threshold
  room = num_merges - jnp.sum(value_F > threshold)
  merges_F = (value_F > threshold) | (equal_F & (jnp.cumsum(equal_F) <= room))
  return jnp.where(merges_F & (num_merges > 0), 0, value_F.size)


def pair(sim_FS, count, num_merges, protect_first, rank):
  """`morphing._pair`, ranked by `rank`."""
  num_first, num_second = sim_FS.shape
  slot_N = jnp.arange(num_first + num_second)
  live_N = slot_N < count
  sim_FS = jnp.where(live_N[0::2, None] & live_N[None, 1::2], sim_FS, -jnp.inf)
  if protect_first:
    sim_FS = sim_FS.at[0].set(-jnp.inf)
  num_merges = jnp.minimum(num_merges, (count - protect_first) // 2)
  rank_F = rank(jnp.max(sim_FS, axis=1), num_merges)
  merges_F = rank_F < num_merges
  num_left = (count + 1) // 2 - num_merges
  left_F = jnp.cumsum(~merges_F) - 1 if protect_first else rank_F - num_merges
  to_F = jnp.where(merges_F, num_left + jnp.argmax(sim_FS, axis=1), left_F)
  to_S = num_left + jnp.arange(num_second)
  to_N = jnp.where(num_merges > 0, slot_N.at[0::2].set(to_F).at[1::2].set(to_S), slot_N)
  return jnp.where(live_N, to_N, slot_N.size), count - num_merges


def features_round(live, num_merges, protect_first, rank=sort_rank, add=morphing._product_at):
  sim_FS = morphing._similarity(live.feature_NC[0::2], live.feature_NC[1::2])
  to_N, count = pair(sim_FS, live.count, num_merges, protect_first, rank)
  feature_NC = add(to_N, live.feature_NC)
  return morphing.Live(feature_NC, to_N[live.slot_N], count)


def gram_round(live, num_merges, protect_first, rank=sort_rank):
  """`live.feature_NC` is the Gram matrix of the sums here."""
  gram_NN = live.feature_NC
  norm_N = jnp.sqrt(jnp.maximum(jnp.diagonal(gram_NN), 1e-30))
  sim_FS = gram_NN[0::2, 1::2] / norm_N[0::2, None] / norm_N[None, 1::2]
  to_N, count = pair(sim_FS, live.count, num_merges, protect_first, rank)
  into_NN = jax.nn.one_hot(to_N, to_N.size, axis=0)
  gram_NN = jnp.einsum("ij,jk,lk->il", into_NN, gram_NN, into_NN, precision=morphing.HIGHEST)
  return morphing.Live(gram_NN, to_N[live.slot_N], count)


def rounds_of(round_, *, gram=False, early_exit=False):
  """In the place of `morphing.match_rounds`; the scan is over batches, not the batch of scans."""

  def rounds(target_BNC, merges_BK, order_BKN, *, protect_first, merged_feature):
    batch_size, num_tokens, _ = target_BNC.shape
    each = jax.vmap(functools.partial(round_, protect_first=protect_first))
    if gram:
      target_BNC = jnp.einsum("bnc,bmc->bnm", target_BNC, target_BNC, precision=morphing.HIGHEST)
    slot_BN = jnp.broadcast_to(jnp.arange(num_tokens), (batch_size, num_tokens))
    live = morphing.Live(target_BNC, slot_BN, jnp.full(batch_size, num_tokens))
    if early_exit:
      last = jnp.max(jnp.where(merges_BK > 0, 1 + jnp.arange(merges_BK.shape[1])[None, :], 0))
      return jax.lax.fori_loop(0, last, lambda p, live: each(live, merges_BK[:, p]), live).slot_N
    return jax.lax.scan(lambda live, r_B: (each(live, r_B), None), live, merges_BK.T)[0].slot_N

  return rounds


def compare_by(rank):
  return rounds_of(functools.partial(features_round, rank=rank))


VARIANTS = {
  "morphing.py": morphing.match_rounds,
  "product": compare_by(sort_rank),
  "compare": compare_by(compare_rank),
  "top_k": compare_by(top_k_rank),
  "scatter": rounds_of(functools.partial(features_round, add=morphing._scatter_at)),
  "gram": rounds_of(gram_round, gram=True),
  "gram_compare": rounds_of(functools.partial(gram_round, rank=compare_rank), gram=True),
  "early_exit": rounds_of(features_round, early_exit=True),
}
PROTECTED = {
  "morphing.py, protected": morphing.match_rounds,
  "threshold, protected": compare_by(threshold_rank),
}


@functools.cache
def matcher(name):
  """match(target_BNC, merges_BK) -> label_BN, jitted."""
  protected = name in PROTECTED
  rounds = {**VARIANTS, **PROTECTED, "kernel": matching_kernel.kernel_rounds}[name]
  return jax.jit(functools.partial(morphing.bipartite_match, protect_first=protected, rounds=rounds))


def variants():
  kernel = ["kernel"] if jax.default_backend() == "tpu" else []
  return [*VARIANTS, *kernel, *PROTECTED]


def tokens(batch_size, num_tokens, width, common, seed=0):
  """Tokens like CLIP's: a direction common to all, a few objects, noise."""
  rng = np.random.default_rng(seed)
  objects = rng.normal(size=(batch_size, 12, width))[:, rng.integers(0, 12, num_tokens)]
  noise = rng.normal(size=(batch_size, num_tokens, width))
  return (common * rng.normal(size=width) + objects + noise).astype(np.float32)


def schedules(seed, batch_size, num_tokens, max_rounds):
  draw = lambda key: morphing.paper_schedule(key, num_tokens, 1, max_rounds)
  return jax.vmap(draw)(jax.random.split(jax.random.key(seed), batch_size))


def differences(names, num_draws, batch_size, num_tokens, width, max_rounds, common):
  """{name: images of all draws, those that float32 can decide, and how many of each differ from float64}."""
  counts = {name: dict(images=0, decidable=0, differ=0, decidable_differ=0) for name in names}
  for seed in range(num_draws):
    target_BNC = tokens(batch_size, num_tokens, width, common, seed)
    merges_BK = schedules(seed, batch_size, num_tokens, max_rounds)
    for protected in (False, True):
      here = [name for name in names if (name in PROTECTED) == protected]
      each = [oracle.match(v, r, protect_first=protected) for v, r in
              zip(target_BNC, np.asarray(merges_BK), strict=True)] if here else []  # fmt: skip
      for name in here:
        label_BN = np.asarray(matcher(name)(jnp.asarray(target_BNC), merges_BK))
        differ = np.any(label_BN != np.stack([label for label, _ in each]), axis=1)
        decidable = np.array([margin > DECIDABLE for _, margin in each])
        found = (batch_size, decidable.sum(), differ.sum(), (differ & decidable).sum())
        counts[name] = {key: counts[name][key] + int(n) for key, n in zip(counts[name], found, strict=True)}
  return counts


# Morphing with its loss, and the step -------------------------------------------------------------------


def loss_and_gradient(target_BNC, drawn_per, num_schedules=2):
  """i -> two schedules' groups, the loss and its gradient to the student's tokens."""
  assign = bipartite.build(drawn_per=drawn_per)

  @jax.jit
  def call(key, student_BNC):
    keys_S = jax.random.split(key, num_schedules)
    label_SBN = jax.vmap(assign, (0, None, None))(keys_S, target_BNC, jnp.zeros((len(target_BNC), 8, 8, 3)))
    return jax.value_and_grad(lambda u: morphing.dtm_loss(u, target_BNC, label_SBN))(student_BNC)

  student_BNC = 0.5 * target_BNC
  return lambda i: call(jax.random.key(i), student_BNC)


def network_calls(batch_size, num_tokens, width):
  """The student forward and backward, and with CLIP B/16's image tower before it; `batch_size` images."""
  from benchmarks.morphers import images, student_step
  from dtm_jax.models.clip import model as clip

  image_BHW3 = images(batch_size, round(num_tokens**0.5))
  student = student_step(batch_size, image_BHW3, width)
  config = clip.CLIPConfig(text=None)
  tower = clip.ImageTower(config.image, config.embed_dim)
  params = jax.jit(tower.init)(jax.random.key(0), image_BHW3)["params"]
  teacher = jax.jit(lambda image: tower.apply({"params": params}, image))
  return {STUDENT: student, STEP: lambda i: (teacher(image_BHW3), student(i))}


def collect(args):
  matcher.cache_clear()  # compilations are counted from here
  target_BNC = jnp.asarray(tokens(args.batch, args.tokens, args.width, args.common))
  drawn = [schedules(i, args.batch, args.tokens, args.max_rounds) for i in range(8)]
  one_for_all = [jnp.broadcast_to(merges_BK[:1], merges_BK.shape) for merges_BK in drawn]
  calls = {}
  for name in variants():
    match = matcher(name)
    calls[name, "image"] = lambda i, match=match: match(target_BNC, drawn[i % 8])
    calls[name, "step"] = lambda i, match=match: match(target_BNC, one_for_all[i % 8])
  for per in ("image", "step"):
    calls["morphing and loss", per] = loss_and_gradient(target_BNC, per)
  networks = network_calls(args.step_batch, args.tokens, args.width) if args.step else {}
  times, _ = measuring.interleaved(calls | networks, args.repeats)
  each = {
    name: seconds / (args.step_batch if name in networks else args.batch) for name, seconds in times.items()
  }

  differ = differences(
    variants(), args.draws, args.batch, args.tokens, args.width, args.max_rounds, args.common
  )
  rows = {}
  for name in [*variants(), "morphing and loss"]:
    per_image, per_step = each[name, "image"], each[name, "step"]
    rows[name] = {
      "ms_per_image": measuring.quartiles(1e3 * per_image),
      "to_product": measuring.quartiles(per_image / each["product", "image"]),
      "schedule_per_image_to_per_step": measuring.quartiles(per_image / per_step),
      "groups": differ.get(name),
      "compilations": matcher(name)._cache_size() if name in differ else None,
      **{f"share of {network}": measuring.quartiles(per_image / each[network]) for network in networks},
    }
  return {
    "variants": rows,
    "networks_ms_per_image": {n: measuring.quartiles(1e3 * each[n]) for n in networks},
  }


def markdown(record):
  rows = []
  for name, row in record["variants"].items():
    groups = row["groups"]
    cells = [
      measuring.spread(row[key], ".2f")
      for key in ("ms_per_image", "to_product", "schedule_per_image_to_per_step")
    ]
    differ = (
      "-" if groups is None else "{decidable_differ} of {decidable}, {differ} of {images}".format(**groups)
    )
    shares = [measuring.spread(row.get(f"share of {network}"), ".2%") for network in (STUDENT, STEP)]
    rows.append([name, *cells, differ, *shares])
  header = ["variant", "ms an image", "to product", "schedule per image / per step",
            "differ from float64: decidable, all", "of the student", "of student and teacher"]  # fmt: skip
  networks = [f"{name}: {measuring.spread(ms, '.0f')} ms an image." for name, ms in
              record["networks_ms_per_image"].items()]  # fmt: skip
  return "\n\n".join([
    "Medians and quartiles over interleaved rounds. Matching is of one schedule; `morphing and loss` is two "
    "schedules of the random split, the loss and its gradient to the student's tokens.",
    measuring.table(header, rows), *networks,
    "GPU and TPU: empty, not measured." if jax.default_backend() == "cpu" else "",
  ])  # fmt: skip


def parse(arguments=None):
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  defaults = dict(batch=8, tokens=196, width=512, max_rounds=14, repeats=15, draws=4, step_batch=2)
  for name, default in defaults.items():
    parser.add_argument(f"--{name}", type=int, default=default)
  parser.add_argument("--step", action="store_true", help="time ViT-B/16 and CLIP B/16 beside them")
  parser.add_argument("--common", type=float, default=1.5, help="10 makes all tokens nearly parallel")
  parser.add_argument("--note", default="", help="a sentence on the machine's state, for the table")
  parser.add_argument("--out", type=Path, default=Path("results"))
  return parser.parse_args(arguments)


def main(arguments=None):
  args = parse(arguments)
  record = collect(args)
  sizes = {name: value for name, value in vars(args).items() if name not in ("out", "note")}
  print(measuring.report(
    args.out, "morphing", title="What morphing costs", module="benchmarks.morphing", body=markdown(record),
    record=sizes | record, note=args.note,
  ))  # fmt: skip


if __name__ == "__main__":
  main()
