"""The classes of a data set as text embeddings."""

import math

import numpy as np

from dtm_jax.arrays import Float, Int, PyTree
from dtm_jax.data import Dataset
from dtm_jax.errors import OptionError
from dtm_jax.evaluators._context import Context
from dtm_jax.evaluators._unit_norm import unit_norm
from dtm_jax.models.clip import prompts as prompt_sets
from dtm_jax.training import mesh as meshes


class ClassEmbeddings:
  """Prompt ensembling as in CLIP (arXiv 2103.00020, section 3.1.4).

  The embedding of a class is the mean of the unit-norm embeddings of its P captions, at unit norm again. All
  captions go through the text tower in batches of one shape, so the tower compiles once. The devices of the
  mesh share each batch.

  Args:
    context: needs the predict function "text" and a tokenizer.
    dataset: a data set with class names.
    prompts: the name of a set of templates, or a file with one template on each line.
    class_names: a file with one class name on each line. Default: those that come with the templates, or
      else the data set's.
    batch_size: captions in a batch, of all devices together.

  Raises:
    OptionError: the task has no text tower, or the captions cannot be made (see `prompts.captions`).
  """

  def __init__(
    self,
    context: Context,
    dataset: Dataset,
    prompts: str,
    *,
    class_names: str | None = None,
    batch_size: int = 512,
  ):
    self._text = context.function("text")
    if context.tokenize is None:
      raise OptionError(f"prompts={prompts!r} need a text tower, and this task has none.")
    captions_GP = prompt_sets.captions(
      dataset.class_names, prompts, names_file=class_names, dataset=f"data set {dataset.name!r}"
    )
    self._tokens_GPT = np.stack([context.tokenize(captions_P) for captions_P in captions_GP])
    self._mesh, self._batch_size = context.mesh, batch_size

  def __call__(self, state: PyTree) -> Float[np.ndarray, "G E"]:
    """Return the unit-norm embeddings of the G classes."""
    num_classes, num_prompts, length = self._tokens_GPT.shape
    tokens_BT = self._tokens_GPT.reshape(-1, length)
    devices = self._mesh.size
    size = math.ceil(min(self._batch_size, len(tokens_BT)) / devices) * devices
    padded_BT = np.pad(tokens_BT, ((0, -len(tokens_BT) % size), (0, 0)), mode="edge")
    text_BE = np.concatenate([self._embed(state, rows) for rows in padded_BT.reshape(-1, size, length)])
    text_GPE = text_BE[: len(tokens_BT)].reshape(num_classes, num_prompts, -1)
    return unit_norm(unit_norm(text_GPE).mean(axis=1))

  def _embed(self, state: PyTree, tokens_BT: Int[np.ndarray, "B T"]) -> Float[np.ndarray, "B E"]:
    batch = meshes.place({"tokens": tokens_BT}, {"tokens": meshes.batch_sharding(self._mesh)})
    return np.asarray(self._text(state, batch))
