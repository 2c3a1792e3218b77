"""Group the tokens of an image: one module for each way, which `config.morphers` names.

A module has `build(**options)`, which returns a function

    assign(key, tokens_BNC, images_BHW3) -> label_BN

that partitions the patch tokens of each image. `tokens_BNC` are the teacher's tokens. `images_BHW3` is the
input of the teacher before normalisation, RGB in [0, 1]. label[b, j], int32, is the id of the group that owns
token j; the id of a group is its smallest member (partitions.py).

`assign` is a pure function of static shape and is traced once. A morpher ignores the arguments that it does
not need. `build` raises an OptionError for values that make no sense. Options are read from its signature
without importing the module, so it is a plain function with keyword arguments.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from dtm_jax.arrays import Array, Int, RandomKey
from dtm_jax.errors import OptionError, check_choice

Assign = Callable[[Array, Array, Array], Array]


@dataclasses.dataclass(frozen=True)
class GroupCount:
  """Say how many groups n̄ an image gets: always `groups`, or a draw n̄ ~ U{min_groups..max_groups}.

  Attributes:
    groups: the fixed number. None draws n̄.
    min_groups: N̄, the smallest n̄.
    max_groups: the largest n̄, by default N, as in the paper's schedule.
    drawn_per: "image", or "step" for one n̄ per batch.

  Raises:
    OptionError: a choice is unknown, or both a fixed number and a range are given. When traced: there are
      more groups than tokens.
  """

  groups: int | None = None
  min_groups: int = 1
  max_groups: int | None = None
  drawn_per: str = "image"

  def __post_init__(self) -> None:
    check_choice("drawn_per", self.drawn_per, ("image", "step"))
    if self.groups is not None and (self.min_groups, self.max_groups) != (1, None):
      raise OptionError(
        f"groups={self.groups} is a fixed number; it goes without min_groups={self.min_groups} and "
        f"max_groups={self.max_groups}."
      )

  def bounds(self, num_tokens: int) -> tuple[int, int]:
    """Return the smallest and the largest n̄ for N = `num_tokens`. The largest is M, the number of slots."""
    low, high = (self.min_groups, self.max_groups) if self.groups is None else (self.groups, self.groups)
    high = num_tokens if high is None else high
    if not 1 <= low <= high <= num_tokens:
      raise OptionError(f"From {low} to {high} groups do not fit 1 to {num_tokens} tokens: {self}.")
    return low, high

  def draw(self, key: RandomKey, batch_size: int, num_tokens: int) -> Int[Array, " B"]:
    """Draw n̄ of each image, as a function of the key and the image's place in the batch."""
    low, high = self.bounds(num_tokens)
    shape = (batch_size,) if self.drawn_per == "image" else (1,)
    return jnp.broadcast_to(jax.random.randint(key, shape, low, high + 1), (batch_size,))
