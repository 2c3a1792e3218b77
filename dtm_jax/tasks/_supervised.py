"""The common part of `finetune` and `segment`: a vision transformer with a head, from a student or random."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax

from dtm_jax.arrays import Array, Batch, Float, PyTree, RandomKey
from dtm_jax.augment import normalize, to_float
from dtm_jax.errors import OptionError
from dtm_jax.models.vit import model as vit
from dtm_jax.models.vit import transfer as vit_transfer
from dtm_jax.normalizations import Triple
from dtm_jax.tasks import Learner, Task
from dtm_jax.training import pretrained


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Supervised(Task):
  """A task that trains a whole network on labels.

  Attributes:
    augmentation: the section of the config.
    normalization: mean and standard deviation of the model's input.
    init_from: the section of the config. Its path names a run's workdir or weights, or is empty.
  """

  model: vit.Trunk
  image_size: int
  num_classes: int
  augmentation: Mapping[str, Any]
  normalization: tuple[Triple, Triple]
  learner: Learner
  init_from: Mapping[str, Any]

  def pretrained(self, key: RandomKey) -> PyTree | None:
    """Read the parameters of `init_from.path` and fit them to the model.

    Raises:
      OptionError: they do not fit. The message names both shapes.
    """
    options = dict(self.init_from)
    path, weights = options.pop("path"), options.pop("weights", None)
    if not path:
      return None
    given = pretrained.load(path, num_heads=self.model.num_heads, weights=weights)
    initial = jax.jit(self._init_params)(key)
    grid = (self.image_size // self.model.patch_size,) * 2
    try:
      return vit_transfer.to_finetune(given, initial, grid=grid, **options)
    except ValueError as error:
      raise OptionError(f"init_from.path={path}: {error}") from error

  def _init_params(self, key: RandomKey) -> PyTree:
    return vit.init(self.model, key, self.image_size)

  def _pixels(self, batch: Batch) -> Float[Array, "B H W 3"]:
    """Return the normalised images of a batch that is not augmented."""
    return normalize(to_float(batch["image"]), *self.normalization)
