"""Both towers of a trained CLIP, for evaluators such as zero-shot classification. Nothing is learned."""

import dataclasses
from typing import Any

from dtm_jax.arrays import Array, Batch, Float, PyTree
from dtm_jax.augment import normalize, to_float
from dtm_jax.models.clip import model as clip
from dtm_jax.models.clip import shapes as clip_shapes
from dtm_jax.models.clip import weights as clip_weights
from dtm_jax.models.clip.tokenizer import load_tokenizer
from dtm_jax.models.files import weight_files
from dtm_jax.normalizations import Triple
from dtm_jax.tasks import Output, Run, State
from dtm_jax.tasks._untrained import Untrained, require_no_steps
from dtm_jax.teachers.clip import clip_mean_and_std


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class FrozenCLIP(Untrained):
  """The outputs are "image", "patches" and "text".

  Attributes:
    normalization: mean and standard deviation of the image tower's input.
  """

  model: clip.CLIP
  normalization: tuple[Triple, Triple]

  @property
  def outputs(self) -> dict[str, Output]:
    return {"image": self.image, "patches": self.patches, "text": self.text}

  def image(self, state: State, frozen: PyTree, batch: Batch) -> Float[Array, "B P"]:
    """Return the embedding of each image."""
    return self.model.apply({"params": frozen}, self._pixels(batch), method="encode_image")

  def patches(self, state: State, frozen: PyTree, batch: Batch) -> Float[Array, "B N P"]:
    """Return the embedding of each patch."""
    return self.model.apply({"params": frozen}, self._pixels(batch), method="encode_patches")

  def text(self, state: State, frozen: PyTree, batch: Batch) -> Float[Array, "B P"]:
    """Return the embedding of each caption."""
    return self.model.apply({"params": frozen}, batch["tokens"], method="encode_text")

  def _pixels(self, batch: Batch) -> Float[Array, "B H W 3"]:
    return normalize(to_float(batch["image"]), *self.normalization)


def build(config: Any, run: Run) -> FrozenCLIP:
  """Build the task from the section clip: path, revision, normalization, dtype, heads, activation, weights.

  The options are those of the CLIP teacher, but `heads` is a pair: of the image and of the text tower.

  Raises:
    OptionError: the run has steps to train, or the CLIP has no text tower.
  """
  options = config.clip
  require_no_steps(run, f"CLIP {options.path}")
  found = weight_files.find(options.path, revision=options.revision, weights=options.get("weights"))
  clip_config, params = clip_weights.load(
    found, heads=options.get("heads"), activation=options.get("activation")
  )
  clip_shapes.check_known(clip_config, str(found.file), text=True, options=clip_shapes.flags("clip"))
  return FrozenCLIP(
    frozen=params,
    tokenize=load_tokenizer(found.folder, clip_config),
    model=clip.CLIP(clip_config, dtype=options.dtype),
    normalization=clip_mean_and_std(options.normalization, found),
  )
