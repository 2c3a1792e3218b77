"""Ways of morphing: one module each, `build(**options) -> assign`, named in `config.morphers`.

    assign(key, tokens_BNC, images_BHW3) -> label_BN

partitions the patch tokens of each image. `tokens_BNC` are the teacher's, `images_BHW3` what the teacher saw,
before normalisation: RGB in [0, 1].
label[b, j], int32, is the id of the group that owns token j, and the id of a group is its smallest member.
`assign` is a pure function of its arguments, of static shape, traced once; a morpher ignores what it does
not need. `build` refuses unknown options and senseless values.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from dtm_jax import partitions, rngs
from dtm_jax.arrays import Array, Float, Int, RandomKey
from dtm_jax.errors import OptionError
from dtm_jax.morphers import _clustering as clustering

Assign = Callable[[Array, Array, Array], Array]


@dataclasses.dataclass(frozen=True)
class GroupCount:
  """n̄, how many groups an image gets: always `groups`, or n̄ ~ U{min_groups..max_groups}.

  Attributes:
    groups: the fixed number; None draws.
    min_groups: N̄, the fewest that are drawn.
    max_groups: the most; by default N, as in the paper's schedule.
    drawn_per: "image"; or "step", one for the batch.

  Raises:
    OptionError: an unknown choice, a fixed number beside a range, or, when traced, more groups than tokens.
  """

  groups: int | None = None
  min_groups: int = 1
  max_groups: int | None = None
  drawn_per: str = "image"

  def __post_init__(self):
    if self.drawn_per not in ("image", "step"):
      raise OptionError(f"Unknown drawn_per {self.drawn_per!r}. Available: image, step.")
    if self.groups is not None and (self.min_groups, self.max_groups) != (1, None):
      raise OptionError(
        f"groups={self.groups} is a fixed number; it goes without min_groups={self.min_groups} and "
        f"max_groups={self.max_groups}."
      )

  def bounds(self, num_tokens: int) -> tuple[int, int]:
    """The fewest and the most of N = `num_tokens`; the most is the number of group slots."""
    low, high = (self.min_groups, self.max_groups) if self.groups is None else (self.groups, self.groups)
    high = num_tokens if high is None else high
    if not 1 <= low <= high <= num_tokens:
      raise OptionError(f"From {low} to {high} groups do not fit 1 to {num_tokens} tokens: {self}.")
    return low, high

  def draw(self, key: RandomKey, batch_size: int, num_tokens: int) -> Int[Array, "B"]:
    """n̄ of each image; a function of the key and the image's place in the batch."""
    low, high = self.bounds(num_tokens)
    shape = (batch_size,) if self.drawn_per == "image" else (1,)
    return jnp.broadcast_to(jax.random.randint(key, shape, low, high + 1), (batch_size,))


def by_similarity(algorithm: Callable[..., Array], count: GroupCount, init: str, iterations: int) -> Assign:
  """The morpher of a clustering that knows the tokens by their cosines and begins with some of them.

  Args:
    algorithm: (sim_NN, seed_M, num_groups, iterations=) -> slot_N, for one image.
    count: how many groups.
    init: how the seeds are chosen, of `clustering.seeds`.
    iterations: of the algorithm.

  Raises:
    OptionError: an unknown init, or negative iterations.
  """
  if init not in clustering.INITS:
    raise OptionError(f"Unknown init {init!r}. Available: {', '.join(clustering.INITS)}.")
  if iterations < 0:
    raise OptionError(f"iterations={iterations} must be at least 0.")

  def assign(
    key: RandomKey, tokens_BNC: Float[Array, "B N C"], images_BHW3: Float[Array, "B H W 3"]
  ) -> Int[Array, "B N"]:
    batch_size, num_tokens, _ = tokens_BNC.shape
    count_key, seed_key = jax.random.split(key)
    count_B = count.draw(count_key, batch_size, num_tokens)
    sim_BNN = jax.vmap(clustering.cosine_similarity)(tokens_BNC)
    choose = functools.partial(clustering.seeds, num_seeds=count.bounds(num_tokens)[1], init=init)
    seed_BM = jax.vmap(choose)(rngs.per_example(seed_key, batch_size), sim_BNN)
    slot_BN = jax.vmap(functools.partial(algorithm, iterations=iterations))(sim_BNN, seed_BM, count_B)
    return partitions.canonical_labels(slot_BN)

  return assign
