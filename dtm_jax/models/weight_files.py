"""Where weights lie, and how a file becomes {name: array}. Torch is never imported."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from flax.serialization import msgpack_restore
from flax.traverse_util import flatten_dict
from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from safetensors.numpy import load_file

from dtm_jax.models import torch_files
from dtm_jax.models.torch_files import UnreadableFileError

Tensors = dict[str, np.ndarray]
CONFIG, OPEN_CLIP_CONFIG = CONFIGS = ("config.json", "open_clip_config.json")
PREPROCESSOR, TOKENIZER = "preprocessor_config.json", "tokenizer.json"
NAMES = (
  "model.safetensors",
  "model.safetensors.index.json",
  "open_clip_model.safetensors",
  "pytorch_model.bin",
  "pytorch_model.bin.index.json",
  "open_clip_pytorch_model.bin",
  "flax_model.msgpack",
)
"""The files of weights that are looked for in a folder or repository, in this order."""


def read(path: Path) -> tuple[Tensors, Path]:
  """The named tensors of a file, or of the first of NAMES in a folder (see `find`), and that file.

  Raises:
    ValueError: the file is damaged, cut short, unsafe, or of an unknown kind; names it.
  """
  file = path if path.is_file() else next(path / name for name in NAMES if (path / name).exists())
  try:
    return _reader(file)(file), file
  except (OSError, UnreadableFileError):
    raise
  except Exception as error:  # each library has exceptions of its own for a damaged file
    raise UnreadableFileError(f"{file} is damaged or cut short: {error}") from error


def find(path_or_repo: str | Path, *, revision: str | None = None) -> Path:
  """What `read` reads: the given file or folder, or the snapshot of a repository in the hub's cache.

  The network is asked only for what the cache lacks, and never where HF_HUB_OFFLINE is set.

  Raises:
    FileNotFoundError: the configuration or the weights are not there.
    ValueError: a file of an unknown kind.
  """
  path = Path(path_or_repo).expanduser()
  if path.is_file():
    _reader(path)
    return path
  if path.is_dir():
    if missing := _missing(path):
      raise FileNotFoundError(f"No {missing} in the folder {path}. {_HOW_TO_GET.format(repo='OWNER/NAME')}")
    return path
  repo = str(path_or_repo)
  if repo.startswith(("/", "~", ".")) or repo.count("/") != 1:
    raise FileNotFoundError(f"There is no folder {path}, no such file, and {repo!r} is no 'owner/name'.")
  return _snapshot(repo, revision)


def _snapshot(repo: str, revision: str | None) -> Path:
  """The folder of a repository with the first of NAMES that it has; of the others nothing is fetched."""
  beside = [*CONFIGS, PREPROCESSOR, TOKENIZER]
  fetches = [([*NAMES, *beside], True)]
  if not constants.HF_HUB_OFFLINE:
    shards = {"model.safetensors": "model-*.safetensors", "pytorch_model.bin": "pytorch_model-*.bin"}
    fetches += [([name, *beside, *_shards_of(name, shards)], False) for name in NAMES]
  missing, reason = f"{' or '.join(CONFIGS)} and no {' or '.join(NAMES)}", None
  for files, local_files_only in fetches:
    try:
      options = {"revision": revision, "allow_patterns": files, "local_files_only": local_files_only}
      folder = Path(snapshot_download(repo, **options))
      missing = _missing(folder)
      if not missing:
        return folder
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
      reason = error
      if not local_files_only:
        break
  looked = f"{repo!r} (revision {revision or 'main'}) in the hub's cache {constants.HF_HUB_CACHE}"
  hub = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the hub did not give it"
  raise FileNotFoundError(f"No {missing} of {looked}, and {hub}. {_HOW_TO_GET.format(repo=repo)}") from reason


def _shards_of(name: str, shards: dict[str, str]) -> list[str]:
  return [shards[name.removesuffix(".index.json")]] if name.endswith(".index.json") else []


_HOW_TO_GET = (
  "On a machine with network, run `hf download {repo}` and copy the folder; or give the path of a file."
)


def _missing(folder: Path) -> str:
  groups = (CONFIGS, NAMES)
  return " and no ".join(
    " or ".join(names) for names in groups if not any((folder / name).exists() for name in names)
  )


# Kinds of files ------------------------------------------------------------------------------------------


def _read_shards(index: Path) -> Tensors:
  """All tensors of the files that an index names, {"weight_map": {tensor: file}}."""
  names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
  if strange := [name for name in names if Path(name).name != name]:
    raise ValueError(f"it names files outside its folder: {', '.join(strange)}")
  if missing := [name for name in names if not (index.parent / name).exists()]:
    raise FileNotFoundError(f"{index} names {', '.join(missing)}, which are not beside it.")
  return {name: tensor for shard in names for name, tensor in read(index.parent / shard)[0].items()}


def _read_msgpack(file: Path) -> Tensors:
  """What `flax.serialization` wrote; the names have slashes."""
  return flatten_dict(msgpack_restore(file.read_bytes()), sep="/")


def _read_npz(file: Path) -> Tensors:
  with np.load(file, allow_pickle=False) as archive:
    return dict(archive)


READERS: dict[str, Callable[[Path], Tensors]] = {
  ".safetensors": load_file,
  ".index.json": _read_shards,
  **dict.fromkeys((".bin", ".pt", ".pth"), torch_files.load),
  ".msgpack": _read_msgpack,
  ".npz": _read_npz,
}
"""By the end of the file's name."""


def _reader(file: Path) -> Callable[[Path], Tensors]:
  for suffix, reader in READERS.items():
    if file.name.endswith(suffix):
      return reader
  raise ValueError(f"{file} is of an unknown kind. Known: {', '.join(READERS)}.")
