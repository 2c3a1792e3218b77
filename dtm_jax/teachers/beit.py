"""BEiT (arXiv 2106.08254), BEiT v2 (arXiv 2208.06366) and data2vec's vision transformer (arXiv 2202.03555).

They have the trunk of the student. The weights may have any names that `vit.weights` loads.
"""

from typing import Any

import numpy as np

from dtm_jax.arrays import PyTree
from dtm_jax.errors import OptionError
from dtm_jax.models.files import weight_files
from dtm_jax.models.files.file_checks import UnreadableFileError
from dtm_jax.models.files.weight_files import Found
from dtm_jax.models.vit import config as vit_config
from dtm_jax.models.vit import weights as vit_weights
from dtm_jax.teachers import Normalization, Teacher, mean_and_std_of
from dtm_jax.teachers._student import of_student

PREFIXES = {"beit": "beit.", "data2vec-vision": "data2vec_vision."}
_NO_NORM = (
  "{} has no final LayerNorm for its patch tokens. A model with mean pooling normalises only their mean."
)


def build(
  path: str = "microsoft/beit-base-patch16-224-pt22k",
  *,
  revision: str | None = None,
  normalization: Normalization | None = None,
  dtype: str = "float32",
  attention: str = "xla",
  stream_dtype: str = "float32",
  image_size: int | None = None,
  layer: int | None = None,
  heads: int | None = None,
  weights: str | None = None,
) -> Teacher:
  """Return a frozen BEiT with its patch tokens after the final LayerNorm.

  Raises an UnreadableFileError for a checkpoint without this LayerNorm, such as one fine-tuned with mean
  pooling. The options are those of `dtm_jax.teachers`. The normalisation of the family is ImageNet's. `heads`
  is needed only if neither config.json nor a table of relative position biases gives it.
  """
  found = weight_files.find(path, revision=revision, weights=weights)
  content = found.json(weight_files.CONFIG)  # {} for a .pth that stands alone
  heads = heads or content.get("num_attention_heads")
  if "model_type" in content:
    params = _load_transformers(found, content)
  else:
    params = vit_weights.load(found, num_heads=heads)
  if "norm" not in params:
    raise UnreadableFileError(_NO_NORM.format(path))
  params = {name: part for name, part in params.items() if name != "head"}
  params.setdefault("mask_token", np.zeros_like(params["cls_token"]))  # a teacher hides no patch
  shapes = {name: tensor.shape for name, tensor in vit_weights.to_authors(params).items()}
  model, grid = vit_config.describe(shapes, num_heads=heads)
  if grid is None:
    raise OptionError(f"{path} has no positions, so its grid of patches is unknown.")
  mean, std = mean_and_std_of(normalization, found, "imagenet")
  model = model.clone(dtype=dtype, attention=attention, stream_dtype=stream_dtype)
  return of_student(
    f"beit {path}", model, params, grid=grid, image_size=image_size, layer=layer, mean=mean, std=std
  )


def _load_transformers(found: Found, content: dict[str, Any]) -> PyTree:
  """Return the parameters of a BeitModel or a Data2VecVisionModel without a head. Both share their names."""
  kind = content["model_type"]
  if kind not in PREFIXES:
    raise UnreadableFileError(
      f"model_type {kind!r} in {found.folder / weight_files.CONFIG} is none of: {', '.join(PREFIXES)}."
    )
  tensors = weight_files.read(found)
  tensors = {name.removeprefix(PREFIXES[kind]): tensor for name, tensor in tensors.items()}
  tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("classifier.")}
  if "layernorm.weight" not in tensors:
    raise UnreadableFileError(_NO_NORM.format(found.file))
  tensors.setdefault("embeddings.mask_token", np.zeros_like(tensors["embeddings.cls_token"]))
  # These entries name a backbone's output layers, which data2vec does not always have. We do not use them.
  config = {name: value for name, value in content.items() if name not in ("out_indices", "out_features")}
  return vit_weights.from_transformers(tensors, config | {"model_type": "beit"}, source=str(found.file))
