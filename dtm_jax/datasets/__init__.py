"""Data sets: one module each, with `build(split, **options) -> data.Dataset`.

Every `build` takes `data_dir`, the place of the files; None means the usual place.
"""

import os
import pathlib


def cache_folder(data_dir: str | os.PathLike | None = None) -> pathlib.Path:
  """Where downloads are kept: `data_dir`, else $DTM_JAX_CACHE, else ~/.cache/dtm_jax."""
  return pathlib.Path(data_dir or os.environ.get("DTM_JAX_CACHE") or "~/.cache/dtm_jax").expanduser()
