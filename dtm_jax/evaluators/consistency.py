"""What single tokens know of their image, before and after they are morphed: the motivation of DTM.

Per-token zero-shot accuracy, per-token linear-probe accuracy, the cosine of neighbours, and the purity of the
groups, for the tokens as they are and for every morpher of a list (arXiv 2401.00254, §1 and §3).
"""

import functools
import itertools
import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dtm_jax import consistency, data, evaluators, morphing, plugins
from dtm_jax import mesh as meshes
from dtm_jax.arrays import Array, Batch, Int, PyTree
from dtm_jax.augment import to_float
from dtm_jax.evaluators import zeroshot

AS_THEY_ARE = "tokens"


class Evaluator:
  """Every token of every image counts once; tokens are counted in integers.

  Args:
    predict: `tokens` names the function that gives [B, N, C]; with "text", of one space with the tokens,
      there are zero-shot numbers too.
    dataset: options of the data set, `name` among them; it must know its classes.
    morphers: options of each, `name` among them, by the name to report it under.
    prompts: the set of templates for zero-shot; None leaves zero-shot out.
    fit, split: the split on whose first `max_fit` images the linear probe of tokens is fitted, and the one
      that everything is measured on, its first `max_images` or all.

  Raises:
    ValueError: the tokens are no square grid, or `prompts` without a text tower.
  """

  def __init__(
    self,
    predict: evaluators.Predict,
    mesh: Mesh,
    *,
    tokenize,
    dataset,
    morphers,
    tokens: str = "patches",
    prompts: str | None = None,
    fit: str = "train",
    max_fit: int | None = 5000,
    split: str = "test",
    max_images: int | None = None,
    image_size: int,
    resize: int | None = None,
    batch_size: int = 250,
    seed: int = 0,
  ):
    self._mesh = mesh
    self._names = (AS_THEY_ARE, *morphers)
    self._fit, self._test = (plugins.build("datasets", dataset, split=name) for name in (fit, split))
    self._limits = {id(self._fit): max_fit, id(self._test): max_images}
    self._options = dict(batch_size=batch_size, image_size=image_size, resize=resize)
    self._class_embeddings = None
    if prompts is not None:
      if tokenize is None:
        raise ValueError(f"prompts={prompts!r} need a text tower, and this task has none; set prompts=None.")
      self._class_embeddings = zeroshot.ClassEmbeddings(predict, tokenize, self._test, prompts)
    self._morph = _morph(evaluators.choose(predict, tokens), morphers, mesh, seed)

  def run(self, state: PyTree) -> Iterator[tuple[str, float]]:
    """Yields "<morpher>_zeroshot", "_linear", "_cosine", "_zeroshot_purity", "_linear_purity"."""
    num_classes = len(self._test.class_names)
    classifiers = {"linear": self._linear_probes(state, num_classes)}
    if self._class_embeddings is not None:
      class_GC = self._class_embeddings(state)
      classifiers["zeroshot"] = [lambda x_BNC: np.argmax(x_BNC @ class_GC.T, axis=-1)] * len(self._names)
    tokens, sums = 0, {}

    def add(name: str, value) -> None:
      sums[name] = sums.get(name, 0) + value

    for (token_BSNC, group_BSN), label_B in self._batches(state, self._test):
      batch_size, _, num_tokens, _ = token_BSNC.shape
      tokens += batch_size * num_tokens
      for index, name in enumerate(self._names):
        cosine_B = consistency.neighbour_cosine(token_BSNC[:, index], _grid(num_tokens))
        add(f"{name}_cosine", float(cosine_B.astype(np.float64).sum()) * num_tokens)
        for kind, classify in classifiers.items():
          right_BN = classify[index](token_BSNC[:, index]) == label_B[:, None]
          add(f"{name}_{kind}", int(right_BN.sum()))
          if index:
            single_BN = classify[0](token_BSNC[:, 0])
            pure_B = consistency.agreeing(single_BN, group_BSN[:, index], num_classes)
            add(f"{name}_{kind}_purity", int(pure_B.sum()))
    for name, value in sums.items():
      yield name, value / tokens

  def _linear_probes(self, state: PyTree, num_classes: int) -> list:
    """A classifier of tokens for every way of morphing, fitted on tokens morphed that way."""
    probes = None
    for (token_BSNC, _), label_B in self._batches(state, self._fit):
      if probes is None:
        probes = [consistency.LeastSquares(token_BSNC.shape[-1], num_classes) for _ in self._names]
      for index, probe in enumerate(probes):
        probe.add(token_BSNC[:, index], label_B)
    return [functools.partial(probe.predict, probe.solve()) for probe in probes]

  def _batches(self, state: PyTree, dataset: data.Dataset) -> Iterator:
    limit = self._limits[id(dataset)]
    batches = (data.require_labels(b, dataset) for b in data.eval_batches(dataset, **self._options))
    left = dataset.num_examples if limit is None else limit
    enough = itertools.islice(batches, -(-left // self._options["batch_size"]))
    for outputs, label in evaluators.each_batch(self._morph, state, enough, self._mesh):
      yield tuple(x[:left] for x in outputs), label[:left]
      left -= len(label)


def _morph(tokens_of, morphers, mesh: Mesh, seed: int):
  """(state, batch) -> the tokens as they are and morphed in every way [B, 1+S, N, C], and their groups."""
  assigns = [plugins.build("morphers", options) for options in morphers.values()]

  @functools.partial(jax.jit, out_shardings=meshes.replicated(mesh))
  def morph(token_BNC: Array, image: Array, index: Array) -> tuple[Array, Int[Array, "B S N"]]:
    key = jax.random.fold_in(jax.random.key(seed), index.max())  # of the batch, whatever the devices
    own_BN = jnp.broadcast_to(jnp.arange(token_BNC.shape[1], dtype=jnp.int32), token_BNC.shape[:2])
    groups = [own_BN, *(assign(key, token_BNC, to_float(image)) for assign in assigns)]
    tokens = [token_BNC, *(morphing.morph(token_BNC, label_BN) for label_BN in groups[1:])]
    return jnp.stack(tokens, axis=1), jnp.stack(groups, axis=1)

  def function(state: PyTree, batch: Batch) -> tuple[Array, Array]:
    return morph(tokens_of(state, batch), batch["image"], batch["index"])

  return function


def _grid(num_tokens: int) -> tuple[int, int]:
  side = math.isqrt(num_tokens)
  if side * side != num_tokens:
    raise ValueError(f"{num_tokens} tokens are no square grid.")
  return side, side
