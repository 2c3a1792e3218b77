"""Finding the image files below a folder, and reading them.

Only `list_folder` and `read_file` touch the file system. A walk follows symbolic links to folders, except a
link that leads back into a folder that encloses it. It counts what it leaves out.
"""

import collections
import dataclasses
import errno
import os
import stat
import time
import unicodedata
from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeVar

from absl import logging
from PIL import Image

from dtm_jax.errors import UserError

_KNOWN = (
  ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".bmp", ".dib", ".gif", ".ppm", ".pgm", ".pbm",
  ".pnm", ".pfm", ".tif", ".tiff", ".tga", ".qoi", ".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx",
  ".avif", ".webp",
)  # fmt: skip
EXTENSIONS = tuple(end for end in _KNOWN if Image.registered_extensions().get(end) in Image.OPEN)
"""Extensions of image files in lower case: photo formats that this machine's Pillow opens."""

COMPANIONS = ("__macosx", "thumbs.db", "desktop.ini", "icon\r", "@eadir", "$recycle.bin", "lost+found")
"""Names, in lower case, of files and folders that operating systems leave beside a user's files."""

WAITS = (1, 2, 4, 8, 16)
"""Seconds before each new attempt after an error that may be temporary."""
_LASTING = (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError)
_SHOWN = 5

Result = TypeVar("Result")
_said: set[str] = set()


class Listing(NamedTuple):
  """The names in one folder."""

  files: list[str]
  folders: list[str]
  links: set[str]  # the names in `folders` that are symbolic links
  broken: list[str]  # symbolic links that lead nowhere


@dataclasses.dataclass
class Skipped:
  """What a walk left out."""

  extensions: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
  hidden: int = 0
  broken: list[str] = dataclasses.field(default_factory=list)
  loops: list[str] = dataclasses.field(default_factory=list)

  def phrases(self) -> list[str]:
    """Return it in words for the log: "skipped 3 .txt, 1 .heic", "2 hidden or companion files skipped"."""
    ordered = sorted(self.extensions.items(), key=lambda item: (-item[1], item[0]))
    kinds = ", ".join(f"{count:,} {end}" for end, count in ordered)
    phrases = [f"skipped {kinds}"] if kinds else []
    if self.hidden:
      phrases.append(f"{number(self.hidden, 'hidden or companion file')} skipped")
    if self.broken:
      phrases.append(f"{some(self.broken, 'broken link')} skipped")
    if self.loops:
      phrases.append(f"{some(self.loops, 'link')} to a folder that is read already skipped")
    return phrases


def some(names: list[str], what: str) -> str:
  """Return the number of names and the first five: "7 broken links (a, b, c, d, e, ...)"."""
  more = ", ..." if len(names) > _SHOWN else ""
  return f"{number(len(names), what)} ({', '.join(names[:_SHOWN])}{more})"


def number(count: int, what: str) -> str:
  """Return a number with its noun, in the plural where needed: "1 link", "7 links", "2 classes"."""
  return f"{count:,} {what}{'' if count == 1 else 'es' if what.endswith('s') else 's'}"


def say_once(level: int, text: str) -> None:
  """Log a line unless this process has logged it, because evaluators open a data set again."""
  if text not in _said:
    _said.add(text)
    logging.log(level, "%s", text)


def normal_name(name: str) -> str:
  """Return a name in Unicode's normal form NFC, for comparisons. Bytes that are not UTF-8 become U+FFFD."""
  if name.isascii():
    return name
  return unicodedata.normalize("NFC", os.fsencode(name).decode("utf-8", "replace"))


def is_hidden(name: str) -> bool:
  """Return whether the operating system, not the user, made a file or folder of this name."""
  return name.startswith(".") or name.lower() in COMPANIONS


def is_image(name: str) -> bool:
  """Return whether the name ends in one of EXTENSIONS."""
  return name.lower().endswith(EXTENSIONS)


def walk(root: str | os.PathLike, skipped: Skipped) -> Iterator[tuple[str | None, str]]:
  """Yield (first folder below `root` or None, path) for the images at any depth, in sorted order.

  In each folder the files come before the folders.

  Args:
    skipped: receives what is left out.

  Raises:
    UserError: a folder cannot be read.
  """
  root = os.fspath(root)
  # path, first folder below root, real paths of the enclosing folders
  waiting: list[tuple[str, str | None, tuple[str, ...]]] = [(root, None, (os.path.realpath(root),))]
  while waiting:
    folder, first, enclosing = waiting.pop()
    listing = list_folder(folder)
    for name in _in_order(listing.files):
      if is_hidden(name):
        skipped.hidden += 1
      elif is_image(name):
        yield first, os.path.join(folder, name)
      else:
        skipped.extensions[os.path.splitext(name)[1].lower() or "without an extension"] += 1
    skipped.broken += [os.path.join(folder, name) for name in sorted(listing.broken) if not is_hidden(name)]
    below = []
    for name in _in_order(listing.folders):
      path, around = os.path.join(folder, name), enclosing
      if is_hidden(name):
        skipped.hidden += 1
        continue
      if name in listing.links:
        real = os.path.realpath(path)
        if any(_within(real, each) or _within(each, real) for each in enclosing):
          skipped.loops.append(path)
          continue
        around = (*enclosing, real)
      below.append((path, first or name, around))
    waiting.extend(reversed(below))


def holds_image(folder: str | os.PathLike) -> bool:
  """Return whether there is an image below the folder."""
  return next(walk(folder, Skipped()), None) is not None


def list_folder(folder: str | os.PathLike) -> Listing:
  """Return the names in a folder, in any order. Sockets, pipes and devices are left out.

  Raises:
    UserError: the folder cannot be read, or there is no permission to read it.
  """
  try:
    return _patiently(_scan, os.fspath(folder))
  except OSError as error:
    what = "No permission to read" if isinstance(error, PermissionError) else "Cannot read"
    raise UserError(f"{what} the folder {os.fspath(folder)}: {error.strerror or error}.") from error


def visible_folders(folder: str | os.PathLike) -> list[str]:
  """Return the names of the folders in a folder, in any order, without hidden ones.

  Raises:
    UserError: the folder cannot be read, or there is no permission to read it.
  """
  return [name for name in list_folder(folder).folders if not is_hidden(name)]


def _scan(folder: str) -> Listing:
  listing = Listing([], [], set(), [])
  with os.scandir(folder) as entries:
    for entry in entries:
      if entry.is_symlink():
        _follow(entry, listing)
      elif entry.is_dir():
        listing.folders.append(entry.name)
      elif entry.is_file():
        listing.files.append(entry.name)
  return listing


def _follow(link: os.DirEntry, listing: Listing) -> None:
  try:
    mode = link.stat().st_mode
  except (FileNotFoundError, NotADirectoryError):
    listing.broken.append(link.name)
  except OSError as error:
    if error.errno != errno.ELOOP:  # the link leads in a circle
      raise
    listing.broken.append(link.name)
  else:
    if stat.S_ISDIR(mode):
      listing.folders.append(link.name)
      listing.links.add(link.name)
    elif stat.S_ISREG(mode):
      listing.files.append(link.name)


def read_file(path: str) -> bytes:
  """Return the content of a file. Tries again after errors that may be temporary, as on network drives.

  Raises:
    OSError: the file is missing, there is no permission to read it, or the error persists.
  """
  return _patiently(_read, path)


def _read(path: str) -> bytes:
  with open(path, "rb") as file:
    return file.read()


def _patiently(function: Callable[[str], Result], path: str) -> Result:
  """Return `function(path)`. After an error that may be temporary, wait and call it again."""
  for wait in (*WAITS, None):
    try:
      return function(path)
    except _LASTING:
      raise
    except OSError as error:
      if wait is None or error.errno in (errno.ELOOP, errno.ENAMETOOLONG):
        raise
      logging.log_every_n_seconds(
        logging.WARNING, "%s cannot be read (%s). Trying again, at most %d times.", 10,
        path, error, len(WAITS),
      )  # fmt: skip
      time.sleep(wait)
  raise AssertionError


def _in_order(names: list[str]) -> list[str]:
  """Return the names sorted by their normal form, so that all operating systems agree."""
  if all(map(str.isascii, names)):
    return sorted(names)
  return sorted(names, key=lambda name: (normal_name(name), name))


def _within(inner: str, outer: str) -> bool:
  return inner == outer or inner.startswith(outer.rstrip(os.sep) + os.sep)
