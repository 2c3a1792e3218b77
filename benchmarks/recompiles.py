"""Count how often new draws of n̄ and k make JAX trace or compile again, and fail if this happens.

    python -m benchmarks.recompiles --draws=10000

Two programs run `draws` times each, with a new draw of n̄, k and the split every time. One is the whole train
step of a small config with one schedule per step. The other is only matching, morphing and loss, with 196
tokens. JAX's own events count traces and compilations, including those inside others. After the first call,
JAX must not trace or compile again.
"""

import sys
import time
from collections.abc import Callable

import jax
import jax.monitoring
import jax.numpy as jnp

from benchmarks import measuring, workload
from dtm_jax import morphing, partitions
from dtm_jax.models.clip import model as clip
from dtm_jax.training import sharded_step

DISTINCT = "Draws of the train step are distinct if n̄ differs, those of the second program if n̄ or k differs."
EVENTS = {
  "/jax/core/compile/jaxpr_trace_duration": "traces",
  "/jax/core/compile/backend_compile_duration": "compilations",
}


class Counter:
  """Counts the traces and compilations of JAX inside a `with` block."""

  def __init__(self):
    self.counts = dict.fromkeys(EVENTS.values(), 0)

  def _listen(self, event: str, duration: float, **_):
    if event in EVENTS:
      self.counts[EVENTS[event]] += 1

  def __enter__(self) -> "Counter":
    jax.monitoring.register_event_duration_secs_listener(self._listen)
    return self

  def __exit__(self, *_):
    jax.monitoring.unregister_event_duration_listener(self._listen)


def train_step(config) -> Callable[[int], tuple[int, int]]:
  """Return a function round -> (groups, 0) that makes one step of the config with a new draw."""
  config.morphers.dtm.drawn_per = "step"
  config.loss.schedules = 1
  task, mesh = workload.task_of(config), workload.mesh_of(config)
  state, frozen = workload.state_and_frozen(config, task, mesh)
  batch = workload.synthetic_batch(config, mesh)
  step, key = sharded_step.jit_train_step(task, state, frozen, mesh), jax.random.key(config.seed)

  def call(i: int) -> tuple[int, int]:
    nonlocal state
    state, measurements = step(state, frozen, batch, key)
    return int(measurements["groups_dtm"]), 0

  return call


def matching_and_loss(num_tokens: int, width: int, max_rounds: int) -> Callable[[int], tuple[int, int]]:
  """Return a function round -> (n̄, k) that draws a schedule and matches random tokens with it."""
  target, student = jax.random.normal(jax.random.key(0), (2, 1, num_tokens, width))

  @jax.jit
  def step(i):
    draw_key, split_key = jax.random.split(jax.random.fold_in(jax.random.key(0), i))
    merges_K = morphing.paper_schedule(draw_key, num_tokens, 1, max_rounds)
    label_BN = morphing.bipartite_match(target, merges_K, split="random", key=split_key)
    loss, grad = jax.value_and_grad(morphing.dtm_loss)(student, target, label_BN[None])
    last = jnp.max(jnp.where(merges_K > 0, 1 + jnp.arange(max_rounds), 0))
    return loss, grad, partitions.num_groups(label_BN)[0], last

  def call(i: int) -> tuple[int, int]:
    _, _, groups, rounds = step(i)
    return int(groups), int(rounds)

  return call


def count(call: Callable[[int], tuple[int, int]], draws: int) -> dict:
  """Count the traces and compilations in the first call and in all later calls, and the distinct draws."""
  with Counter() as first:
    seen = {call(0)}
  start = time.perf_counter()
  with Counter() as later:
    for i in range(1, draws):
      seen.add(call(i))
  return {
    "draws": draws,
    "first": first.counts,
    "later": later.counts,
    "distinct": len(seen),
    "seconds": round(time.perf_counter() - start, 1),
  }


def small_config(path: str, overrides=(), dtype: str = "auto"):
  """Return the config in `path` with images of 32 pixels and a random teacher of two narrow blocks."""
  batch_size = max(2, jax.device_count())
  grid = [f"--config.batch_size={batch_size}", "--config.data.image_size=32"]
  tower = clip.ImageConfig(clip.Tower(32, 2, 2, 64), image_size=32, patch_size=4)
  teacher = workload.random_clip(workload.temporary_folder(), clip.CLIPConfig(tower, None, 16))
  return workload.config_from(path, [*grid, f"--config.teacher.path={teacher}", *overrides], dtype)


def parse(argv=None):
  """Return the options of the benchmark and the remaining arguments, which override the config."""
  parser = measuring.make_parser(
    __doc__, "recompiles", config="configs/debug.py", draws=10_000, tokens=196, width=64, rounds=14
  )
  return parser.parse_known_args(argv)


def main(argv=None):
  args, overrides = parse(argv)
  calls = {
    f"train step of {args.config}": train_step(small_config(args.config, overrides, args.dtype)),
    f"matching, morphing and loss, {args.tokens} tokens": matching_and_loss(
      args.tokens, args.width, args.rounds
    ),
  }
  results = {name: count(call, args.draws) for name, call in calls.items()}
  header = ["program", "draws", "distinct draws", "traces, compilations in call 1", "later", "seconds"]
  show = lambda counts: f"{counts['traces']}, {counts['compilations']}"
  rows = [
    [name, *(str(each[k]) for k in ("draws", "distinct")), show(each["first"]), show(each["later"]),
     f"{each['seconds']:.0f}"]
    for name, each in results.items()
  ]  # fmt: skip
  text = measuring.report(
    args.out, args.name, title="Recompilations", module="benchmarks.recompiles", note=args.note,
    body=f"{DISTINCT}\n\n{measuring.table(header, rows)}",
    record={"programs": results},
  )  # fmt: skip
  print(text)
  if any(sum(each["later"].values()) for each in results.values()):
    sys.exit("JAX traced or compiled again after the first call.")


if __name__ == "__main__":
  main()
