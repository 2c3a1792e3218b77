"""Check how several options of a config fit together, such as `image_size` and `patch_size`."""

import importlib.util
from collections.abc import Callable, Iterator

from ml_collections import ConfigDict

from dtm_jax.options import evaluator_checks
from dtm_jax.options.problems import Problem
from dtm_jax.options.sections import Section, get, sections
from dtm_jax.options.task_options import TRUNK_SIZES
from dtm_jax.options.value_rules import UNITS

Right = Callable[..., bool]
"""Takes keys, and returns whether every key has a value that is allowed."""

_VIEW_OPTIONS = {
  "random_resized": ("scale", "ratio", "padding", "interpolation", "antialias", "rand_augment"),
  "joint": ("scale", "shorter", "longer", "max_class_share", "interpolation", "antialias"),
}
"""The options of `data.view` for each kind of crop, in addition to those of every kind."""

_DEVICE_CROPS = ("random_resized", "pad", "none")
"""What data.device_resident makes on the device; `data.device_views` does it."""

_PATCH_SIZE_OF_TASK = {
  "pretrain": "student.patch_size",
  "finetune": "model.patch_size",
  "segment": "model.patch_size",
  "contrastive": "clip.patch_size",
}


def problems(config: ConfigDict, wrong: set[str]) -> Iterator[Problem]:
  """Yield the problems between options. The options in `wrong` take no part."""

  def right(*keys: str) -> bool:
    return all(get(config, key) is not None and key not in wrong for key in keys)

  yield from _durations(config, right)
  yield from _writers(config, right)
  yield from _optimizer(config, right)
  yield from _view(config, right)
  yield from _device_resident(config, right)
  yield from _patch_grid(config, right)
  yield from _widths_and_heads(config, right)
  yield from _noise(config, right)
  yield from _morphers(config, right)
  yield from _mask(config, right)
  yield from evaluator_checks.problems(config, right)


def num_tokens(config: ConfigDict) -> int | None:
  """Return N, the number of patches that the student sees, or None if the config alone does not give it."""
  key = _PATCH_SIZE_OF_TASK.get(config.task)
  size, patch = get(config, "data.image_size"), get(config, key) if key else None
  return (size // patch) ** 2 if size and patch and not size % patch else None


def _durations(config: ConfigDict, right: Right) -> Iterator[Problem]:
  totals = {unit: get(config, f"total_{unit}") for unit in UNITS}
  if all(value is None for value in totals.values()):
    text = "the length of the run is missing: type total_steps, _examples or _epochs"
    yield Problem("total_steps", None, text)
  first = next((unit for unit in UNITS if totals[unit] is not None), None)
  if config.task in ("frozen", "frozen_clip") and first and totals[first]:
    yield Problem(f"total_{first}", totals[first], f"must be 0: the task {config.task!r} learns nothing")
  for section, name in (("checkpoint", "save"), ("log", "log")):
    if section in config and all(config[section].get(f"{name}_{unit}") is None for unit in UNITS):
      yield Problem(f"{section}.{name}_steps", None, f"is missing: type {name}_steps, _examples or _epochs")
  known = right("total_steps", "optim.accumulate") and totals["steps"]
  if known and config.optim.accumulate > totals["steps"]:
    text = f"must be at most total_steps={totals['steps']}, or the run makes no update"
    yield Problem("optim.accumulate", config.optim.accumulate, text)


def _writers(config: ConfigDict, right: Right) -> Iterator[Problem]:
  """Yield the services whose package is missing, so that no run finds out after hours."""
  for name in (get(config, "log.writers") or ()) if right("log.writers") else ():
    if importlib.util.find_spec(name) is None:
      yield Problem("log.writers", name, f'needs a package that is missing: pip install "dtm_jax[{name}]"')


def _optimizer(config: ConfigDict, right: Right) -> Iterator[Problem]:
  if right("optim.betas", "optim.name") and config.optim.name != "sgd" and len(config.optim.betas) != 2:
    text = f"must be a pair of numbers of at least 0 and below 1 for optim.name={config.optim.name}"
    yield Problem("optim.betas", config.optim.betas, text)
  if config.task == "linear_probe":
    for option in ("clip_norm", "weight_decay"):
      if right(f"optim.{option}") and config.optim[option]:
        yield Problem(f"optim.{option}", config.optim[option], "must be 0: a linear probe has none")


def _view(config: ConfigDict, right: Right) -> Iterator[Problem]:
  view = get(config, "data.view")
  if view is None:
    return
  crop = view.get("crop", "random_resized")
  if config.task == "segment" and crop != "joint":
    yield Problem("data.view.crop", crop, "must be joint: the task 'segment' crops images and maps together")
    return
  if config.task != "segment" and crop == "joint":
    yield Problem("data.view.crop", crop, "must be another crop: only the task 'segment' reads label maps")
    return
  allowed = _VIEW_OPTIONS["joint" if crop == "joint" else "random_resized"]
  for option in view:
    if option not in ("crop", "prefetch", "max_pixels", *allowed) and right(f"data.view.{option}"):
      yield Problem(f"data.view.{option}", view[option], f"is no option of data.view.crop={crop}")
  if crop != "joint" and right("data.view.scale") and view.scale[1] > 1:
    yield Problem("data.view.scale", view.scale, "must be shares of the image's area: at most 1")
  if right("data.view.rand_augment", "augment.color_jitter") and config.augment.color_jitter:
    text = "must be 0 beside data.view.rand_augment"
    yield Problem("augment.color_jitter", config.augment.color_jitter, text)


def _device_resident(config: ConfigDict, right: Right) -> Iterator[Problem]:
  """Yield the options of the view that cannot be made on the device."""
  view = get(config, "data.view")
  if view is None or not right("data.device_resident") or not config.data.device_resident:
    return
  beside = "with data.device_resident=True"
  crop, policy = view.get("crop", "random_resized"), view.get("rand_augment")
  if crop not in _DEVICE_CROPS:
    text = f"must be False with data.view.crop={crop}; devices crop with {', '.join(_DEVICE_CROPS)}"
    yield Problem("data.device_resident", True, text)
  if policy is not None:
    yield Problem("data.view.rand_augment", policy, f"must be None {beside}")
  if view.get("interpolation") == "area" and not view.get("antialias", False):
    text = f"must be bicubic, bilinear or lanczos {beside} and data.view.antialias=False"
    yield Problem("data.view.interpolation", "area", text)


def _patch_grid(config: ConfigDict, right: Right) -> Iterator[Problem]:
  key = _PATCH_SIZE_OF_TASK.get(config.task)
  if not key or not right(key, "data.image_size") or not config.data.image_size:
    return
  size, patch = config.data.image_size, get(config, key)
  if size % patch:
    near = sorted({max(size // patch, 1) * patch, -(-size // patch) * patch})
    text = f"must divide data.image_size={size}; data.image_size={' or '.join(map(str, near))} would do"
    yield Problem(key, patch, text)


def _widths_and_heads(config: ConfigDict, right: Right) -> Iterator[Problem]:
  for path in ("student", "model", "clip.image", "clip.text"):
    model = get(config, path)
    keys = ("width", "num_heads", "variant")
    if model is None or not all(right(f"{path}.{key}") for key in keys if key in model):
      continue
    defaults = TRUNK_SIZES.get(model.get("variant"), (0, 0))
    width, heads = model.get("width") or defaults[0], model.get("num_heads") or defaults[1]
    if width and heads and width % heads:
      key = "width" if "width" in model else "num_heads"
      text = f"{path}: width {width} must be a multiple of num_heads {heads}"
      yield Problem(f"{path}.{key}", model.get(key), text)


def _noise(config: ConfigDict, right: Right) -> Iterator[Problem]:
  if config.task != "pretrain" and right("teacher.noise") and config.teacher.noise:
    text = "must be 0: only the task 'pretrain' adds noise to the teacher's tokens"
    yield Problem("teacher.noise", config.teacher.noise, text)


def _morphers(config: ConfigDict, right: Right) -> Iterator[Problem]:
  if config.task == "pretrain" and "morphers" in config:
    weights = [section.get("weight") for section in config.morphers.values()]
    if not any(weights):
      yield Problem("morphers", list(config.morphers), "one morpher at least must have a weight above 0")
  for section in sections(config):
    if section.socket == "morphers":
      tokens = num_tokens(config) if section.path.startswith("morphers.") else None
      yield from _groups(config, section, tokens, right)


def _groups(config: ConfigDict, section: Section, tokens: int | None, right: Right) -> Iterator[Problem]:
  path = section.path
  value = lambda option: section.options.get(option) if right(f"{path}.{option}") else None
  low, high, groups = value("min_groups"), value("max_groups"), value("groups")
  if groups is not None and (low not in (None, 1) or high is not None):
    text = "is a fixed number; it goes without min_groups and max_groups"
    yield Problem(f"{path}.groups", groups, text)
  if low is not None and high is not None and low > high:
    yield Problem(f"{path}.min_groups", low, f"must be at most max_groups={high}")
  for option, number in (("min_groups", low), ("max_groups", high), ("groups", groups)):
    if tokens and number is not None and number > tokens:
      yield Problem(f"{path}.{option}", number, f"must be at most {tokens}, the number of patches")
  shards = value("num_shards")
  if shards and right("batch_size") and value("drawn_per") == "shard" and config.batch_size % shards:
    yield Problem(f"{path}.num_shards", shards, f"must divide batch_size={config.batch_size}")


def _mask(config: ConfigDict, right: Right) -> Iterator[Problem]:
  mask, tokens = get(config, "mask"), num_tokens(config)
  if mask is None or config.task != "pretrain":
    return
  if mask.get("num_masked") is None and mask.get("share") is None:
    yield Problem("mask.share", None, "is missing: type mask.share or mask.num_masked")
  if tokens and right("mask.num_masked") and mask.num_masked > tokens:
    side = round(tokens**0.5)
    text = f"must be at most {tokens}, the number of patches in a {side}x{side} grid; mask.share is a share"
    yield Problem("mask.num_masked", mask.num_masked, text)
  if mask.get("kind") == "random":
    for option in ("min_block", "min_patches", "max_patches", "min_aspect"):
      if mask.get(option) is not None:
        yield Problem(f"mask.{option}", mask[option], "is an option of mask.kind=block only")
