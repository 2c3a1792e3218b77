"""What single tokens know of their image, before and after they are morphed: the motivation of DTM.

Per-token zero-shot accuracy, per-token linear-probe accuracy, the cosine of neighbours, and the purity of the
groups, for the tokens as they are and for every morpher of a list (arXiv 2401.00254, §1 and §3).
"""

import collections
import functools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dtm_jax import data, datasets, evaluators, morphing, plugins
from dtm_jax.arrays import Array, Batch, Float, Int, PyTree, UInt8
from dtm_jax.augment import to_float
from dtm_jax.datasets import evenly
from dtm_jax.errors import OptionError
from dtm_jax.evaluators import Context, zeroshot
from dtm_jax.evaluators import _token_measures as consistency
from dtm_jax.training import mesh as meshes

AS_THEY_ARE = "tokens"


class Examples(NamedTuple):
  """Images with their tokens under each of the S `Evaluator.names`, as they are first."""

  image_BHW3: UInt8[np.ndarray, "B H W 3"]  # as the network saw it, before normalisation
  index_B: Int[np.ndarray, " B"]
  label_B: Int[np.ndarray, " B"]
  predicted_B: Int[np.ndarray, " B"]  # zero-shot, of the image's own embedding
  token_BSNC: Float[np.ndarray, "B S N C"]
  group_BSN: Int[np.ndarray, "B S N"]
  zeroshot_BSN: Int[np.ndarray, "B S N"]


class Evaluator:
  """Every token of every image counts once; tokens are counted in integers.

  Tokens are classified on the devices, in float32 at full precision, one way of morphing after the other: the
  largest array there is [B, N, G]. To the host come classes and counts, and for the linear probe tokens.

  Args:
    context: `tokens` names the function that gives [B, N, C]; with "text", of one space with the tokens,
      there are zero-shot numbers too.
    dataset: options of the data set, `name` among them; it must know its classes.
    morphers: options of each, `name` among them, by the name to report it under.
    prompts: the set of templates for zero-shot; None leaves zero-shot out.
    fit, split: the split on whose first `max_fit` images the linear probe of tokens is fitted, and the one
      that everything is measured on, its first `max_images` or all. Where the first are not spread over the
      classes, evenly spaced ones are taken (`datasets.spread`).
    fit_evenly: evenly spaced images in any case.

  Raises:
    OptionError: the tokens are no square grid, `prompts` without a text tower, or `fit_evenly` of a data set
      that can only be read in sequence.
  """

  def __init__(
    self,
    context: Context,
    *,
    dataset,
    morphers,
    tokens: str = "patches",
    prompts: str | None = None,
    fit: str = "train",
    max_fit: int | None = 5000,
    fit_evenly: bool = False,
    split: str = "test",
    max_images: int | None = None,
    image_size: int,
    resize: int | None = None,
    batch_size: int = 250,
    seed: int = 0,
  ):
    self.names = (AS_THEY_ARE, *morphers)
    test, fit = (plugins.build("datasets", dataset, split=each) for each in (split, fit))
    evaluators.require_same_classes(test, fit)
    self.test = datasets.spread(test, max_images)
    self._fit = evenly(fit, max_fit) if fit_evenly and max_fit is not None else datasets.spread(fit, max_fit)
    self._limits = {id(self._fit): max_fit, id(self.test): max_images}
    self._options = dict(batch_size=batch_size, image_size=image_size, resize=resize)
    self._context, mesh = context, context.mesh
    self._class_embeddings = None
    if prompts is not None:
      if context.tokenize is None:
        raise OptionError(f"prompts={prompts!r} need a text tower, and this task has none; set prompts=None.")
      self._class_embeddings = zeroshot.ClassEmbeddings(context, self.test, prompts)
    tokens_of = context.function(tokens)
    assigns = [plugins.build("morphers", options) for options in morphers.values()]
    self._morph = _on_tokens(tokens_of, functools.partial(_morph, assigns, mesh, seed), mesh)
    self._measure = _on_tokens(tokens_of, functools.partial(_measure, assigns, mesh, seed), mesh)
    self._see = _on_tokens(tokens_of, functools.partial(_see, assigns, mesh, seed), mesh)

  def run(self, state: PyTree) -> Iterator[tuple[str, float]]:
    """Yields "<morpher>_zeroshot", "_linear", "_cosine", "_zeroshot_purity", "_linear_purity"."""
    probes_SDG = np.stack([probe.solve() for probe in self._linear_probes(state)])
    weights = {"linear": probes_SDG.astype(np.float32)} | self._zeroshot_weights(state)
    tokens, sums = 0, collections.defaultdict(int)
    measure = lambda state, batch: self._measure(state, batch, weights)
    for found, label_B in self._batches(measure, state, self.test):
      num_tokens = found["linear"].shape[2]
      tokens += len(label_B) * num_tokens
      for index, name in enumerate(self.names):
        sums[f"{name}_cosine"] += float(found["cosine"][:, index].astype(np.float64).sum()) * num_tokens
        for kind in weights:
          sums[f"{name}_{kind}"] += int((found[kind][:, index] == label_B[:, None]).sum())
          if index:
            sums[f"{name}_{kind}_purity"] += int(found[f"{kind}_agreeing"][:, index].sum())
    for name, value in sums.items():
      yield name, value / tokens

  def examples(self, state: PyTree, count: int) -> Examples:
    """The first image of each class in the order of the data set, then the second of each, ...: `count`.

    They are morphed as `run` morphs them, in the same batches, hence in the same groups.

    Raises:
      OptionError: no prompts, so no zero-shot classes.
    """
    weights = self._zeroshot_weights(state)
    if not weights:
      raise OptionError("Examples are shown with their zero-shot classes; set prompts to a set of templates.")
    num_classes, image_of = len(self.test.class_names), self._context.function("image")

    def see(state: PyTree, batch: Batch) -> tuple:
      return batch["image"], batch["index"], image_of(state, batch), *self._see(state, batch, weights)

    seen, rows = collections.Counter(), []
    for outputs, label_B in self._batches(see, state, self.test):
      for row, label in enumerate(label_B.tolist()):
        rows.append((seen[label], len(rows), label, *(x[row] for x in outputs)))
        seen[label] += 1
      rows = sorted(rows, key=lambda row: row[:2])[:count]  # others of this batch are not needed again
      if len(seen) >= min(count, num_classes) and sum(seen.values()) >= count:
        break
    label_B, image, index, embedding_BC, token_BSNC, group_BSN, zeroshot_BSN = map(
      np.stack, list(zip(*rows, strict=True))[2:]
    )
    predicted_B = consistency.classify(embedding_BC[:, None], weights["zeroshot"][0])[:, 0]
    return Examples(image, index, label_B, predicted_B, token_BSNC, group_BSN, zeroshot_BSN)

  def _zeroshot_weights(self, state: PyTree) -> dict[str, Float[np.ndarray, "S D G"]]:
    """The classes' embeddings as weights without bias, the same for every way of morphing."""
    if self._class_embeddings is None:
      return {}
    weights_DG = np.pad(self._class_embeddings(state).T, ((0, 1), (0, 0)))
    return {"zeroshot": np.broadcast_to(weights_DG, (len(self.names), *weights_DG.shape))}

  def _linear_probes(self, state: PyTree) -> list[consistency.LeastSquares]:
    """A classifier of tokens for every way of morphing, fitted on tokens morphed that way."""
    probes = []
    for (token_BSNC, _), label_B in self._batches(self._morph, state, self._fit):
      size = token_BSNC.shape[-1], len(self.test.class_names)
      probes = probes or [consistency.LeastSquares(*size) for _ in self.names]
      for index, probe in enumerate(probes):
        probe.add(token_BSNC[:, index], label_B)
    return probes

  def _batches(self, function: Callable, state: PyTree, dataset: data.Dataset) -> Iterator:
    limit = self._limits[id(dataset)]
    left = dataset.num_examples if limit is None else limit
    enough = -(-left // self._options["batch_size"])
    batches = data.eval_batches(dataset, max_batches=enough, **self._options)
    batches = (data.require_labels(batch, dataset) for batch in batches)
    for outputs, label in evaluators.batch_outputs(function, state, batches, self._context.mesh):
      yield jax.tree.map(lambda x, left=left: x[:left], outputs), label[:left]
      left -= len(label)


def _on_tokens(tokens_of: Callable, function: Callable, mesh: Mesh) -> Callable:
  """(state, batch, *more) -> function(tokens, image, index, *more), compiled, the result everywhere."""
  jitted = jax.jit(function, out_shardings=meshes.replicated(mesh))

  def of_batch(state: PyTree, batch: Batch, *more):
    with jax.default_matmul_precision("highest"):
      return jitted(tokens_of(state, batch), batch["image"], batch["index"], *more)

  return of_batch


def _morph(
  assigns, mesh: Mesh, seed: int, token_BNC: Array, image: Array, index: Array
) -> tuple[Float[Array, "B S N C"], Int[Array, "B S N"]]:
  """The tokens as they are and morphed in every way, and their groups."""
  token_BNC = jax.lax.with_sharding_constraint(token_BNC, meshes.batch_sharding(mesh))
  key = jax.random.fold_in(jax.random.key(seed), index.max())  # of the batch, whatever the devices
  own_BN = jnp.broadcast_to(jnp.arange(token_BNC.shape[1], dtype=jnp.int32), token_BNC.shape[:2])
  groups = [own_BN, *(assign(key, token_BNC, to_float(image)) for assign in assigns)]
  tokens = [token_BNC, *(morphing.morph(token_BNC, label_BN) for label_BN in groups[1:])]
  return jnp.stack(tokens, axis=1), jnp.stack(groups, axis=1)


def _measure(
  assigns, mesh: Mesh, seed: int, token_BNC: Array, image: Array, index: Array, weights: dict[str, Array]
) -> dict[str, Array]:
  """By way of morphing: the neighbours' cosine [B, S]; by classifier, the tokens' classes [B, S, N] and how
  many tokens agree with their group [B, S], by the classes that the tokens have as they are."""
  token_BSNC, group_BSN = _morph(assigns, mesh, seed, token_BNC, image, index)
  token_SBNC, group_SBN = jnp.moveaxis(token_BSNC, 1, 0), jnp.moveaxis(group_BSN, 1, 0)
  cosine = functools.partial(consistency.neighbour_cosine, grid=_grid(token_BNC.shape[1]))
  found = {"cosine": jax.lax.map(cosine, token_SBNC)}
  for kind, weights_SDG in weights.items():
    found[kind] = jax.lax.map(lambda way: consistency.classify(*way), (token_SBNC, weights_SDG))
    alone_BN = found[kind][0]
    agreeing = functools.partial(consistency.agreeing, alone_BN)
    found[f"{kind}_agreeing"] = jax.lax.map(agreeing, group_SBN)
  return jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), found)


def _see(
  assigns, mesh: Mesh, seed: int, token_BNC: Array, image: Array, index: Array, weights: dict[str, Array]
) -> tuple[Array, Array, Array]:
  """The tokens, their groups and their zero-shot classes, in every way of morphing."""
  found = _measure(assigns, mesh, seed, token_BNC, image, index, weights)  # whose morphing is compiled once
  return *_morph(assigns, mesh, seed, token_BNC, image, index), found["zeroshot"]


def _grid(num_tokens: int) -> tuple[int, int]:
  side = math.isqrt(num_tokens)
  if side * side != num_tokens:
    raise OptionError(f"{num_tokens} tokens are no square grid.")
  return side, side
