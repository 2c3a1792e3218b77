"""Find object stores: packages, endpoints and credentials of `gs://` and `s3://`.

fsspec (gcsfs, s3fs) reads and writes buckets, also for etils' `epath`. TensorFlow's file systems are not
used, because they support neither `s3://` nor another endpoint.

The environment can name another endpoint than the usual one: STORAGE_EMULATOR_HOST or
TENSORSTORE_GCS_HTTP_URL for `gs://`, AWS_ENDPOINT_URL_S3 or AWS_ENDPOINT_URL for `s3://`. An endpoint without
TLS needs no credentials.
"""

import contextlib
import functools
import importlib.util
import os
from typing import Any

from dtm_jax.errors import OptionError

os.environ.setdefault("EPATH_USE_TF", "0")  # etils asks once, at its first path
# Otherwise gcsfs asks for the kind of each bucket.
os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")

PACKAGES = {"gs": "gcsfs", "s3": "s3fs"}
"""The schemes of buckets, and the package that each needs."""


def endpoint(scheme: str) -> str | None:
  """Return the URL of the object store that the environment names; None means the usual one."""
  names = {
    "gs": ("STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL"),
    "s3": ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"),
  }[scheme]
  found = next((os.environ[name] for name in names if os.environ.get(name)), None)
  return found if found is None or "://" in found else f"http://{found}"


def connect(scheme: str, path: str) -> None:
  """Tell fsspec, TensorStore and Google's client the endpoint and credentials of this kind of bucket.

  Args:
    scheme: "gs" or "s3".
    path: as the user gave it, for the message.

  Raises:
    OptionError: the package that it needs is not installed.
  """
  package = PACKAGES[scheme]
  if importlib.util.find_spec(package) is None:
    raise OptionError(
      f"{path}: {scheme}:// needs the package {package}, which is missing: pip install {package}."
    )
  from fsspec.config import conf

  options: dict[str, Any] = {"use_listings_cache": False}  # other processes write too
  url = endpoint(scheme)
  without_tls = url is not None and url.startswith("http://")
  if scheme == "gs":
    if url is not None:
      os.environ.setdefault("STORAGE_EMULATOR_HOST", url)
      os.environ.setdefault("TENSORSTORE_GCS_HTTP_URL", url)
    if without_tls:
      options["token"] = "anon"
      os.environ.setdefault("GOOGLE_AUTH_TOKEN_FOR_TESTING", "anonymous")
  else:
    if url is not None:
      options["endpoint_url"] = url
    if without_tls and not has_aws_credentials():
      options["anon"] = True
  for name in {"gs": ("gs", "gcs"), "s3": ("s3",)}[scheme]:
    conf[name] = options | conf.get(name, {})
  _forget_tensorflow()


def has_aws_credentials() -> bool:
  """Return whether the environment or a file names credentials for S3."""
  names = (
    "AWS_ACCESS_KEY_ID",
    "AWS_PROFILE",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
  )
  file = os.environ.get("AWS_SHARED_CREDENTIALS_FILE", os.path.expanduser("~/.aws/credentials"))
  return any(os.environ.get(name) for name in names) or os.path.exists(file)


@functools.cache
def _forget_tensorflow() -> None:
  """Let etils choose its file system again, in case it chose before this module set EPATH_USE_TF."""
  from etils.epath import gpath

  with contextlib.suppress(AttributeError):
    gpath._is_tf_installed.cache_clear()


def filesystem(path: str | os.PathLike) -> Any:
  """Return the fsspec file system of a URL."""
  import fsspec

  return fsspec.filesystem(os.fspath(path).partition("://")[0])
