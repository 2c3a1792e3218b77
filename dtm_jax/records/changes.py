"""What two configs of one run differ in, and whether its state still means what the new config says."""

import dataclasses
import fnmatch
from collections.abc import Iterator, Mapping
from typing import Any

MEANING, COURSE, WEIGHTS, DATA = "meaning", "course", "weights", "data"

KINDS: tuple[tuple[str, str], ...] = (
  # Places. What lies there decides: the same weights or images elsewhere are no change.
  ("teacher.path", WEIGHTS),
  ("teacher.revision", WEIGHTS),
  ("clip.path", WEIGHTS),
  ("clip.revision", WEIGHTS),
  ("init_from.path", WEIGHTS),
  ("data.dataset.data_dir", DATA),
  # The probe's heads are known by their rates, and the optimiser's moments by its rule.
  ("probe.rates", MEANING),
  ("optim.name", MEANING),
  ("optim.frozen", MEANING),
  # The pixels that the network is made for.
  ("augment.normalization", MEANING),
  # How long and how fast it learns, and from how hard a version of the images.
  ("total_*", COURSE),
  ("batch_size", COURSE),
  ("optim.*", COURSE),
  ("augment.*", COURSE),
  ("mix.*", COURSE),
  ("ema.*", COURSE),
  ("probe.*", COURSE),
  ("data.view.*", COURSE),
  ("loss.label_smoothing", COURSE),
  ("*.drop_path", COURSE),
  ("*.dropout", COURSE),
  ("*.patch_dropout", COURSE),
  ("*.head_init_scale", COURSE),  # of initial values only
  # How the run is carried out and watched.
  ("resume", COURSE),
  ("replay*", COURSE),
  ("checkpoint.*", COURSE),
  ("log.*", COURSE),
  ("evals.*", COURSE),
  ("mesh.*", COURSE),
  ("*.num_threads", COURSE),
  ("*.dtype", COURSE),
  ("*.remat", COURSE),
  ("*.unroll", COURSE),
  ("*.attention", COURSE),
  ("*.implementation", COURSE),
  # The rest is meaning: task, data set and split, image size, teacher, model, the start (init_from), and what
  # defines the loss (loss, mask, morphers). So is the seed: runs are told apart by it, its shuffle would skip
  # and repeat examples of the epoch, and a finished run would report one seed's numbers as another's.
  ("*", MEANING),
)
"""(pattern of a key, kind); the first pattern that matches decides."""

BESIDE_THE_CONFIG = ("class_names", "data")
"""What is compared and is no key of the config."""


@dataclasses.dataclass(frozen=True)
class Change:
  """A key with two values; a key that one config lacks has None there."""

  key: str
  old: Any
  new: Any
  kind: str
  note: str = ""

  def __str__(self) -> str:
    note = f" ({self.note})" if self.note else ""
    option = self.key if self.key in BESIDE_THE_CONFIG else f"--config.{self.key}"
    return f"{option}: {self.old!r} -> {self.new!r}{note}"


def compare(old: Mapping[str, Any], new: Mapping[str, Any], *, same_code: bool) -> list[Change]:
  """The changes from one plain config (see `plain`) to another.

  None counts as absent. With `same_code` false, a key that only one config has belongs to the code and not to
  the user: it is no change of meaning. The name of a socket's choice always counts.
  """
  old_values, new_values = dict(flatten(old)), dict(flatten(new))
  found = []
  for key in dict.fromkeys([*new_values, *old_values]):
    before, after = old_values.get(key), new_values.get(key)
    if before == after:
      continue
    kind, note = kind_of(key), ""
    one_sided = key not in old_values or key not in new_values
    if one_sided and not same_code and not key.endswith("name"):
      kind, note = COURSE, "only one version of the code has this key"
    found.append(Change(key, before, after, kind, note))
  return found


def kind_of(key: str) -> str:
  """The kind of a change of this dotted key."""
  return next(kind for pattern, kind in KINDS if fnmatch.fnmatchcase(key, pattern))


def plain(value: Any) -> Any:
  """The config as JSON reads it back: dicts, lists, strings, numbers, booleans and None.

  Tuples become lists, numbers of NumPy those of Python, and everything else its text.
  """
  if hasattr(value, "to_dict"):  # a ConfigDict, which so resolves its references
    value = value.to_dict()
  if isinstance(value, Mapping):
    return {str(key): plain(each) for key, each in value.items()}
  if isinstance(value, list | tuple | set | frozenset):
    return [plain(each) for each in value]
  if hasattr(value, "tolist"):
    return value.tolist()
  if value is None or isinstance(value, bool | int | float | str):
    return value
  return str(value)


def flatten(section: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
  """("optim.lr", value) of every leaf that is not None; an empty path is none either."""
  for name, value in section.items():
    key = prefix + name
    if isinstance(value, Mapping):
      yield from flatten(value, f"{key}.")
    elif value is not None and not (value == "" and name == "path"):
      yield key, value
