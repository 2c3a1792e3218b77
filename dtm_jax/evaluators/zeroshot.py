"""Zero-shot accuracy: an image takes the class whose prompts it is most similar to."""

from collections.abc import Iterator

import numpy as np
from jax.sharding import Mesh

from dtm_jax import data, evaluators, plugins
from dtm_jax import prompts as prompt_sets
from dtm_jax.arrays import PyTree


class Evaluator:
  """Prompt ensembling as in CLIP (arXiv 2103.00020): a class is the mean of its prompts' unit embeddings.

  Args:
    predict: needs "image" and "text" embeddings of one space.
    tokenize: captions -> int32 [n, T].
    dataset: options of the data set, `name` among them; it must know its class names.
    prompts: the name of a set of templates.
  """

  def __init__(
    self,
    predict: evaluators.Predict,
    mesh: Mesh,
    *,
    tokenize,
    dataset,
    prompts: str,
    split: str = "test",
    image_size: int,
    resize: int | None = None,
    batch_size: int = 512,
  ):
    self._image = evaluators.choose(predict, "image")
    self._mesh = mesh
    self._dataset = plugins.build("datasets", dataset, split=split)
    self._class_embeddings = ClassEmbeddings(predict, tokenize, self._dataset, prompts)
    self._batches = lambda: data.eval_batches(
      self._dataset, batch_size=batch_size, image_size=image_size, resize=resize
    )

  def run(self, state: PyTree) -> Iterator[tuple[str, float]]:
    """Yields ("accuracy", share of the split's images whose nearest class is theirs)."""
    class_GE = self._class_embeddings(state)
    image_BE, labels = evaluators.collect(self._image, state, self._batches(), self._mesh)
    predicted = np.argmax(image_BE @ class_GE.T, axis=-1)
    yield "accuracy", float(np.mean(predicted == labels))


class ClassEmbeddings:
  """The classes of a data set in the space of a text tower: [G, E], of unit length.

  Raises:
    ValueError: the templates are unknown, the data set has no class names, or the task has no text tower.
  """

  def __init__(self, predict: evaluators.Predict, tokenize, dataset: data.Dataset, prompts: str):
    self._text = evaluators.choose(predict, "text")
    captions_GP = prompt_sets.captions(dataset.class_names, prompts)
    self._tokens_GPT = np.stack([tokenize(captions_P) for captions_P in captions_GP])

  def __call__(self, state: PyTree) -> np.ndarray:
    return np.stack([self._mean(state, tokens_PT) for tokens_PT in self._tokens_GPT])

  def _mean(self, state: PyTree, tokens_PT: np.ndarray) -> np.ndarray:
    text_PE = np.asarray(self._text(state, {"tokens": tokens_PT}))
    return _unit(_unit(text_PE).mean(axis=0))


def _unit(x: np.ndarray) -> np.ndarray:
  return x / np.linalg.norm(x, axis=-1, keepdims=True)
