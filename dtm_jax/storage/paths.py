"""Resolve the paths that users give: local paths, or places in a bucket (`gs://bucket/x`, `s3://bucket/x`)."""

import os

from etils import epath

from dtm_jax.errors import OptionError
from dtm_jax.storage import object_stores


def is_remote(path: str | os.PathLike) -> bool:
  """Return whether the path is a URL such as `gs://bucket/x`, not a path of this machine."""
  return "://" in os.fspath(path)


def resolve(path: str | os.PathLike) -> epath.Path:
  """Return a local path as an absolute one with `~` expanded, and a URL as it is.

  Raises:
    OptionError: the URL is of an unknown kind, names no bucket, or needs a package that is missing.
  """
  text = os.fspath(path)
  scheme, _, rest = text.partition(":")
  if scheme in object_stores.PACKAGES and not rest.startswith("//"):
    raise OptionError(f"{text!r}: a bucket is written {scheme}://BUCKET/..., with two slashes.")
  if not is_remote(text):
    return epath.Path(os.path.abspath(os.path.expanduser(text)))
  if scheme not in object_stores.PACKAGES:
    kinds = ", ".join(f"{kind}://" for kind in object_stores.PACKAGES)
    raise OptionError(
      f"{text!r}: {scheme}:// is not supported. A path is local, or begins with one of {kinds}."
    )
  if not rest.strip("/"):
    raise OptionError(f"{text!r} names no bucket. Write {scheme}://BUCKET/FOLDER.")
  object_stores.connect(scheme, text)
  return epath.Path(f"{scheme}://{rest.strip('/')}")


def require_local(path: str | os.PathLike, option: str, reason: str) -> epath.Path:
  """Return the path as an absolute local one.

  Args:
    path: as the user gave it.
    option: what the user typed before the path, such as "--config.data.dataset.data_dir".
    reason: why the path has to be local, as the end of a sentence.

  Raises:
    OptionError: the path is in a bucket.
  """
  resolved = resolve(path)
  if is_remote(resolved):
    raise OptionError(
      f"{option}={os.fspath(path)}: this path has to be local, because {reason}. Copy it to a disk of this "
      "machine, or mount the bucket as a folder (gcsfuse, mountpoint-s3)."
    )
  return resolved


def without_scheme(path: str | os.PathLike) -> str:
  """Return a URL without its "gs://", as clients of object stores name objects."""
  return os.fspath(path).partition("://")[2]
