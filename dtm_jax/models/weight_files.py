"""Where weights lie, and how a file becomes {name: array}. Torch is never imported."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from safetensors.numpy import load_file

CONFIG, PREPROCESSOR, TOKENIZER = "config.json", "preprocessor_config.json", "tokenizer.json"
READERS: dict[str, Callable[[Path], dict[str, np.ndarray]]] = {"model.safetensors": load_file}
"""The files of weights that are looked for, in this order."""


def read(folder: Path) -> tuple[dict[str, np.ndarray], Path]:
  """The named tensors of the first file of READERS in `folder` (see `find`), and that file."""
  file = next(folder / name for name in READERS if (folder / name).exists())
  return READERS[file.name](file), file


def find(path_or_repo: str | Path, *, revision: str | None = None) -> Path:
  """The folder that holds the files: the given one, or the snapshot of a repository in the hub's cache.

  The network is asked only for what the cache lacks, and never where HF_HUB_OFFLINE is set.

  Raises:
    FileNotFoundError: the configuration or the weights are not there.
  """
  folder = Path(path_or_repo).expanduser()
  if folder.is_dir():
    if missing := _missing(folder):
      raise FileNotFoundError(f"No {missing} in the folder {folder}. {_HOW_TO_GET.format(repo='OWNER/NAME')}")
    return folder
  repo = str(path_or_repo)
  if repo.startswith(("/", "~", ".")) or repo.count("/") != 1:
    raise FileNotFoundError(f"There is no folder {folder}, and {repo!r} is not a repository 'owner/name'.")

  def snapshot(local_files_only: bool) -> Path:
    files = [*READERS, CONFIG, PREPROCESSOR, TOKENIZER]
    options = {"revision": revision, "allow_patterns": files, "local_files_only": local_files_only}
    return Path(snapshot_download(repo, **options))

  missing, reason = " and no ".join([CONFIG, *READERS]), None
  for local_files_only in (True,) if constants.HF_HUB_OFFLINE else (True, False):
    try:
      folder = snapshot(local_files_only)
      missing = _missing(folder)
      if not missing:
        return folder
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
      reason = error
  looked = f"{repo!r} (revision {revision or 'main'}) in the hub's cache {constants.HF_HUB_CACHE}"
  hub = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the hub did not give it"
  raise FileNotFoundError(f"No {missing} of {looked}, and {hub}. {_HOW_TO_GET.format(repo=repo)}") from reason


_HOW_TO_GET = (
  "On a machine with network, run `hf download {repo}`, or, with torch, where it has no safetensors, "
  "`transformers.CLIPModel.from_pretrained('{repo}').save_pretrained(folder)`; then copy the folder."
)


def _missing(folder: Path) -> str:
  weights = any((folder / name).exists() for name in READERS)
  names = ([] if (folder / CONFIG).exists() else [CONFIG]) + ([] if weights else [" or ".join(READERS)])
  return " and no ".join(names)
