"""Time bipartite matching, with its loss, and compare it with the student's step.

    python -m benchmarks.morphing --batch=8 --repeats=15 --step

plain              the rounds in plain JAX, by features (matching/rounds.py)
plain, protected   the same with a protected first token
gram               the rounds in plain JAX, by one Gram matrix (matching/gram.py); not on a CPU
pallas             one kernel (matching/tpu_kernel.py, matching/gpu_kernel.py), on a TPU or a GPU
morphing and loss  two schedules of the random split, the loss and its gradient with respect to student
                   tokens; with "plain", and with each other way

For each, the table has milliseconds per image, with one schedule per image and with one per batch. It counts
the images with groups that differ from those of the tests' float64 oracle, among the first --checked of each
draw. An image is counted separately if two similarities that decide its groups differ by less than 3e-7,
because float32 can decide these either way. The split alternates. docs/method.md lists other ways to compute
the same groups that were measured and rejected.
"""

import argparse
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import measuring, morphers
from dtm_jax import morphing
from dtm_jax.matching.implementations import IMPLEMENTATIONS
from dtm_jax.models.clip import model as clip
from dtm_jax.morphers import bipartite
from tests import oracle_morphing as oracle

DECIDABLE = 3e-7
STUDENT, STEP = "student, forward and backward", "student and teacher"
WHOLE = "morphing and loss"
PLAIN, PROTECTED = "plain", "plain, protected"


def other_ways():
  """Return the names of the ways besides "plain" that are meant for this device."""
  return [] if jax.default_backend() == "cpu" else [name for name in IMPLEMENTATIONS if name != PLAIN]


def variants():
  """Return the names of the ways to compute the groups on this device."""
  return [PLAIN, PROTECTED, *other_ways()]


def wholes():
  """Return the names of the calls with loss and gradient, and the way that each uses."""
  return {WHOLE: PLAIN} | {f"{WHOLE}, {name}": name for name in other_ways()}


@functools.cache
def matcher(name):
  """Return match(target_BNC, merges_BK) -> label_BN, jitted."""
  way = IMPLEMENTATIONS[PLAIN if name == PROTECTED else name]
  return jax.jit(functools.partial(morphing.bipartite_match, protect_first=name == PROTECTED, rounds=way))


def schedules(seed, batch_size, num_tokens, max_rounds):
  """Draw merges_BK, one schedule of the paper for each image."""
  draw = lambda key: morphing.paper_schedule(key, num_tokens, 1, max_rounds)
  return jax.vmap(draw)(jax.random.split(jax.random.key(seed), batch_size))


def differences(name, num_draws, batch_size, num_tokens, width, max_rounds, common, checked=None):
  """Count images, those that float32 can decide, and how many of each have other groups than the oracle's."""
  counts = dict(images=0, decidable=0, differ=0, decidable_differ=0)
  for seed in range(num_draws):
    target_BNC = morphers.tokens(batch_size, num_tokens, width, common, seed)
    merges_BK = schedules(seed, batch_size, num_tokens, max_rounds)
    label_BN = np.asarray(matcher(name)(jnp.asarray(target_BNC), merges_BK))
    images = list(zip(target_BNC, np.asarray(merges_BK), label_BN, strict=True))[:checked]
    for target_NC, merges_K, found_N in images:
      label_N, margin = oracle.match(target_NC, merges_K, protect_first=name == PROTECTED)
      differ, decidable = bool((found_N != label_N).any()), bool(margin > DECIDABLE)
      counts["images"] += 1
      counts["decidable"] += decidable
      counts["differ"] += differ
      counts["decidable_differ"] += differ and decidable
  return counts


def loss_and_gradient(target_BNC, drawn_per, implementation=PLAIN, num_schedules=2):
  """Return a call that computes the groups of two schedules, the loss and its student gradient."""
  assign = bipartite.build(drawn_per=drawn_per, implementation=implementation)

  # The tokens are arguments: XLA would compute with constants at compile time, for seconds at 256 images.
  @jax.jit
  def call(key, student_BNC, target_BNC):
    keys_S = jax.random.split(key, num_schedules)
    label_SBN = jax.vmap(assign, (0, None, None))(keys_S, target_BNC, jnp.zeros((len(target_BNC), 8, 8, 3)))
    return jax.value_and_grad(lambda u: morphing.dtm_loss(u, target_BNC, label_SBN))(student_BNC)

  student_BNC = 0.5 * target_BNC
  return lambda i: call(jax.random.key(i), student_BNC, target_BNC)


def network_calls(batch_size, num_tokens, width):
  """Return calls of the student, forward and backward, alone and after CLIP B/16's image tower."""
  image_BHW3 = morphers.images(batch_size, round(num_tokens**0.5))
  student = morphers.student_step(batch_size, image_BHW3, width)
  config = clip.CLIPConfig(text=None)
  tower = clip.ImageTower(config.image, config.embed_dim)
  params = jax.jit(tower.init)(jax.random.key(0), image_BHW3)["params"]
  teacher = jax.jit(lambda params, image: tower.apply({"params": params}, image))
  return {STUDENT: student, STEP: lambda i: (teacher(params, image_BHW3), student(i))}


def calls_of_matching(args):
  """Return the calls to time by (name, "image" or "step"), which says what a schedule is drawn for."""
  target_BNC = jnp.asarray(morphers.tokens(args.batch, args.tokens, args.width, args.common))
  drawn = [schedules(i, args.batch, args.tokens, args.max_rounds) for i in range(8)]
  one_for_all = [jnp.broadcast_to(merges_BK[:1], merges_BK.shape) for merges_BK in drawn]
  calls = {}
  for name in variants():
    match = matcher(name)
    calls[name, "image"] = lambda i, match=match: match(target_BNC, drawn[i % 8])
    calls[name, "step"] = lambda i, match=match: match(target_BNC, one_for_all[i % 8])
  for per in ("image", "step"):
    for name, way in wholes().items():
      calls[name, per] = loss_and_gradient(target_BNC, per, way)
  return calls


def collect(args):
  matcher.cache_clear()  # compilations are counted from here
  networks = network_calls(args.step_batch, args.tokens, args.width) if args.step else {}
  times, _ = measuring.interleaved(calls_of_matching(args) | networks, args.repeats)
  each = {
    name: seconds / (args.step_batch if name in networks else args.batch) for name, seconds in times.items()
  }
  sizes = (args.draws, args.batch, args.tokens, args.width, args.max_rounds, args.common, args.checked)
  rows = {}
  for name in [*variants(), *wholes()]:
    per_image, per_step = each[name, "image"], each[name, "step"]
    rows[name] = {
      "ms_per_image": measuring.quartiles(1e3 * per_image),
      "to_plain": measuring.quartiles(per_image / each[PLAIN, "image"]),
      "schedule_per_image_to_per_step": measuring.quartiles(per_image / per_step),
      "groups": None if name in wholes() else differences(name, *sizes),
      "compilations": None if name in wholes() else matcher(name)._cache_size(),
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
      for key in ("ms_per_image", "to_plain", "schedule_per_image_to_per_step")
    ]
    differ = (
      "-" if groups is None else "{decidable_differ} of {decidable}, {differ} of {images}".format(**groups)
    )
    shares = [measuring.spread(row.get(f"share of {network}"), ".2%") for network in (STUDENT, STEP)]
    rows.append([name, *cells, differ, *shares])
  header = ["variant", "ms an image", "to plain", "schedule per image / per step",
            "differ from float64: decidable, all", "of the student", "of student and teacher"]  # fmt: skip
  networks = [f"{name}: {measuring.spread(ms, '.0f')} ms an image." for name, ms in
              record["networks_ms_per_image"].items()]  # fmt: skip
  return "\n\n".join([
    "Medians and quartiles over interleaved rounds. Matching uses one schedule. `morphing and loss` is two "
    "schedules of the random split, the loss and its gradient with respect to student tokens.",
    measuring.table(header, rows), *networks,
    "GPU and TPU: empty, not measured." if jax.default_backend() == "cpu" else "",
  ])  # fmt: skip


def parse(arguments=None):
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  defaults = dict(
    batch=8, tokens=196, width=512, max_rounds=14, repeats=15, draws=4, checked=16, step_batch=2
  )
  for name, default in defaults.items():
    parser.add_argument(f"--{name}", type=int, default=default)
  parser.add_argument("--step", action="store_true", help="also time ViT-B/16 and CLIP B/16")
  parser.add_argument("--common", type=float, default=1.5, help="10 makes all tokens nearly parallel")
  parser.add_argument("--name", default="morphing", help="name of the result files")
  parser.add_argument("--note", default="", help="a sentence on the machine's state, for the table")
  parser.add_argument("--out", type=Path, default=Path("results"))
  return parser.parse_args(arguments)


def main(arguments=None):
  args = parse(arguments)
  record = collect(args)
  sizes = {name: value for name, value in vars(args).items() if name not in ("out", "name", "note")}
  print(measuring.report(
    args.out, args.name, title="What morphing costs", module="benchmarks.morphing", body=markdown(record),
    record=sizes | record, note=args.note,
  ))  # fmt: skip


if __name__ == "__main__":
  main()
