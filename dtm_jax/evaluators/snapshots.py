"""Watches the tokens of the same images over time: their groups, the cosine of neighbours, and the rank.

The groups of a few images go to WORKDIR/snapshots, from which the report of the run draws them. The numbers
need no labels, so this evaluator also suits runs on images without classes.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from dtm_jax import data, datasets, evaluators, morphing, processes
from dtm_jax.arrays import Array, Batch, Float, Int, PyTree
from dtm_jax.errors import OptionError
from dtm_jax.evaluators import Context, Section
from dtm_jax.evaluators._morphed_tokens import square_grid
from dtm_jax.evaluators._token_measures import adjusted_rand_index, effective_rank, neighbour_cosine
from dtm_jax.records import snapshots
from dtm_jax.training import mesh as meshes


class Evaluator:
  """Measures the tokens of the same images at every call. It costs one forward pass of one batch.

  Args:
    context: needs the predict functions `tokens`, [B, N, C] each, and the workdir for the groups.
    dataset: options of the data set, with its "name". Default: the set that the run trains on, which is
      not opened a second time.
    tokens: the kinds of tokens to compare. The agreement is that of the first with each other kind.
    split: the split of `dataset`. Default: val or test, by any of their usual names.
    max_images: the number of images that the numbers are measured on, all in one batch. They are the first
      ones, or evenly spaced ones if the first are not spread over the classes (`datasets.spread`).
    images: the number of images among them that are recorded with their groups, at even distances.
    groups: the number of groups of each image. Default: a quarter of the number of tokens.
    image_size: pixels of a side that the model sees. Default: that of the training images.
    resize: pixels of the shorter side before the central crop. Default: `image_size`.

  Raises:
    OptionError: there is no such split or function, `images` is above `max_images`, or an option has no
      default because the run trains on nothing.
  """

  def __init__(
    self,
    context: Context,
    *,
    dataset: Section | None = None,
    tokens: Sequence[str] = ("student_patches", "teacher_tokens"),
    split: str | None = None,
    max_images: int = 256,
    images: int = 16,
    groups: int | None = None,
    image_size: int | None = None,
    resize: int | None = None,
  ):
    if images > max_images:
      raise OptionError(f"images={images} must be at most max_images={max_images}.")
    self._predict = {name: context.function(name) for name in tokens}
    self._mesh, self._workdir, self._groups = context.mesh, context.workdir, groups
    found = context.training if dataset is None else evaluators.open_dataset(dataset, split)
    image_size = image_size or context.image_size
    if found is None or image_size is None:
      raise OptionError("There is no training set to take dataset and image_size from. Set both.")
    self._dataset = datasets.spread(found, max_images)
    self._max_images, self._images = max_images, images
    self._view: dict[str, Any] = dict(image_size=image_size, resize=resize)
    self._measure = jax.jit(self._measured, out_shardings=meshes.replicated(self._mesh))
    self._batch: Batch | None = None  # stays on the devices: the images are read once

  def run(self, state: PyTree) -> Iterator[tuple[str, float]]:
    """Yield "<tokens>_cosine" and "<tokens>_rank" of each kind, and "<tokens>_agreement" of the others.

    The cosine is that of tokens which share a side. The rank is RankMe (arXiv 2210.02885) of the mean tokens
    of the images, so it is at most `max_images`. The agreement is the adjusted Rand index of the groups.

    Raises:
      OptionError: the tokens are not a square grid, or no image can be read.
    """
    first = self._batch is None
    if self._batch is None:
      self._batch = meshes.to_device(self._read(), self._mesh)
    tokens = {name: predict(state, self._batch) for name, predict in self._predict.items()}
    with jax.default_matmul_precision("highest"):
      found, shown = jax.device_get(self._measure(tokens, self._batch))
    valid_B = found.pop("valid")
    evaluators.require_images(int(valid_B.sum()), self._dataset)
    kept = shown["valid"]
    groups = {name: label_BN[kept] for name, label_BN in shown["groups"].items()}
    for name, (cosine_B, mean_BC) in found.items():
      yield f"{name}_cosine", float(cosine_B[valid_B].astype(np.float64).mean())
      yield f"{name}_rank", effective_rank(mean_BC[valid_B])
    reference, *others = groups
    for name in others if kept.any() else ():
      pairs = zip(groups[reference], groups[name], strict=True)
      yield f"{name}_agreement", float(np.mean([adjusted_rand_index(*pair) for pair in pairs]))
    if self._workdir is not None and processes.is_first():
      self._record(
        int(state["step"]), {name: array[kept] for name, array in shown["batch"].items()}, groups, first
      )

  def _read(self) -> Batch:
    """Return the rows of this process, as many as the devices divide evenly."""
    devices = self._mesh.size
    batch_size = -(-min(self._max_images, self._dataset.num_examples) // devices) * devices
    batch = next(iter(data.eval_batches(self._dataset, batch_size=batch_size, max_batches=1, **self._view)))
    return {name: batch[name] for name in ("image", "label", "index", "valid")}

  def _measured(
    self, tokens: dict[str, Float[Array, "B N C"]], batch: Batch
  ) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return cosine and mean token of every image, and the recorded images with their groups."""
    count = len(batch["valid"])
    rows = np.arange(min(self._images, count)) * count // min(self._images, count)
    found: dict[str, Any] = {"valid": batch["valid"]}
    labels = {}
    for name, token_BNC in tokens.items():
      token_BNC = token_BNC.astype(jnp.float32)
      found[name] = (neighbour_cosine(token_BNC, square_grid(token_BNC.shape[1])), token_BNC.mean(axis=1))
      labels[name] = self._grouped(token_BNC[rows])
    batch_of_rows = {name: batch[name][rows] for name in ("image", "index", "label")}
    return found, {"valid": batch["valid"][rows], "batch": batch_of_rows, "groups": labels}

  def _grouped(self, token_BNC: Float[Array, "B N C"]) -> Int[Array, "B N"]:
    """Return `groups` groups of each image, found by rounds that each merge a sixteenth of the tokens."""
    num_tokens = left = token_BNC.shape[1]
    wanted, merges = self._groups or max(num_tokens // 4, 1), []
    while left > wanted:
      merges.append(min(max(num_tokens // 16, 1), left // 2, left - wanted))
      left -= merges[-1]
    return morphing.bipartite_match(token_BNC, jnp.array(merges or [0], jnp.int32))

  def _record(self, step: int, batch: Batch, groups: dict[str, Int[np.ndarray, "B N"]], first: bool) -> None:
    """Write the groups, and the images before the first of them. A failure is only logged."""
    assert self._workdir is not None
    try:
      if first:
        snapshots.write_images(self._workdir, batch["image"], batch["index"], batch["label"])
      snapshots.write_groups(self._workdir, step, batch["index"], groups)
    except Exception as error:  # each client of a bucket has its own errors
      logging.warning("The snapshot of step %d could not be written: %s", step, error)
