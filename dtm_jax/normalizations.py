"""What a network expects its RGB input in [0, 1] to be normalised by, under the names that people use."""

from collections.abc import Sequence

from dtm_jax.errors import OptionError

Triple = tuple[float, float, float]

NORMALIZATIONS: dict[str, tuple[Triple, Triple]] = {
  "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
  "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
  "inception": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}
"""Mean and standard deviation of the channels."""


def mean_and_std(name: str | Sequence[Sequence[float]]) -> tuple[Triple, Triple]:
  """Of the channels, by name; or those given, as a pair of triples.

  Raises:
    OptionError: an unknown name.
  """
  if not isinstance(name, str):
    mean, std = name
    return tuple(mean), tuple(std)
  if name == "dataset":
    raise OptionError("normalization='dataset' is known only once a run has started; give a name or numbers.")
  if name not in NORMALIZATIONS:
    raise OptionError(f"Unknown normalization {name!r}. Available: {', '.join(NORMALIZATIONS)}.")
  return NORMALIZATIONS[name]
