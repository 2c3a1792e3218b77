"""Which folder or part of a data set is meant by "train", "val" or "test": the names that people use."""

import re
from collections.abc import Collection

from dtm_jax.errors import OptionError

_WORDS = {
  "train": ("train", "training"),
  "val": ("val", "valid", "validation", "dev"),
  "test": ("test", "testing"),
  "eval": ("eval", "evaluation"),
}
_KIND = {word: kind for kind, words in _WORDS.items() for word in words}
EVALUATION_KINDS = ("val", "test", "eval")


def kind_of(name: str) -> str | None:
  """ "train", "val", "test" or "eval", where `name` is one of their names in any case; else None.

  "Training", "test_set" and "valid images" are such names.
  """
  return _KIND.get(re.sub(r"[ _-]?(set|data|images|imgs|split)$", "", name.lower()))


def find(split: str, present: Collection[str], where: str) -> str | None:
  """The one of `present` that `split` names: that very name, or else the only one of its kind.

  Raises:
    OptionError: two are of its kind.
  """
  if split in present:
    return split
  return only_one(kind_of(split), present, where)


def only_one(kind: str | None, present: Collection[str], where: str) -> str | None:
  """The one of `present` that is of this kind.

  Raises:
    OptionError: two are.
  """
  same = [name for name in present if kind is not None and kind_of(name) == kind]
  if len(same) > 1:
    raise OptionError(f"Split {kind!r} of {where} may be {' or '.join(same)}. Name one of them as the split.")
  return same[0] if same else None
