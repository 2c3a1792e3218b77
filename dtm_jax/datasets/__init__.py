"""Data sets: one module each, with `build(split, **options) -> data.Dataset`."""

import os
import pathlib


def cache_folder(cache_dir: str | os.PathLike | None = None) -> pathlib.Path:
  """Where downloads are kept: `cache_dir`, else $DTM_JAX_CACHE, else ~/.cache/dtm_jax."""
  return pathlib.Path(cache_dir or os.environ.get("DTM_JAX_CACHE") or "~/.cache/dtm_jax").expanduser()
