"""Read the normalisation of a model from the files beside its weights, for every format and teacher.

| file | written by | keys |
|---|---|---|
| processor_config.json, its "image_processor" | transformers 5 | image_mean, image_std, rescale_factor |
| preprocessor_config.json | transformers | the same |
| processor_config.json itself | transformers 4 | the same |
| open_clip_config.json, its "preprocess_cfg" | open_clip | mean, std |
| config.json, its "pretrained_cfg" | timm | mean, std |
| config.json itself | older timm, and `vit_weights.save` | mean, std |

The first file that gives a mean or a standard deviation counts; transformers uses the same order. A later
file with other values is only logged.
"""

import math
from typing import Any

from absl import logging

from dtm_jax.models.files import weight_files
from dtm_jax.models.files.file_checks import UnreadableFileError
from dtm_jax.models.files.weight_files import Found
from dtm_jax.normalizations import NORMALIZATIONS, Triple

_SOURCES = (
  (weight_files.PROCESSOR, "image_processor", "image_mean", "image_std"),
  (weight_files.PREPROCESSOR, None, "image_mean", "image_std"),
  (weight_files.PROCESSOR, None, "image_mean", "image_std"),
  (weight_files.OPEN_CLIP_CONFIG, "preprocess_cfg", "mean", "std"),
  (weight_files.CONFIG, "pretrained_cfg", "mean", "std"),
  (weight_files.CONFIG, None, "mean", "std"),
)
_PIXELS = 255


def mean_and_std_in_files(found: Found, default: str) -> tuple[Triple, Triple]:
  """Return the mean and the standard deviation of RGB values in [0, 1] from the files beside the weights.

  Args:
    default: name of the normalisation that fills what no file gives.

  Raises:
    UnreadableFileError: a value is not three numbers; the message names the file and the key.
  """
  said = []
  for name, section, mean_key, std_key in _SOURCES:
    where = f"{found.folder / name}" + (f", {section!r}" if section else "")
    content = found.json(name)
    content = content.get(section, {}) if section else content
    if not isinstance(content, dict):
      raise UnreadableFileError(
        f"{where} holds a {type(content).__name__}, but it must hold an object {{...}}."
      )
    if mean_key.startswith("image_") and content.get("do_normalize") is False:
      said.append((where, ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))))
    elif content.get(mean_key) is not None or content.get(std_key) is not None:
      said.append((where, _values(content, mean_key, std_key, where, default)))
  if not said:
    logging.info("No file beside %s gives a normalisation. Using that of %r.", found.file, default)
    return NORMALIZATIONS[default]
  (taken, values), *others = said
  for where, other in others:
    if other != values:
      logging.warning("Using the normalisation %s of %s, not %s of %s.", values, taken, other, where)
  return values


def _values(
  content: dict[str, Any], mean_key: str, std_key: str, where: str, default: str
) -> tuple[Triple, Triple]:
  """Return the mean and the standard deviation of one file; `default` fills a missing one."""
  values: list[Triple] = []
  for key, fallback in zip((mean_key, std_key), NORMALIZATIONS[default], strict=True):
    if content.get(key) is None:
      logging.warning("%s has no %s. Using that of %r.", where, key, default)
      values.append(fallback)
    else:
      values.append(_triple(content[key], f"{where}: {key}", positive=key == std_key))
  factor = 1.0
  if mean_key.startswith("image_"):  # these libraries rescale the pixels before they normalise
    rescale = content.get("rescale_factor") or 1 / _PIXELS
    if not isinstance(rescale, int | float) or not math.isfinite(rescale) or rescale < 0:
      raise UnreadableFileError(f"{where}: rescale_factor is {rescale!r}, not a positive number.")
    factor = _PIXELS * (1.0 if content.get("do_rescale") is False else rescale)
  mean, std = values
  if math.isclose(factor, 1.0, rel_tol=1e-6):
    return mean, std
  return _divided(mean, factor), _divided(std, factor)


def _divided(values: Triple, factor: float) -> Triple:
  red, green, blue = values
  return red / factor, green / factor, blue / factor


def _triple(value: Any, what: str, *, positive: bool) -> Triple:
  """Return a number or a list of three as three numbers."""
  numbers = value if isinstance(value, list) else [value] * 3
  numeric = all(isinstance(number, int | float) and not isinstance(number, bool) for number in numbers)
  if len(numbers) != 3 or not numeric or not all(math.isfinite(number) for number in numbers):
    raise UnreadableFileError(f"{what} is {value!r}, not three numbers.")
  if positive and min(numbers) <= 0:
    raise UnreadableFileError(f"{what} is {value!r}; a standard deviation must be above 0.")
  red, green, blue = map(float, numbers)
  return red, green, blue
