"""Names of splits: which folder or part of a data set "train", "val" or "test" means."""

import re
from collections.abc import Collection
from typing import Any

from dtm_jax import plugins
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
  """Return "train", "val", "test" or "eval" if `name` is a usual name of such a split, else None.

  "Training", "test_set" and "valid images" are such names.
  """
  return _KIND.get(re.sub(r"[ _-]?(set|data|images|imgs|split)$", "", name.lower()))


def find(split: str, present: Collection[str], where: str) -> str | None:
  """Return the name in `present` that `split` means: the same name, or else the only name of its kind.

  Args:
    where: names the data set in messages.

  Raises:
    OptionError: two names are of its kind.
  """
  if split in present:
    return split
  return only_of_kind(kind_of(split), present, where)


def only_of_kind(kind: str | None, present: Collection[str], where: str) -> str | None:
  """Return the name in `present` that is of this kind, or None.

  Raises:
    OptionError: two names are of this kind.
  """
  same = [name for name in present if kind is not None and kind_of(name) == kind]
  if len(same) > 1:
    raise OptionError(f"Split {kind!r} of {where} may be {' or '.join(same)}. Name one of them as the split.")
  return same[0] if same else None


def evaluation_split(options: Any) -> str:
  """Return the split on which to evaluate: the first of val, test and eval that the data set has.

  Args:
    options: `data.dataset` of a config, or a dict: the name of the data set and its options.

  Raises:
    OptionError: the data set has none of these splits, or two splits may be the first.
  """
  present = plugins.build("datasets", options, function="splits")
  for kind in EVALUATION_KINDS:
    if split := only_of_kind(kind, present, f"data set {options['name']!r}"):
      return split
  raise OptionError(
    f"Data set {options['name']!r} has none of the splits {', '.join(EVALUATION_KINDS)}. It has: "
    f"{', '.join(present) or 'no splits'}. Name one for the evaluation, or a part that training does not "
    "see: data.split=train[:90%] and split=train[90%:]."
  )
