"""Recognise what lies in the place of a file: Git LFS pointers, web pages, error messages, archives, nothing.

Git without LFS, an expired login or a proxy leaves such files behind under the right name. Every file that a
user gives, weights or configuration, is looked at here before a library parses it.
"""

import contextlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dtm_jax.errors import UserError


class UnreadableFileError(UserError, ValueError):
  """A file is damaged, cut short, or not what its name says."""


ARCHIVES = {
  b"PK\x03\x04": "zip", b"PK\x05\x06": "empty zip", b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz",
  b"\x28\xb5\x2f\xfd": "zstd", b"7z\xbc\xaf": "7z", b"Rar!": "rar",
}  # fmt: skip
"""How archives begin. A tar archive has its mark at byte 257."""

_LARGEST_JSON = 64 * 2**20
_ERROR_KEYS = ("error", "message", "detail", "errors")
_INFLATION, _SMALL = 8, 256 * 2**20


def refuse_intruders(file: Path, *, zip_allowed: bool = False) -> None:
  """Check that a binary file of weights is no text, no archive and not empty.

  Args:
    zip_allowed: the format is itself a zip archive, as those of torch and NumPy are.

  Raises:
    UnreadableFileError: says what the file is, and the way out.
  """
  with file.open("rb") as stream:
    head = stream.read(1024)
  if not head:
    raise UnreadableFileError(f"{file} is damaged or cut short: it is empty. {_AGAIN}")
  what = _archive(head, zip_allowed) or _text(head)
  if what:
    raise UnreadableFileError(f"{file} holds no weights: it is {what}")


def read_json(file: Path) -> dict[str, Any]:
  """Return the JSON object in a file.

  Raises:
    UnreadableFileError: the file is empty, a Git LFS pointer, a web page, an archive, not JSON, or no object.
  """
  if file.stat().st_size > _LARGEST_JSON:
    raise UnreadableFileError(f"{file} has {file.stat().st_size} bytes: it is no configuration.")
  content = file.read_bytes()
  if not content.strip():
    raise UnreadableFileError(f"{file} is damaged or cut short: it is empty. {_AGAIN}")
  what = _archive(content, zip_allowed=False) or _pointer_or_page(content[:1024])
  if what:
    raise UnreadableFileError(f"{file} is not JSON: it is {what}")
  try:
    parsed = json.loads(content.decode("utf-8-sig"))
  except (ValueError, RecursionError) as error:
    raise UnreadableFileError(f"{file} is not JSON: {error}. {_AGAIN}") from error
  if not isinstance(parsed, dict):
    raise UnreadableFileError(
      f"{file} holds a JSON {type(parsed).__name__}, where an object {{...}} belongs."
    )
  if parsed and all(key in (*_ERROR_KEYS, "status", "statusCode", "code", "path") for key in parsed):
    raise UnreadableFileError(f"{file} is an error message of a server: {json.dumps(parsed)[:200]}. {_AGAIN}")
  return parsed


@contextlib.contextmanager
def blaming(file: Path | str, what: str = "") -> Iterator[None]:
  """Turn any exception about the content of `file` into an UnreadableFileError: "FILE WHAT: reason".

  A UserError keeps its kind, and gets the name of the file if it lacks it.
  """
  try:
    yield
  except UserError as error:
    if str(file) in str(error):
      raise
    raise type(error)(f"{file}: {error}") from error
  except OSError:
    raise
  except Exception as error:  # a library has exceptions of its own for a value that it does not like
    kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
    raise UnreadableFileError(f"{file}{what}: {kind}{error}") from error


def check_inflation(file: Path, num_bytes: int, stored: int) -> None:
  """Check that a file of `stored` bytes does not unfold to far more, before memory is taken for it.

  Weights hardly compress. Up to 256 MiB, or eight times the file, are read.

  Raises:
    UnreadableFileError: names both sizes.
  """
  if num_bytes > max(_SMALL, _INFLATION * stored):
    raise UnreadableFileError(
      f"{file} is not read: its {stored / 2**20:.1f} MiB would unfold to {num_bytes / 2**20:.0f} MiB, which "
      "real weights never do."
    )


def size_of(tensors: dict[str, np.ndarray]) -> int:
  """Return the bytes that the tensors take when each is copied."""
  return sum(math.prod(tensor.shape) * tensor.dtype.itemsize for tensor in tensors.values())


_AGAIN = "Download it again."


def _archive(head: bytes, zip_allowed: bool) -> str | None:
  kinds = [kind for magic, kind in ARCHIVES.items() if head.startswith(magic)]
  kinds += ["tar"] if head[257:262] == b"ustar" else []
  if not kinds or (zip_allowed and kinds[0] == "zip"):
    return None
  return f"a {kinds[0]} archive. Unpack it and give the folder or the file inside."


def _text(head: bytes) -> str | None:
  """What a text file in the place of a binary one is; None for binary."""
  if any(byte < 32 and byte not in b"\t\n\r\f" for byte in head):
    return None
  try:
    text = head[:1000].decode("utf-8", errors="strict" if len(head) < 1000 else "ignore")
  except UnicodeDecodeError:
    return None
  known = _pointer_or_page(head)
  if known:
    return known
  first = text.strip()[:80]
  if first.startswith(("{", "[")):
    return f"a JSON text, perhaps the error message of a server: {first!r}. {_AGAIN}"
  return f"a text that begins with {first!r}. {_AGAIN}" if len(head) > 20 else None


def _pointer_or_page(head: bytes) -> str | None:
  start = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
  if start.startswith((b"version https://git-lfs", b"version https://hawser")):
    return (
      "a Git LFS pointer, which only names the file. Run `git lfs pull` in its repository, or download it "
      "again with `hf download`."
    )
  if start.startswith((b"<!doctype html", b"<html", b"<head", b"<body", b"<!--")):
    return "a web page (HTML), such as a login or an error page. Download the file itself."
  if start.startswith(b"<?xml"):
    return f"an XML text, such as a bucket's error message. {_AGAIN}"
  return None
