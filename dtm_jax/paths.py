"""Paths that users give: local ones, or places in a bucket (`gs://bucket/x`, `s3://bucket/x`)."""

import os

from etils import epath


def is_remote(path: str | os.PathLike) -> bool:
  """Whether the path is a URL such as `gs://bucket/x`, so not of this machine's file system."""
  return "://" in os.fspath(path)


def resolve(path: str | os.PathLike) -> epath.Path:
  """Return the path as an absolute one; `~` is expanded, and a URL stays as it is."""
  if is_remote(path):
    return epath.Path(path)
  return epath.Path(os.path.abspath(os.path.expanduser(path)))
