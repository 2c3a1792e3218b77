"""Recognise files that are not what their name says: Git LFS pointers, web pages, error messages, archives.

Git without LFS, an expired login or a proxy leaves such files behind under the right name. These functions
check every file of weights or configuration that a user gives before a library parses it.
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
"""The first bytes of archives. A tar archive has its mark at byte 257."""

_MAX_JSON_BYTES = 64 * 2**20
_ERROR_KEYS = ("error", "message", "detail", "errors")
_MAX_INFLATION, _SMALL_BYTES = 8, 256 * 2**20
_AGAIN = "Download it again."


def check_is_weights(file: Path, *, zip_allowed: bool = False) -> None:
  """Check that a binary weight file is not empty, not a text and not an archive.

  Args:
    zip_allowed: whether the format is itself a zip archive, as the formats of torch and NumPy are.

  Raises:
    UnreadableFileError: the file is something else; the message says what it is and what to do.
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
    UnreadableFileError: the file is empty, a Git LFS pointer, a web page or an archive, or holds no JSON
      object.
  """
  if file.stat().st_size > _MAX_JSON_BYTES:
    raise UnreadableFileError(
      f"{file} has {file.stat().st_size} bytes. A configuration has at most {_MAX_JSON_BYTES}."
    )
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
      f"{file} holds a JSON {type(parsed).__name__}, but it must hold an object {{...}}."
    )
  if parsed and all(key in (*_ERROR_KEYS, "status", "statusCode", "code", "path") for key in parsed):
    raise UnreadableFileError(f"{file} is an error message of a server: {json.dumps(parsed)[:200]}. {_AGAIN}")
  return parsed


@contextlib.contextmanager
def blaming(file: Path | str, what: str = "") -> Iterator[None]:
  """Turn any exception about the content of `file` into an UnreadableFileError "FILE WHAT: reason".

  A UserError keeps its type; its message gets the file's name if it lacks it. An OSError passes unchanged.
  """
  try:
    yield
  except UserError as error:
    if str(file) in str(error):
      raise
    raise type(error)(f"{file}: {error}") from error
  except OSError:
    raise
  except Exception as error:  # each library raises other types for a bad value
    kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
    raise UnreadableFileError(f"{file}{what}: {kind}{error}") from error


def check_inflation(file: Path, num_bytes: int, stored: int) -> None:
  """Check that a file of `stored` bytes unfolds to a plausible number of bytes, before memory is taken.

  Weights hardly compress, so `num_bytes` may be up to 256 MiB or eight times `stored`.

  Raises:
    UnreadableFileError: the file would unfold to more; the message gives both sizes.
  """
  if num_bytes > max(_SMALL_BYTES, _MAX_INFLATION * stored):
    raise UnreadableFileError(
      f"{file} is not read: its {stored / 2**20:.1f} MiB would unfold to {num_bytes / 2**20:.0f} MiB. Real "
      f"weights unfold to at most {_MAX_INFLATION} times their size."
    )


def num_bytes_of(tensors: dict[str, np.ndarray]) -> int:
  """Return the number of bytes of all tensors when each of them is copied."""
  return sum(math.prod(tensor.shape) * tensor.dtype.itemsize for tensor in tensors.values())


def _archive(head: bytes, zip_allowed: bool) -> str | None:
  """Return which archive starts with `head`, or None for no archive."""
  kinds = [kind for magic, kind in ARCHIVES.items() if head.startswith(magic)]
  kinds += ["tar"] if head[257:262] == b"ustar" else []
  if not kinds or (zip_allowed and kinds[0] == "zip"):
    return None
  return f"a {kinds[0]} archive. Unpack it and give the folder or the file inside."


def _text(head: bytes) -> str | None:
  """Return what kind of text starts with `head`, or None for a binary file."""
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
  """Return which pointer, page or error message starts with `head`, or None."""
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
