"""Group the tokens as Dynamic Token Morphing does: a random schedule, then rounds of bipartite matching."""

import functools

import jax
import jax.numpy as jnp

from dtm_jax import morphing, rngs
from dtm_jax.arrays import Array, Float, Int, RandomKey
from dtm_jax.errors import OptionError, check_choice
from dtm_jax.matching.implementations import IMPLEMENTATIONS
from dtm_jax.morphers import Assign

SCHEDULES = ("paper", "released")
DRAWN_PER = ("image", "step", "shard")


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
  """Build the morpher. The defaults are those of the paper; docs/method.md explains each option.

  Args:
    schedule: "paper" draws the number of groups that remain. "released" draws the number of tokens to merge,
      at a constant rate.
    drawn_per: "image" draws a schedule for each image, "step" one for the batch, and "shard" one for each of
      `num_shards` equal parts of the batch. The released code draws one in each process, which is "shard".
    num_shards: number of parts for drawn_per="shard".
    min_groups: N̄, the smallest number of groups of the paper's schedule.
    max_groups: the largest number of groups, by default N. If it equals `min_groups`, the number is fixed.
    max_merged: the largest number of tokens that the released schedule merges, by default N.
    max_rounds: K, the largest number of rounds.
    split: how a round splits the live tokens into two sets. "random" permutes them first, with another
      permutation for each image and round. "alternate" splits by even and odd place, as the released code
      does.
    protect_first: whether the first patch stays in a group by itself, as in the released code.
    merged_feature: the feature of a group in the next round. "size_weighted" is the mean of all its tokens.
      "mean_of_means" is the mean of the features that merged in the round, as in Algorithm 1.
    implementation: how the rounds are computed. "plain" compares features. "gram" compares sums of one Gram
      matrix, which all schedules of a step share. "pallas" is one kernel with all rounds on a TPU or a GPU,
      and "plain" elsewhere.

  Raises:
    OptionError: a choice is unknown. When traced: `num_shards` does not divide the batch.
  """
  check_choice("schedule", schedule, SCHEDULES)
  check_choice("drawn_per", drawn_per, DRAWN_PER)
  check_choice("split", split, morphing.SPLITS)
  check_choice("merged_feature", merged_feature, morphing.MERGED_FEATURES)
  check_choice("implementation", implementation, IMPLEMENTATIONS)
  if schedule == "paper":
    draw = functools.partial(
      morphing.paper_schedule, min_groups=min_groups, max_rounds=max_rounds, max_groups=max_groups
    )
  else:
    draw = functools.partial(morphing.released_schedule, max_merged=max_merged, max_rounds=max_rounds)
  match = functools.partial(
    morphing.bipartite_match, split=split, protect_first=protect_first, merged_feature=merged_feature,
    rounds=IMPLEMENTATIONS[implementation],
  )  # fmt: skip

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
    return match(tokens_BNC, jnp.repeat(merges, batch_size // num_draws, axis=0), key=split_key)

  return assign
