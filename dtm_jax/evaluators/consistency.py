"""Measures what single tokens know of their image, before and after they are morphed.

This is the motivation of DTM (arXiv 2401.00254, sections 1 and 3). For the unmorphed tokens and for each
morpher of a list it gives the zero-shot and the linear-probe accuracy of single tokens, the cosine similarity
of neighbours, and the purity of the groups.
"""

import collections
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from dtm_jax import data, datasets, evaluators, plugins
from dtm_jax.arrays import Batch, Float, Int, PyTree, UInt8
from dtm_jax.errors import OptionError
from dtm_jax.evaluators import Context, Section
from dtm_jax.evaluators._class_embeddings import ClassEmbeddings
from dtm_jax.evaluators._least_squares import LeastSquares, classify
from dtm_jax.evaluators._morphed_tokens import MorphedTokens

UNMORPHED = "tokens"
"""The name of the unmorphed tokens in the results."""


class Examples(NamedTuple):
  """Images with their tokens in each of the S ways `Evaluator.names`, the unmorphed tokens first.

  Attributes:
    image_BHW3: the images as the network saw them, before normalisation.
    index_B: their places in the data set.
    label_B: their classes.
    predicted_B: the zero-shot class of the image's own embedding.
    token_BSNC: the tokens.
    group_BSN: the group of each token.
    zeroshot_BSN: the zero-shot class of each token.
  """

  image_BHW3: UInt8[np.ndarray, "B H W 3"]
  index_B: Int[np.ndarray, " B"]
  label_B: Int[np.ndarray, " B"]
  predicted_B: Int[np.ndarray, " B"]
  token_BSNC: Float[np.ndarray, "B S N C"]
  group_BSN: Int[np.ndarray, "B S N"]
  zeroshot_BSN: Int[np.ndarray, "B S N"]


class Evaluator:
  """Counts every token of every image once, in integers.

  The devices morph and classify the tokens. The host receives classes and counts, and tokens only for the
  linear probe.

  Args:
    context: needs the predict function `tokens`, [B, N, C]. Zero-shot numbers also need "text", which embeds
      in the space of the tokens, and a tokenizer.
    dataset: options of the data set, with its "name". It must have class names.
    morphers: the options of each morpher, with its "name", by the name to report it under.
    tokens: name of the predict function.
    prompts: the set of templates for zero-shot classes. None leaves zero-shot numbers out.
    fit: the split that the linear probe of single tokens is fitted on.
    max_fit: the number of its images to use. None: all. They are the first ones, or evenly spaced ones if the
      first are not spread over the classes.
    fit_evenly: whether to use evenly spaced images of `fit` in any case.
    split: the split to measure.
    max_images: the number of its images to measure, chosen in the same way. Default: all.
    image_size: pixels of a side that the model sees.
    resize: pixels of the shorter side before the central crop. Default: `image_size`.
    batch_size: images in a batch, of all devices together.
    seed: seed of the morphers.

  Raises:
    OptionError: the task has no text tower for `prompts`, or `fit_evenly` is set for a data set that can only
      be read in sequence.
  """

  def __init__(
    self,
    context: Context,
    *,
    dataset: Section,
    morphers: Section,
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
    self.names = (UNMORPHED, *morphers)
    test, fit_set = (evaluators.open_dataset(dataset, each) for each in (split, fit))
    evaluators.require_same_classes(test, fit_set)
    self.test, self._max_images, self._max_fit = datasets.spread(test, max_images), max_images, max_fit
    if fit_evenly and max_fit is not None:
      self._fit = datasets.evenly(fit_set, max_fit)
    else:
      self._fit = datasets.spread(fit_set, max_fit)
    self._view: dict[str, Any] = dict(batch_size=batch_size, image_size=image_size, resize=resize)
    self._context = context
    self._class_embeddings = None
    if prompts is not None:
      if context.tokenize is None:
        raise OptionError(f"prompts={prompts!r} need a text tower, and this task has none. Set prompts=None.")
      self._class_embeddings = ClassEmbeddings(context, self.test, prompts)
    assigns = [plugins.build("morphers", options) for options in morphers.values()]
    self._tokens = MorphedTokens(context.function(tokens), assigns, context.mesh, seed)

  def run(self, state: PyTree) -> Iterator[tuple[str, float]]:
    """Yield "<way>_linear" and "<way>_cosine" of each way, and "<way>_linear_purity" of each morpher.

    With prompts there are also "<way>_zeroshot" and "<way>_zeroshot_purity".

    Raises:
      OptionError: the tokens are not a square grid, or a label is not one of the data set's classes.
    """
    probes_SDG = np.stack([probe.solve() for probe in self._linear_probes(state)])
    weights = {"linear": probes_SDG.astype(np.float32)} | self._zeroshot_weights(state)
    num_tokens = 0
    sums: dict[str, float] = collections.defaultdict(float)
    measure = lambda state, batch: self._tokens.measure(state, batch, weights)
    for found, label_B in self._batches(measure, state, self.test, self._max_images):
      tokens_each = found["linear"].shape[2]
      num_tokens += len(label_B) * tokens_each
      for index, name in enumerate(self.names):
        sums[f"{name}_cosine"] += float(found["cosine"][:, index].astype(np.float64).sum()) * tokens_each
        for kind in weights:
          sums[f"{name}_{kind}"] += int((found[kind][:, index] == label_B[:, None]).sum())
          if index:
            sums[f"{name}_{kind}_purity"] += int(found[f"{kind}_agreeing"][:, index].sum())
    for name, value in sums.items():
      yield name, value / num_tokens

  def examples(self, state: PyTree, count: int) -> Examples:
    """Return `count` images: the first of each class in the order of the data set, then the second ones, ...

    They are morphed in the same batches as in `run`, so they have the same groups.

    Raises:
      OptionError: there are no prompts, so there are no zero-shot classes to show.
    """
    weights = self._zeroshot_weights(state)
    if not weights:
      raise OptionError("Examples are shown with their zero-shot classes. Set prompts to a set of templates.")
    num_classes, image_of = len(self.test.class_names or ()), self._context.function("image")

    def show(state: PyTree, batch: Batch) -> tuple:
      return batch["image"], batch["index"], image_of(state, batch), *self._tokens.show(state, batch, weights)

    seen: collections.Counter[int] = collections.Counter()
    rows: list[tuple] = []
    for outputs, label_B in self._batches(show, state, self.test, self._max_images):
      for row, label in enumerate(label_B.tolist()):
        rows.append((seen[label], len(rows), label, *(x[row] for x in outputs)))
        seen[label] += 1
      rows = sorted(rows, key=lambda row: row[:2])[:count]  # the others can't be chosen any more
      if len(seen) >= min(count, num_classes) and sum(seen.values()) >= count:
        break
    label_B, image, index, embedding_BC, token_BSNC, group_BSN, zeroshot_BSN = map(
      np.stack, list(zip(*rows, strict=True))[2:]
    )
    predicted_B = np.asarray(classify(embedding_BC[:, None], weights["zeroshot"][0]))[:, 0]
    return Examples(image, index, label_B, predicted_B, token_BSNC, group_BSN, zeroshot_BSN)

  def _zeroshot_weights(self, state: PyTree) -> dict[str, Float[np.ndarray, "S D G"]]:
    """Return the class embeddings as weights of `classify`: without bias, and equal in all ways."""
    if self._class_embeddings is None:
      return {}
    weights_DG = np.pad(self._class_embeddings(state).T, ((0, 1), (0, 0)))
    return {"zeroshot": np.broadcast_to(weights_DG, (len(self.names), *weights_DG.shape))}

  def _linear_probes(self, state: PyTree) -> list[LeastSquares]:
    """Return a classifier of single tokens for each way, fitted on tokens that were morphed in this way."""
    probes: list[LeastSquares] = []
    for (token_BSNC, _), label_B in self._batches(self._tokens.morph, state, self._fit, self._max_fit):
      size = token_BSNC.shape[-1], len(self.test.class_names or ())
      probes = probes or [LeastSquares(*size) for _ in self.names]
      for index, probe in enumerate(probes):
        probe.add(token_BSNC[:, index], label_B)
    return probes

  def _batches(
    self, function: Callable[..., Any], state: PyTree, dataset: data.Dataset, limit: int | None
  ) -> Iterator[tuple[Any, np.ndarray]]:
    """Yield the outputs and labels of the first `limit` images, or of all."""
    left = dataset.num_examples if limit is None else limit
    enough = -(-left // self._view["batch_size"])
    batches = data.eval_batches(dataset, max_batches=enough, **self._view)
    batches = (data.require_labels(batch, dataset) for batch in batches)
    for outputs, label_B in evaluators.batch_outputs(function, state, batches, self._context.mesh):
      yield jax.tree.map(lambda x, left=left: x[:left], outputs), label_B[:left]
      left -= len(label_B)
