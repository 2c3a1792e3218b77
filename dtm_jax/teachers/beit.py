"""BEiT (arXiv 2106.08254), BEiT v2 and data2vec's vision transformer: the student's own trunk, frozen.

Any names that `models.vit_weights` reads: the authors', timm's or transformers'. The tokens are those after
the final LayerNorm, which a checkpoint fine-tuned with mean pooling no longer has.
"""

import numpy as np

from dtm_jax.arrays import PyTree
from dtm_jax.errors import OptionError
from dtm_jax.models.files import weight_files
from dtm_jax.models.files.file_checks import UnreadableFileError
from dtm_jax.models.files.weight_files import Found
from dtm_jax.models.vit import config as vit_config
from dtm_jax.models.vit import weights as vit_weights
from dtm_jax.teachers import Normalization, Teacher, mean_and_std_of, of_student

PREFIXES = {"beit": "beit.", "data2vec-vision": "data2vec_vision."}


def build(
  path: str = "microsoft/beit-base-patch16-224-pt22k",
  *,
  revision: str | None = None,
  normalization: Normalization | None = None,
  dtype: str = "float32",
  image_size: int | None = None,
  heads: int | None = None,
  weights: str | None = None,
) -> Teacher:
  """Return a frozen BEiT.

  Args:
    path: a file, a folder, or a repository of the hub.
    revision: of the repository.
    normalization: None (what the checkpoint says of itself, or else BEiT v2's, which is ImageNet's), a name
      ("imagenet", "clip", "inception"), or a pair (mean, std).
    dtype: of the matrix products.
    image_size: pixels of a side; where it is not the checkpoint's, position embeddings and tables of relative
      biases are resized as for a student that goes on at this size.
    heads: only where neither config.json nor a table of relative positions tells them.
    weights: the container of the model, for a file that holds several (see `models.checkpoint_contents`).

  Raises:
    OptionError: nothing tells the heads, or the image is not a whole number of patches.
    UnreadableFileError: there is no final LayerNorm, or names or shapes do not match.
    NotThereError: a file is missing.
  """
  found = weight_files.find(path, revision=revision, weights=weights)
  content = found.json(weight_files.CONFIG)  # a .pth may stand alone
  heads = heads or content.get("num_attention_heads")
  params = (
    _of_transformers(found, content) if "model_type" in content else vit_weights.load(found, num_heads=heads)
  )
  if "norm" not in params:
    raise UnreadableFileError(
      f"{path} has no LayerNorm of its patch tokens: mean pooling normalises their mean."
    )
  params = {name: part for name, part in params.items() if name != "head"}
  params.setdefault("mask_token", np.zeros_like(params["cls_token"]))  # no patch is hidden from a teacher
  shapes = {name: tensor.shape for name, tensor in vit_weights.to_authors(params).items()}
  model, grid = vit_config.describe(shapes, num_heads=heads)
  if grid is None:
    raise OptionError(f"{path} has no positions that tell its grid of patches.")
  mean, std = mean_and_std_of(normalization, found, "imagenet")
  return of_student(
    f"beit {path}", model.clone(dtype=dtype), params, grid=grid, image_size=image_size, mean=mean, std=std
  )


def _of_transformers(found: Found, content: dict) -> PyTree:
  """A BeitModel, with or without a head, or the like of data2vec, which has its names and its shape."""
  kind = content["model_type"]
  if kind not in PREFIXES:
    raise UnreadableFileError(
      f"model_type {kind!r} in {found.folder / weight_files.CONFIG} is none of: {', '.join(PREFIXES)}."
    )
  tensors = weight_files.read(found)
  tensors = {name.removeprefix(PREFIXES[kind]): tensor for name, tensor in tensors.items()}
  tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("classifier.")}
  if "layernorm.weight" not in tensors:
    raise UnreadableFileError(
      f"{found.file} has no LayerNorm of its patch tokens: mean pooling normalises their mean."
    )
  tensors.setdefault("embeddings.mask_token", np.zeros_like(tensors["embeddings.cls_token"]))
  # The layers that a backbone hands out are of no concern here, and data2vec's need not exist.
  config = {name: value for name, value in content.items() if name not in ("out_indices", "out_features")}
  return vit_weights.from_transformers(tensors, config | {"model_type": "beit"}, source=str(found.file))
