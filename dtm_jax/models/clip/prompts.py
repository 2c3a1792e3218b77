"""Make captions of classes from templates, for zero-shot evaluation and for training on labels.

The templates are a set of SETS, or a file with one template a line, in which {c} stands for the class name.
The class names are those of the data set, of the set of templates, or of a file with one name a line in the
order of the labels. In both files, a line that starts with # is a comment.
"""

import dataclasses
import os
import pathlib
import unicodedata
from collections.abc import Sequence

from absl import logging
from etils import epath

from dtm_jax.errors import NotThereError, OptionError
from dtm_jax.storage import paths

FILES = pathlib.Path(__file__).parent / "prompt_files"

File = os.PathLike[str]


@dataclasses.dataclass(frozen=True)
class PromptSet:
  """A set of templates.

  Attributes:
    class_names: file of class names, if the data set's own names are not words. None uses the data set's
      names.
  """

  templates: tuple[str, ...]
  class_names: File | None = None


def _lines(path: File) -> tuple[str, ...]:
  """Return the lines of a file without comments and empty lines."""
  text = unicodedata.normalize("NFC", paths.resolve(path).read_bytes().decode("utf-8"))
  lines = (line.strip() for line in text.splitlines())
  return tuple(line for line in lines if line and not line.startswith("#"))


# From OpenAI's CLIP (MIT licence), through clip-benchmark 1.6.2 (MIT).
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
  "cifar100": PromptSet(_CIFAR),  # TFDS has the class names
  # ImageNet's own class names are WordNet ids. The files name their sources.
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
  """Fill every template with every class name: return a list of captions for each of the G classes.

  Underscores in names become spaces.

  Args:
    class_names: the names of the data set, in the order of its labels.
    prompts: name of a set of SETS, or path of a file of templates.
    names_file: path of a file of names to use instead.
    dataset: name of the data set, for messages.

  Raises:
    NotThereError: a file does not exist.
    OptionError: the set is unknown, a template lacks {c} or has other braces, the data set has no classes, or
      the number of names is wrong.
  """
  if not class_names:
    raise OptionError(f"Captions need class names, and {dataset} has none.")
  templates, own_names = _templates(prompts)
  file = _existing(names_file, "class_names") if names_file else own_names
  names = class_names if file is None else _lines(file)
  if len(names) != len(class_names):
    raise OptionError(
      f"{file} has {len(names)} class names, and {dataset} has {len(class_names)} classes. Give "
      f"class_names=FILE with {len(class_names)} names, one a line in the order of the labels."
    )
  if file is not None:
    _compare(class_names, names, file)
  return [[template.format(c=name.replace("_", " ")) for template in templates] for name in names]


def _compare(class_names: Sequence[str], names: Sequence[str], names_file: File) -> None:
  """Log which name each class gets, as a warning if the data set's own names are only numbers.

  Raises:
    OptionError: the file has the names of the data set in another order.
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


def _templates(prompts: str) -> tuple[Sequence[str], File | None]:
  """Return the templates, and the file of the class names that belong to them."""
  if prompts in SETS:
    return SETS[prompts].templates, SETS[prompts].class_names
  if not os.path.splitext(prompts)[1] and os.sep not in prompts:  # not a path, so a mistyped name of a set
    raise OptionError(f"Unknown prompts {prompts!r}. Available: {', '.join(SETS)}, or a file of templates.")
  templates = _lines(_existing(prompts, "prompts"))
  if not templates:
    raise OptionError(f"{prompts} has no templates.")
  for template in templates:
    _check(template, prompts)
  return templates, None


def _check(template: str, file: str) -> None:
  """Raise an OptionError unless the template has {c} and no other braces."""
  try:
    filled = template.format(c="\0")
  except (LookupError, ValueError) as error:
    raise OptionError(f"{file}: template {template!r} has braces other than {{c}}: {error!r}.") from error
  if "\0" not in filled:
    raise OptionError(f"{file}: template {template!r} has no {{c}} for the class.")


def _existing(path: str, option: str) -> epath.Path:
  """Return the path of an existing file, or raise a NotThereError that names the option."""
  file = paths.resolve(path)
  if not file.exists() or file.is_dir():
    raise NotThereError(f"{option}={path!r}: there is no such file.")
  return file
