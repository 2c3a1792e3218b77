"""Let Orbax save checkpoints to `s3://` and restore them.

Orbax supports only `gs://`, but it writes with TensorStore, which supports S3. Three functions of Orbax
choose TensorStore's driver for a path. `install` replaces them by functions that support both kinds of
buckets. For local paths and `gs://`, the new functions return the same as Orbax's.
"""

import functools
import os
from typing import Any

from orbax.checkpoint import options as orbax_options
from orbax.checkpoint._src.path import gcs_utils
from orbax.checkpoint._src.serialization import tensorstore_utils

from dtm_jax.storage import object_stores


@functools.cache
def install() -> None:
  """Let Orbax write arrays to `s3://` and read them, in this process."""
  googles = gcs_utils.get_kvstore_for_gcs
  normalize = tensorstore_utils._normalize_path
  tensorstore_utils._use_gcs_driver = lambda path: path.startswith(("gs://", "s3://"))
  tensorstore_utils._normalize_path = lambda path: normalize(path).replace("s3:/", "s3://")
  gcs_utils.get_kvstore_for_gcs = lambda path: (
    key_value_store(path) if path.startswith("s3://") else googles(path)
  )


def atomicity_of(folder: os.PathLike) -> orbax_options.AtomicityOptions | None:
  """Return how Orbax marks a checkpoint in `folder` as complete. None leaves the choice to Orbax.

  A bucket cannot rename a folder, so the last file that is written marks the checkpoint as complete. Without
  this setting, Orbax would try to rename the folder on `s3://`.
  """
  if not os.fspath(folder).startswith("s3://"):
    return None
  return orbax_options.AtomicityOptions(mode=orbax_options.AtomicityMode.COMMIT_FILE)


def key_value_store(url: str) -> dict[str, Any]:
  """Return TensorStore's specification of an S3 URL, such as "s3://bucket/path"."""
  bucket, _, path = url.removeprefix("s3://").partition("/")
  spec: dict[str, Any] = {"driver": "s3", "bucket": bucket, "path": path}
  endpoint = object_stores.endpoint("s3")
  if endpoint is not None:  # TensorStore does not read it from the environment
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"
    spec |= {"endpoint": endpoint, "aws_region": region}
  if os.environ.get("AWS_ACCESS_KEY_ID"):
    spec["aws_credentials"] = {"type": "environment"}  # avoids warnings about missing credential files
  elif endpoint is not None and endpoint.startswith("http://") and not object_stores.has_aws_credentials():
    spec["aws_credentials"] = {"type": "anonymous"}
  return spec
