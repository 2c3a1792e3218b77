"""Find the weights of a model in a file, a folder or a repository of the Hugging Face hub.

found = find("openai/clip-vit-base-patch16")
tensors = read(found)                     # {name: array}, see `checkpoint_contents`
config = found.json(CONFIG)               # {} if there is no such file
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

from etils import epath
from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from dtm_jax.errors import NotThereError
from dtm_jax.models.files import weight_formats
from dtm_jax.models.files.file_checks import read_json
from dtm_jax.models.files.weight_formats import Tensors
from dtm_jax.storage import local_copies, paths

CONFIG, OPEN_CLIP_CONFIG = CONFIGS = ("config.json", "open_clip_config.json")
PREPROCESSOR, PROCESSOR = "preprocessor_config.json", "processor_config.json"
TOKENIZER = "tokenizer.json"
SIDE_FILES = (*CONFIGS, PREPROCESSOR, PROCESSOR, TOKENIZER)
NAMES = (
  "model.safetensors",
  "model.safetensors.index.json",
  "open_clip_model.safetensors",
  "pytorch_model.bin",
  "pytorch_model.bin.index.json",
  "open_clip_pytorch_model.bin",
  "flax_model.msgpack",
)
"""The names of weights to look for in a folder or repository, in this order."""


class Found(NamedTuple):
  """A file of weights that exists.

  Attributes:
    file: the weights, or the index of their shards.
    weights: the container of the model, if the file holds several models (see `checkpoint_contents`).
  """

  file: Path
  weights: str | None = None

  @property
  def folder(self) -> Path:
    """Return the folder of the weights and of the side files."""
    return self.file.parent

  def beside(self, name: str) -> Path | None:
    """Return the side file of this name, or None if there is none."""
    path = self.folder / name
    return path if path.is_file() else None

  def json(self, name: str) -> dict[str, Any]:
    """Return the content of a side file, or {} if there is none.

    Raises:
      UnreadableFileError: the side file holds no JSON object.
    """
    path = self.beside(name)
    return read_json(path) if path else {}


def read(found: Found) -> Tensors:
  """Return the named tensors of the model.

  Raises:
    UnreadableFileError: the file is damaged, cut short, unsafe, or no file of weights; the message names it.
    OptionError: the file holds several models, and `found.weights` does not name one.
  """
  return weight_formats.read(found.file, weights=found.weights)


def find(
  path_or_repo: str | Path | Found, *, revision: str | None = None, weights: str | None = None
) -> Found:
  """Return the weights in a file, a folder or a repository of the hub. A `Found` is returned unchanged.

  Asks the hub only for files that its cache lacks, and never if HF_HUB_OFFLINE is set. Copies a file or
  folder in a bucket into a cache first.

  Args:
    revision: branch, tag or commit of the repository.
    weights: the container of the model, if the file holds several models (see `checkpoint_contents`).

  Raises:
    NotThereError: the configuration or the weights are missing; the message says how to get them.
    UnreadableFileError: the file has an unknown format.
  """
  if isinstance(path_or_repo, Found):
    return path_or_repo
  if paths.is_remote(path_or_repo):
    path = _copy_from_bucket(str(path_or_repo))
  else:
    path = Path(path_or_repo).expanduser()
  if path.is_file():
    weight_formats.check_known(path)
    return Found(path, weights)
  if path.is_dir():
    if missing := _missing(path):
      where = path_or_repo if paths.is_remote(path_or_repo) else path
      raise NotThereError(
        f"No {missing} in the folder {where}. {_others(path)}{_HOW_TO_GET.format(repo='OWNER/NAME')}"
      )
    return Found(_first(path), weights)
  repo = str(path_or_repo)
  if path.is_symlink():
    raise NotThereError(f"{path} is a link to {path.readlink()}, which does not exist.")
  if repo.startswith(("/", "~", ".")) or repo.count("/") != 1:
    raise NotThereError(
      f"There is no folder {path}, no such file, and {repo!r} is no repository OWNER/NAME of the hub."
    )
  return Found(_first(_snapshot(repo, revision)), weights)


def _copy_from_bucket(url: str) -> Path:
  """Copy a file or folder of weights, its side files and all shards. Return the local file or folder."""
  place = paths.resolve(url)
  is_file = place.name.endswith((*weight_formats.READERS, weight_formats.INDEX)) and not place.is_dir()
  folder = place.parent if is_file else place
  if is_file and not place.exists():
    raise NotThereError(f"There is no file {url}.")
  file: epath.Path | None = (
    place if is_file else next((folder / name for name in NAMES if (folder / name).exists()), None)
  )
  wanted = [] if file is None else [file.name]
  if file is not None and file.name.endswith(weight_formats.INDEX):
    wanted += _shards_in(file)
  local = local_copies.local_copy(folder, [*wanted, *SIDE_FILES])
  return local / place.name if is_file else local


def _shards_in(index: epath.Path) -> list[str]:
  """Return the files that an index names, or none if it is damaged, because its reader reports that."""
  try:
    return sorted(set(json.loads(index.read_text())["weight_map"].values()))
  except (ValueError, KeyError, TypeError, AttributeError):
    return []


def _first(folder: Path) -> Path:
  return next(folder / name for name in NAMES if (folder / name).is_file())


def _snapshot(repo: str, revision: str | None) -> Path:
  """Return the local folder of a repository. Fetches only the first of NAMES that the repository has."""
  fetches = [([*NAMES, *SIDE_FILES], True)]
  if not constants.HF_HUB_OFFLINE:
    shards = {"model.safetensors": "model-*.safetensors", "pytorch_model.bin": "pytorch_model-*.bin"}
    fetches += [([name, *SIDE_FILES, *_shards_of(name, shards)], False) for name in NAMES]
  missing = f"{' or '.join(CONFIGS)} and no {' or '.join(NAMES)}"
  reason: Exception | None = None
  for files, local_files_only in fetches:
    try:
      folder = Path(
        snapshot_download(repo, revision=revision, allow_patterns=files, local_files_only=local_files_only)
      )
      missing = _missing(folder)
      if not missing:
        return folder
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
      reason = error
      if not local_files_only:
        break
  looked = f"{repo!r} (revision {revision or 'main'}) in the hub's cache {constants.HF_HUB_CACHE}"
  hub = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the download from the hub failed"
  raise NotThereError(
    f"{repo!r} can be a folder or a repository of the hub. There is no folder {Path.cwd() / repo}. "
    f"There is no {missing} of {looked}, and {hub}. {_HOW_TO_GET.format(repo=repo)}"
  ) from reason


def _shards_of(name: str, shards: dict[str, str]) -> list[str]:
  return [shards[name.removesuffix(".index.json")]] if name.endswith(".index.json") else []


_HOW_TO_GET = (
  "Run `hf download {repo}` on a machine with network and copy the folder, or give the path of a file."
)


def _missing(folder: Path) -> str:
  """Return the names of missing files for a message, or an empty string."""
  groups = (CONFIGS, NAMES)
  return " and no ".join(
    " or ".join(names) for names in groups if not any((folder / name).is_file() for name in names)
  )


def _others(folder: Path) -> str:
  """Return a sentence about other files of weights in the folder, or an empty string."""
  others = [
    path.name for path in sorted(folder.iterdir()) if path.name.endswith(tuple(weight_formats.READERS))
  ]
  others = [name for name in others if name not in NAMES]
  return f"It has {', '.join(others[:5])}: give the path of one of these files. " if others else ""
