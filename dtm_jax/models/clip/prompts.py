"""Captions of classes: templates filled with class names, for zero-shot evaluation and training on labels.

A set of templates is named, or is a file with a template on each line, {c} standing for the class. Names are
those of the data set, or of the set of templates where it brings its own, or of a file with a name on each
line in the order of the labels. In either file, lines that start with # are comments.
"""

import dataclasses
import importlib.resources
import os
import unicodedata
from collections.abc import Sequence

from absl import logging

from dtm_jax.errors import NotThereError, OptionError
from dtm_jax.storage import paths

FILES = importlib.resources.files(__package__) / "prompt_files"


@dataclasses.dataclass(frozen=True)
class PromptSet:
  """Templates, and the file of the class names to say where the data set's own are none."""

  templates: tuple[str, ...]
  class_names: os.PathLike | None = None


def _lines(path: os.PathLike) -> tuple[str, ...]:
  text = unicodedata.normalize("NFC", paths.resolve(path).read_bytes().decode("utf-8"))
  lines = (line.strip() for line in text.splitlines())
  return tuple(line for line in lines if line and not line.startswith("#"))


# Of OpenAI's CLIP (MIT licence), by way of clip-benchmark 1.6.2 (MIT).
_CIFAR = tuple(
  template.format(article=article, c="{c}")
  for article in ("a", "the")
  for template in (
    "a photo of {article} {c}.",
    "a blurry photo of {article} {c}.",
    "a black and white photo of {article} {c}.",
    "a low contrast photo of {article} {c}.",
    "a high contrast photo of {article} {c}.",
    "a bad photo of {article} {c}.",
    "a good photo of {article} {c}.",
    "a photo of {article} small {c}.",
    "a photo of {article} big {c}.",
  )
)

SETS = {
  "cifar10": PromptSet(_CIFAR),
  "cifar100": PromptSet(_CIFAR),  # the names are the data set's: TFDS has them
  # ImageNet's own class names are wnids. Sources in the files.
  "imagenet": PromptSet(_lines(FILES / "imagenet_templates.txt"), FILES / "imagenet_classes.txt"),
  "plain": PromptSet(("a photo of a {c}.",)),
}


def captions(
  class_names: Sequence[str] | None,
  prompts: str,
  *,
  names_file: str | None = None,
  dataset: str = "the data set",
) -> list[list[str]]:
  """Every template with every class name: G lists of P captions. Underscores of names become spaces.

  Args:
    class_names: of the data set, in the order of its labels.
    prompts: a set's name, or a file of templates.
    names_file: of names to say instead.
    dataset: the data set's name, for messages.

  Raises:
    FileNotFoundError: there is no such file.
    OptionError: the set is unknown; a template lacks {c} or has other braces; the data set has no classes, or
      the names are not as many.
  """
  if not class_names:
    raise OptionError(f"Captions need class names, and {dataset} has none.")
  templates, own_names = _templates(prompts)
  names_file = _existing(names_file, "class_names") if names_file else own_names
  names = class_names if names_file is None else _lines(names_file)
  if len(names) != len(class_names):
    raise OptionError(
      f"{names_file} has {len(names)} class names, and {dataset} has {len(class_names)} classes. Other names "
      "are given by class_names=FILE, one a line in the order of the labels."
    )
  if names_file is not None:
    _compare(class_names, names, names_file)
  return [[template.format(c=name.replace("_", " ")) for template in templates] for name in names]


def _compare(class_names: Sequence[str], names: Sequence[str], names_file: os.PathLike) -> None:
  """Tells which name a class gets. Folders named by numbers say nothing of whether that is right.

  Raises:
    OptionError: the file has the very names of the data set in another order.
  """
  plain = lambda name: name.replace("_", " ").casefold()
  ours, theirs = (tuple(map(plain, each)) for each in (class_names, names))
  if sorted(ours) == sorted(theirs) and ours != theirs:
    label = next(label for label, name in enumerate(ours) if name != theirs[label])
    raise OptionError(
      f"{names_file} names the classes in another order: number {label} in it is {names[label]!r}, and "
      f"class {label} of the data set is {class_names[label]!r}."
    )
  pairs = [f"{own} is {name}" for own, name in zip(class_names, names, strict=True)]
  shown = ", ".join(pairs if len(pairs) <= 10 else [*pairs[:5], "...", pairs[-1]])
  level = logging.WARNING if all(name.isdecimal() for name in class_names) else logging.INFO
  logging.log(level, "Names of the classes by %s, in the order of the labels: %s.", names_file, shown)


def _templates(prompts: str) -> tuple[Sequence[str], os.PathLike | None]:
  """The templates, and the file of the names that go with them."""
  if prompts in SETS:
    return SETS[prompts].templates, SETS[prompts].class_names
  if not os.path.splitext(prompts)[1] and os.sep not in prompts:  # no path: a set's name, mistyped
    raise OptionError(f"Unknown prompts {prompts!r}. Available: {', '.join(SETS)}, or a file of templates.")
  templates = _lines(_existing(prompts, "prompts"))
  if not templates:
    raise OptionError(f"{prompts} has no templates.")
  for template in templates:
    _check(template, prompts)
  return templates, None


def _check(template: str, file: str) -> None:
  try:
    filled = template.format(c="\0")
  except (LookupError, ValueError) as error:
    raise OptionError(f"{file}: template {template!r} has braces other than {{c}}: {error!r}.") from error
  if "\0" not in filled:
    raise OptionError(f"{file}: template {template!r} has no {{c}} for the class.")


def _existing(path: str, option: str) -> os.PathLike:
  file = paths.resolve(path)
  if not file.exists() or file.is_dir():
    raise NotThereError(f"{option}={path!r}: there is no such file.")
  return file
