"""Morphs and measures the tokens of a batch on the devices, in every way of morphing."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dtm_jax import morphing
from dtm_jax.arrays import Array, Batch, Float, Int, PyTree, UInt8
from dtm_jax.augment import to_float
from dtm_jax.errors import OptionError
from dtm_jax.evaluators._context import PredictFunction
from dtm_jax.evaluators._least_squares import classify
from dtm_jax.evaluators._token_measures import majority_size, neighbour_cosine
from dtm_jax.morphers import Assign
from dtm_jax.training import mesh as meshes

Weights = dict[str, Float[np.ndarray, "S D G"]]
"""The weights of `classify` in each way of morphing, by name of the classifier."""


class MorphedTokens:
  """The tokens of a batch in S ways: unmorphed first, then by each morpher.

  Tokens are classified in float32 at full precision. The ways are classified one after the other, so the
  largest array is [B, N, G]. All results are replicated over the devices.

  Args:
    tokens_of: (state, batch) -> tokens [B, N, C].
    assigns: the morphers, S - 1 of them.
    mesh: the devices that share the batch.
    seed: seed of the morphers. The key of a batch depends on its examples and not on the devices.
  """

  def __init__(self, tokens_of: PredictFunction, assigns: Sequence[Assign], mesh: Mesh, seed: int):
    self._tokens_of, self._assigns, self._mesh, self._seed = tokens_of, assigns, mesh, seed
    everywhere = meshes.replicated(mesh)
    self._morph = jax.jit(self._morphed, out_shardings=everywhere)
    self._measure = jax.jit(self._measured, out_shardings=everywhere)
    self._show = jax.jit(self._shown, out_shardings=everywhere)

  def morph(self, state: PyTree, batch: Batch) -> tuple[Float[Array, "B S N C"], Int[Array, "B S N"]]:
    """Return the tokens and their groups in every way of morphing."""
    return self._call(self._morph, state, batch)

  def measure(self, state: PyTree, batch: Batch, weights: Weights) -> dict[str, Array]:
    """Return measures of the tokens in every way of morphing.

    Args:
      state: first argument of `tokens_of`.
      batch: a batch on the devices.
      weights: the weights of the classifiers.

    Returns:
      "cosine", the mean cosine similarity of neighbours [B, S]. For each classifier "<name>", the classes of
      the tokens [B, S, N], and "<name>_agreeing", the number of tokens that agree with most of their group
      [B, S]. The classes of the unmorphed tokens are counted for the latter.

    Raises:
      OptionError: the tokens are not a square grid.
    """
    return self._call(self._measure, state, batch, weights)

  def show(
    self, state: PyTree, batch: Batch, weights: Weights
  ) -> tuple[Float[Array, "B S N C"], Int[Array, "B S N"], Int[Array, "B S N"]]:
    """Return the tokens, their groups and their zero-shot classes in every way of morphing."""
    return self._call(self._show, state, batch, weights)

  def _call(self, jitted: Callable[..., Any], state: PyTree, batch: Batch, *more: Any) -> Any:
    with jax.default_matmul_precision("highest"):
      return jitted(self._tokens_of(state, batch), batch["image"], batch["index"], *more)

  def _morphed(
    self, token_BNC: Float[Array, "B N C"], image: UInt8[Array, "B H W 3"], index_B: Int[Array, " B"]
  ) -> tuple[Float[Array, "B S N C"], Int[Array, "B S N"]]:
    token_BNC = jax.lax.with_sharding_constraint(token_BNC, meshes.batch_sharding(self._mesh))
    key = jax.random.fold_in(jax.random.key(self._seed), index_B.max())
    own_BN = jnp.broadcast_to(jnp.arange(token_BNC.shape[1], dtype=jnp.int32), token_BNC.shape[:2])
    groups = [own_BN, *(assign(key, token_BNC, to_float(image)) for assign in self._assigns)]
    tokens = [token_BNC, *(morphing.morph(token_BNC, group_BN) for group_BN in groups[1:])]
    return jnp.stack(tokens, axis=1), jnp.stack(groups, axis=1)

  def _measured(
    self, token_BNC: Array, image: Array, index_B: Array, weights: dict[str, Array]
  ) -> dict[str, Array]:
    token_BSNC, group_BSN = self._morphed(token_BNC, image, index_B)
    token_SBNC, group_SBN = jnp.moveaxis(token_BSNC, 1, 0), jnp.moveaxis(group_BSN, 1, 0)
    cosine = functools.partial(neighbour_cosine, grid=square_grid(token_BNC.shape[1]))
    found = {"cosine": jax.lax.map(cosine, token_SBNC)}
    for name, weights_SDG in weights.items():
      found[name] = jax.lax.map(lambda way: classify(*way), (token_SBNC, weights_SDG))
      unmorphed_BN = found[name][0]
      found[f"{name}_agreeing"] = jax.lax.map(functools.partial(majority_size, unmorphed_BN), group_SBN)
    return jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), found)

  def _shown(
    self, token_BNC: Array, image: Array, index_B: Array, weights: dict[str, Array]
  ) -> tuple[Array, Array, Array]:
    found = self._measured(token_BNC, image, index_B, weights)
    return *self._morphed(token_BNC, image, index_B), found["zeroshot"]  # XLA morphs only once


def square_grid(num_tokens: int) -> tuple[int, int]:
  """Return the (rows, columns) of a square grid of tokens.

  Raises:
    OptionError: the number of tokens is not a square.
  """
  side = math.isqrt(num_tokens)
  if side * side != num_tokens:
    raise OptionError(f"{num_tokens} tokens are not a square grid.")
  return side, side
