"""Zero-shot accuracy: an image takes the class whose prompts it is most similar to."""

import math
from collections.abc import Iterator

import numpy as np

from dtm_jax import data, evaluators
from dtm_jax.arrays import PyTree
from dtm_jax.evaluators import Context
from dtm_jax.evaluators.classification import label_rank
from dtm_jax.models.clip import prompts as prompt_sets
from dtm_jax.training import mesh as meshes


class Evaluator:
  """Prompt ensembling as in CLIP (arXiv 2103.00020): a class is the mean of its prompts' unit embeddings.

  Args:
    context: needs the predict functions "image" and "text" embeddings of one space.
    tokenize: captions -> int32 [n, T].
    dataset: options of the data set, `name` among them; it must know its classes.
    prompts: the name of a set of templates, or a file of them (see `prompts`).
    class_names: a file of names; None: those that the set of templates brings, or else the data set's.
    split: None: val or test, by any of their names, whichever there is first.
    text_batch_size: captions that are embedded at once, by all devices together.
  """

  def __init__(
    self,
    context: Context,
    *,
    dataset,
    prompts: str,
    class_names: str | None = None,
    split: str | None = None,
    image_size: int,
    resize: int | None = None,
    batch_size: int = 512,
    text_batch_size: int = 512,
  ):
    self._image = context.function("image")
    self._mesh = context.mesh
    self._dataset = evaluators.open_dataset(dataset, split)
    self._class_embeddings = ClassEmbeddings(
      context, self._dataset, prompts, class_names=class_names, batch_size=text_batch_size
    )
    self._options = dict(batch_size=batch_size, image_size=image_size, resize=resize)

  def run(self, state: PyTree) -> Iterator[tuple[str, float]]:
    """Yields accuracy and top5: shares of the split's images, counted in integers.

    Raises:
      ValueError: a label is none of the data set's classes.
    """
    class_GE = self._class_embeddings(state)
    count, right1, right5 = 0, 0, 0
    batches = evaluators.labelled_outputs(self._image, state, self._dataset, self._mesh, **self._options)
    for image_BE, label_B in batches:
      rank_B = label_rank(image_BE @ class_GE.T, label_B)
      count += len(label_B)
      right1 += int(np.sum(rank_B < 1))
      right5 += int(np.sum(rank_B < 5))
    yield "accuracy", right1 / count
    yield "top5", right5 / count


class ClassEmbeddings:
  """The classes of a data set in the space of a text tower: [G, E], of unit length.

  All captions go through the tower in batches of one shape, so it compiles once. The devices of the mesh
  share each batch.

  Raises:
    ValueError: the captions cannot be made (see `prompts.captions`), or the task has no text tower.
  """

  def __init__(
    self,
    context: Context,
    dataset: data.Dataset,
    prompts: str,
    *,
    class_names: str | None = None,
    batch_size: int = 512,
  ):
    self._text = context.function("text")
    captions_GP = prompt_sets.captions(
      dataset.class_names, prompts, names_file=class_names, dataset=f"data set {dataset.name!r}"
    )
    self._tokens_GPT = np.stack([context.tokenize(captions_P) for captions_P in captions_GP])
    self._mesh, self._batch_size = context.mesh, batch_size

  def __call__(self, state: PyTree) -> np.ndarray:
    num_classes, num_prompts, length = self._tokens_GPT.shape
    tokens_BT = self._tokens_GPT.reshape(-1, length)
    devices = self._mesh.size
    size = math.ceil(min(self._batch_size, len(tokens_BT)) / devices) * devices
    padded_BT = np.pad(tokens_BT, ((0, -len(tokens_BT) % size), (0, 0)), mode="edge")
    text_BE = np.concatenate([self._embed(state, rows) for rows in padded_BT.reshape(-1, size, length)])
    text_GPE = text_BE[: len(tokens_BT)].reshape(num_classes, num_prompts, -1)
    return _unit(_unit(text_GPE).mean(axis=1))

  def _embed(self, state: PyTree, tokens_BT: np.ndarray) -> np.ndarray:
    batch = meshes.place({"tokens": tokens_BT}, {"tokens": meshes.batch_sharding(self._mesh)})
    return np.asarray(self._text(state, batch))


def _unit(x: np.ndarray) -> np.ndarray:
  return x / np.linalg.norm(x, axis=-1, keepdims=True)
