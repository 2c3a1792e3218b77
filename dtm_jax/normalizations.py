"""The mean and standard deviation by which a network expects its RGB input in [0, 1] to be normalised."""

from collections.abc import Sequence

from dtm_jax.errors import OptionError, check_choice

Triple = tuple[float, float, float]
"""One number for each of the channels red, green and blue."""

NORMALIZATIONS: dict[str, tuple[Triple, Triple]] = {
  "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
  "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
  "inception": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}
"""Mean and standard deviation of the channels, by the name that people use."""


def mean_and_std(name: str | Sequence[Sequence[float]]) -> tuple[Triple, Triple]:
  """Return the mean and standard deviation of the channels.

  Args:
    name: a key of NORMALIZATIONS, or the pair (mean, std) itself, which is returned as tuples.

  Raises:
    OptionError: the name is unknown, or it is "dataset", which only a running training resolves.
  """
  if not isinstance(name, str):
    mean, std = name
    return _triple(mean), _triple(std)
  if name == "dataset":
    raise OptionError("normalization='dataset' is known only once a run has started; give a name or numbers.")
  check_choice("normalization", name, NORMALIZATIONS)
  return NORMALIZATIONS[name]


def _triple(values: Sequence[float]) -> Triple:
  red, green, blue = values
  return red, green, blue
