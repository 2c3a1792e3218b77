"""Compare two configs of one run, and find which changes alter the meaning of the run's state."""

import dataclasses
import fnmatch
from collections.abc import Iterator, Mapping
from typing import Any

from dtm_jax.renamed import RENAMED

MEANING, COURSE, WEIGHTS, DATA = "meaning", "course", "weights", "data"
"""Kinds of changes.

MEANING: the state or the numbers no longer mean what the new config says, so the change is refused.
COURSE: how long, how fast or how the run is carried out. The change is logged, and the run goes on.
WEIGHTS, DATA: a place of weights or images. The checksums of what lies there decide.
"""

KINDS: tuple[tuple[str, str], ...] = (
  # Places. The same weights or images in another place do not count as a change.
  ("teacher.path", WEIGHTS),
  ("teacher.revision", WEIGHTS),
  ("clip.path", WEIGHTS),
  ("clip.revision", WEIGHTS),
  ("init_from.path", WEIGHTS),
  ("data.dataset.data_dir", DATA),
  # The rates identify the heads of the probe. The optimizer's name decides what its moments mean.
  ("probe.rates", MEANING),
  ("optim.name", MEANING),
  ("optim.fixed", MEANING),
  # The scale of the pixels that the network has learned.
  ("augment.normalization", MEANING),
  # How long and how fast the run learns, and how strongly images are augmented.
  ("total_*", COURSE),
  ("batch_size", COURSE),
  ("optim.*", COURSE),
  ("augment.*", COURSE),
  ("mix.*", COURSE),
  ("ema.*", COURSE),
  ("probe.*", COURSE),
  ("data.view.*", COURSE),
  ("data.device_resident", COURSE),  # the same examples, with other draws of their crops
  ("loss.label_smoothing", COURSE),
  ("*.drop_path", COURSE),
  ("*.dropout", COURSE),
  ("*.patch_dropout", COURSE),
  ("*.head_init_scale", COURSE),  # concerns initial values only
  # How the run is carried out and watched.
  ("resume", COURSE),
  ("replay*", COURSE),
  ("checkpoint.*", COURSE),
  ("log.*", COURSE),
  ("evals.*", COURSE),
  ("mesh.*", COURSE),
  ("train.*", COURSE),
  ("*.num_threads", COURSE),
  ("*.dtype", COURSE),
  ("*.remat", COURSE),
  ("*.unroll", COURSE),
  ("*.attention", COURSE),
  ("*.stream_dtype", COURSE),
  ("*.implementation", COURSE),
  # The rest is meaning: task, data set and split, image size, teacher, model, the start (init_from), and the
  # definition of the loss (loss, mask, morphers). The seed is meaning too: another seed shuffles differently,
  # so the epoch would skip and repeat examples, and a finished run would report the numbers of another seed.
  ("*", MEANING),
)
"""Pairs (pattern of a key, kind). The first pattern that matches decides."""

BESIDE_THE_CONFIG = ("class_names", "data")
"""Names that are compared and are not keys of the config."""


@dataclasses.dataclass(frozen=True)
class Change:
  """An option that differs between two configs. None stands for an option that one config lacks.

  Attributes:
    key: such as "optim.lr".
    old, new: the two values.
    kind: see the kinds above.
    note: why the change has this kind, for messages.
  """

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
  """Return the changes from one config to another; both as `plain` returns them.

  A value of None counts as absent.

  Args:
    old, new: the configs.
    same_code: whether both come from the same version of the code. If not, a key that only one config has is
      no change of meaning, because the code and not the user added it. The name of a module always counts.
  """
  new_values = dict(flatten(new))
  old_values = {RENAMED.get(key, key): value for key, value in flatten(old)}
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
  """Return the kind of a change of this dotted key."""
  return next(kind for pattern, kind in KINDS if fnmatch.fnmatchcase(key, pattern))


def plain(value: Any) -> Any:
  """Return the config as JSON would read it back: dicts, lists, strings, numbers, booleans and None.

  Tuples become lists, NumPy numbers become Python numbers, and everything else becomes its text.
  """
  if hasattr(value, "to_dict"):  # a ConfigDict; this resolves its references
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
  """Yield ("optim.lr", value) for every leaf, except values of None and empty paths."""
  for name, value in section.items():
    key = prefix + name
    if isinstance(value, Mapping):
      yield from flatten(value, f"{key}.")
    elif value is not None and not (value == "" and name == "path"):
      yield key, value
