"""Dynamic token morphing's own morpher: a random schedule, then rounds of bipartite matching."""

import jax
import jax.numpy as jnp

from dtm_jax import morphing, rngs
from dtm_jax.arrays import Array, Float, Int, RandomKey
from dtm_jax.errors import OptionError
from dtm_jax.matching import rounds, tpu_kernel
from dtm_jax.morphers import Assign

SCHEDULES = ("paper", "released")
DRAWN_PER = ("image", "step", "shard")
IMPLEMENTATIONS = {"plain": rounds.match_rounds, "pallas": tpu_kernel.match_rounds}


def build(
  *,
  schedule: str = "paper",
  drawn_per: str = "image",
  num_shards: int = 1,
  min_groups: int = 1,
  max_groups: int | None = None,
  max_merged: int | None = None,
  max_rounds: int = 14,
  split: str = "random",
  protect_first: bool = False,
  merged_feature: str = "size_weighted",
  implementation: str = "plain",
) -> Assign:
  """The defaults are the paper's.

  Args:
    schedule: "paper" draws how many groups remain, "released" how many tokens merge, with a constant rate.
    drawn_per: "image", the most varied; "step", one for the batch; or "shard", one for each of `num_shards`
      equal parts of it, as the released code does, where every process draws its own.
    min_groups: N̄, the fewest groups the paper's schedule asks for.
    max_groups: the most; by default N. Equal to `min_groups`, it fixes their number.
    max_merged: the most tokens the released schedule asks to merge; by default all.
    max_rounds: K, the most rounds.
    split, protect_first, merged_feature: of `morphing.bipartite_match`.
    implementation: "plain", or "pallas", one kernel for all rounds on a TPU and the plain rounds elsewhere.

  Raises:
    OptionError: an unknown choice; or, when traced, a batch that the shards do not divide.
  """
  for option, value, choices in (
    ("schedule", schedule, SCHEDULES),
    ("drawn_per", drawn_per, DRAWN_PER),
    ("split", split, morphing.SPLITS),
    ("merged_feature", merged_feature, morphing.MERGED_FEATURES),
    ("implementation", implementation, tuple(IMPLEMENTATIONS)),
  ):
    if value not in choices:
      raise OptionError(f"Unknown {option} {value!r}. Available: {', '.join(choices)}.")

  def draw(key: Array, num_tokens: int) -> Array:
    if schedule == "paper":
      return morphing.paper_schedule(key, num_tokens, min_groups, max_rounds, max_groups)
    return morphing.released_schedule(key, num_tokens, max_merged, max_rounds)

  def assign(
    key: RandomKey, tokens_BNC: Float[Array, "B N C"], images_BHW3: Float[Array, "B H W 3"]
  ) -> Int[Array, "B N"]:
    batch_size, num_tokens, _ = tokens_BNC.shape
    num_draws = {"image": batch_size, "step": 1, "shard": num_shards}[drawn_per]
    if batch_size % num_draws:
      raise OptionError(f"A batch of {batch_size} does not divide into {num_shards=} equal parts.")
    schedule_key, split_key = jax.random.split(key)
    draw_keys = rngs.per_example(schedule_key, num_draws)
    merges = jax.vmap(lambda key: draw(key, num_tokens))(draw_keys)
    return morphing.bipartite_match(
      tokens_BNC,
      jnp.repeat(merges, batch_size // num_draws, axis=0),
      split=split,
      protect_first=protect_first,
      merged_feature=merged_feature,
      key=split_key,
      rounds=IMPLEMENTATIONS[implementation],
    )

  return assign
