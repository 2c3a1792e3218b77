"""Load SigLIP, DINOv2, MAE and the plain vision transformer from files.

    config, params = load("facebook/dinov2-base", ["dinov2"])     # or a folder, or the authors' .pth

The tensors have the names of `transformers`, with its config.json in the same folder, or the names of
DINOv2's and MAE's authors (see `frozen_vit.author_files`).

Tensors and parameters must match exactly, except for tensors that the patch tokens do not depend on (`unused`
of a family in `frozen_vit.config`). The log names those; an error lists all others that do not match.
"""

from collections.abc import Sequence
from pathlib import Path

from dtm_jax.arrays import PyTree
from dtm_jax.errors import NotThereError, OptionError
from dtm_jax.models.files import weight_files, weight_names
from dtm_jax.models.files.file_checks import UnreadableFileError, blaming
from dtm_jax.models.files.weight_files import CONFIG, Found
from dtm_jax.models.frozen_vit import author_files
from dtm_jax.models.frozen_vit.config import FAMILIES
from dtm_jax.models.frozen_vit.model import FrozenViTConfig, param_shapes

AUTHORS = {"dinov2": "dinov2", "mae": "vit_mae"}
"""From the families that `author_files` reads to their `model_type` in transformers."""


def load(
  path_or_repo: str | Path | Found,
  model_types: Sequence[str],
  *,
  revision: str | None = None,
  heads: int | None = None,
) -> tuple[FrozenViTConfig, PyTree]:
  """Return the configuration and the parameters (NumPy float32) in a file, folder or repository.

  Args:
    path_or_repo: a file, a folder, a repository of the hub, or the result of `weight_files.find`.
    model_types: the accepted keys of `frozen_vit.config.FAMILIES`.
    revision: branch, tag or commit of the repository.
    heads: needed only for the authors' names at a size that was not published.

  Returns:
    The configuration and the parameters. Heads are None if they are unknown.

  Raises:
    NotThereError: a file is missing.
    OptionError: `heads` contradicts config.json.
    UnreadableFileError: the model has another type, or names or shapes do not match; the message lists them.
  """
  found = weight_files.find(path_or_repo, revision=revision)
  tensors = weight_files.read(found)
  content = found.json(CONFIG)
  kind, source, config_file = content.get("model_type"), str(found.file), found.folder / CONFIG
  if kind is None and author_files.ANCHOR in tensors:
    family = author_files.family_of(tensors)
    if AUTHORS[family] not in model_types:
      raise UnreadableFileError(
        f"{source} has the names of {family.upper()}'s authors, but the teacher needs one of: "
        f"{', '.join(model_types)} (in transformers' names, with a config.json)."
      )
    return author_files.from_authors(tensors, source=source, heads=heads, content=content)
  if not content:
    raise NotThereError(
      f"No {CONFIG} beside {source}. {', '.join(model_types)} in transformers' names need one. The file has "
      f"the tensors {', '.join(list(tensors)[:5])}, ..."
    )
  if kind not in model_types:
    raise UnreadableFileError(f"model_type {kind!r} in {config_file} is none of: {', '.join(model_types)}.")
  family_of_kind = FAMILIES[str(kind)]
  with blaming(config_file):
    config, rules = family_of_kind.from_transformers(content)
    expected = param_shapes(config)
  if heads is not None and heads != config.tower.num_heads:
    raise OptionError(f"heads={heads}, but {config_file} says {config.tower.num_heads}.")
  tensors = {name.removeprefix(family_of_kind.prefix): tensor for name, tensor in tensors.items()}
  tensors = weight_names.without_unused(tensors, family_of_kind.unused, source)
  return config, weight_names.to_ours(tensors, expected, rules, source=source)
