"""Checks that an evaluated data set has the classes that a model or another data set knows."""

from collections.abc import Sequence

from absl import logging

from dtm_jax import datasets
from dtm_jax.data import Dataset
from dtm_jax.errors import OptionError


def require_classes(num_scores: int, dataset: Dataset) -> None:
  """Check that a classifier has one score for each class of a data set.

  Raises:
    OptionError: the numbers differ.
  """
  num_classes = len(dataset.class_names or ())
  if num_scores != num_classes:
    raise OptionError(
      f"The classifier has {num_scores} classes, data set {dataset.name!r} has {num_classes}."
    )


def require_same_classes(evaluated: Dataset, known: Dataset | None) -> None:
  """Check that the classes of an evaluated data set are those that its answers come from.

  The class names are compared. Names that are the numbers 0, 1, ... match any names in the same order. Data
  sets without class names are not compared. If the evaluated set lacks examples of some classes, a line of
  the log names them.

  Args:
    evaluated: the data set with the true labels.
    known: the data set that gave the classes, such as the training set. None skips the check.

  Raises:
    OptionError: the evaluated set has other classes, or numbers the same classes in another order.
  """
  if known is None or not known.class_names or not evaluated.class_names:
    return
  if evaluated.class_names == known.class_names:
    _compare_examples(evaluated, known)
    return
  if len(evaluated.class_names) == len(known.class_names):
    for numbered, named in ((evaluated, known), (known, evaluated)):
      if _are_numbers(numbered.class_names or ()):
        logging.warning(
          "The class names of %r are numbers. They are matched by order: class 0 with %r of %r, and so on.",
          numbered.name, (named.class_names or ("",))[0], named.name,
        )  # fmt: skip
        return
  known_labels = {name: label for label, name in enumerate(known.class_names)}
  _refuse_unknown([name for name in evaluated.class_names if name not in known_labels], evaluated, known)
  name, label = next(
    (name, label) for label, name in enumerate(evaluated.class_names) if known_labels[name] != label
  )
  raise OptionError(
    f"Data sets {evaluated.name!r} and {known.name!r} number their classes in two ways: {name!r} is {label} "
    f"of {len(evaluated.class_names)} in the first and {known_labels[name]} of {len(known_labels)} in the "
    "second. Place both in one data_dir, as its folders train/ and val/."
  )


def _compare_examples(evaluated: Dataset, known: Dataset) -> None:
  """Compare which classes two data sets have examples of, if both know their labels."""
  if evaluated.labels is None or known.labels is None:
    return
  evaluated_labels, known_labels = set(evaluated.labels.tolist()), set(known.labels.tolist())
  names = lambda labels: [name for label, name in enumerate(known.class_names or ()) if label in labels]
  if unknown := names(evaluated_labels - known_labels):
    if not datasets.is_part(known):
      _refuse_unknown(unknown, evaluated, known)
    logging.warning("%r has no example of %s of %r.", known.name, _list(unknown), evaluated.name)
  if (lacking := names(known_labels - evaluated_labels)) and not datasets.is_part(evaluated):
    logging.info("%r has no example of %s of %r.", evaluated.name, _list(lacking), known.name)


def _refuse_unknown(names: list[str], evaluated: Dataset, known: Dataset) -> None:
  """Raise an OptionError if there are names of classes that the `known` set lacks."""
  if names:
    raise OptionError(
      f"Data set {evaluated.name!r} has {_list(names)} that {known.name!r} does not have. {known.name!r} has "
      f"{_list(known.class_names or ())}. If a folder such as 'images' is not a class, sort its images into "
      "one folder per class. Or add a file val_annotations.txt beside it with '<file> <class>' on each line."
    )


def _list(names: Sequence[str], shown: int = 5) -> str:
  """Return the number of classes and their first names."""
  more = ", ..." if len(names) > shown else ""
  return f"{len(names)} class{'es' * (len(names) != 1)} ({', '.join(names[:shown])}{more})"


def _are_numbers(names: Sequence[str]) -> bool:
  return all(name.isdecimal() and int(name) == label for label, name in enumerate(names))
