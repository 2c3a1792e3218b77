"""Checks of a config before anything is loaded: names and values first, then how they fit together.

`check(config)` needs neither JAX nor TensorFlow; `check_devices` knows the devices of the run.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from dtm_jax import plugins
from dtm_jax.errors import OptionError
from dtm_jax.options import table as option_rules
from dtm_jax.options.typed import (
  UNITS,
  WORDS,
  Problem,
  Section,
  dotted_keys,
  get,
  no_such_option,
  options_of,
  rule_of,
  section_of,
  sections,
)
from dtm_jax.storage import paths

REQUIRED = {
  "pretrain": ("teacher", "student", "mask", "morphers", "loss", "optim", "augment", "init_from", "probe"),
  "finetune": ("model", "mix", "loss", "optim", "ema", "augment", "init_from"),
  "segment": ("model", "loss", "optim", "augment", "init_from"),
  "linear_probe": ("teacher", "probe", "optim", "augment"),
  "contrastive": ("clip", "text", "optim", "augment"),
  "frozen": ("teacher",),
  "frozen_clip": ("clip",),
}
"""The sections that each task reads."""

WAY_OUT = {
  "checkpoint/path": "the workdir of a run",
  "folder/data_dir": "the folder of the images",
  "segmentation_folder/data_dir": "the folder of images/ and annotations/",
}


def check(config: ConfigDict, problems: Sequence[Problem] = ()) -> None:
  """Check every option of a config, and how the options fit together.

  Args:
    problems: what is already known to be wrong, for the same message.

  Raises:
    OptionError: the message lists all problems, each with key, value and what is allowed.
  """
  found = list(problems)
  if not found or get(config, "task") is not None:
    found += list(_structure(config))
  if not any(problem.key == "task" for problem in found):
    found += _values(config)
    wrong = {problem.key for problem in found}
    found += [each for each in _relations(config, wrong) if each.key not in wrong]
  unique = {problem.key: problem for problem in reversed(found)}  # the first of each key
  if unique:
    lines = [str(problem) for problem in reversed(unique.values())]
    head = f"{len(lines)} options are not right:\n  " if len(lines) > 1 else ""
    raise OptionError(head + "\n  ".join(lines))


def check_all(*checks: Callable[[], Any]) -> None:
  """Run all checks and raise one OptionError with the messages of those that fail."""
  messages = []
  for each in checks:
    try:
      each()
    except OptionError as error:
      messages.append(str(error))
  if messages:
    raise OptionError("\n".join(messages))


def check_devices(config: ConfigDict, device_count: int, process_count: int) -> None:
  """Check that the devices and processes of the run divide what they share.

  Raises:
    OptionError: the message lists all problems.
  """
  problems = list(_mesh_problems(config, device_count))
  batches = {"batch_size": config.batch_size} if get(config, "total_steps") != 0 else {}
  for section in sections(config):
    if section.socket == "evaluators" and section.options.get("batch_size") is not None:
      batches[f"{section.path}.batch_size"] = section.options.batch_size
  for key, size in batches.items():
    for count, what in ((process_count, "processes"), (device_count, "devices")):
      if size % count:
        up = -(-size // count) * count
        text = (
          f"the {count} {what} must share it evenly; {max(size // count * count, count)} or {up} would do"
        )
        problems.append(Problem(key, size, text))
        break
  if problems:
    raise OptionError("\n".join(map(str, problems)))


def check_workdir(workdir: str) -> None:
  """Check that the folder of the run exists or can be made. Nothing is written.

  Raises:
    OptionError: it is empty, a file, below a file, or in a folder that cannot be written to.
  """
  if not workdir.strip():
    raise OptionError("--workdir= is empty: name the folder of the run, or leave --workdir out.")
  if paths.is_remote(workdir):
    return
  folder = os.fspath(paths.resolve(workdir))
  while not os.path.lexists(folder):
    folder = os.path.dirname(folder)
  if not os.path.isdir(folder):
    what = "is a file" if os.path.isfile(folder) else "is no folder"
    raise OptionError(f"--workdir={workdir}: {folder} {what}; name a folder.")
  if not os.access(folder, os.W_OK | os.X_OK):
    raise OptionError(f"--workdir={workdir}: {folder} cannot be written to; name another folder.")


def _structure(config: ConfigDict) -> Iterator[Problem]:
  """The task, the sections it reads, and the names in the sockets."""
  task = get(config, "task")
  if task not in plugins.available("tasks"):
    yield Problem("task", task, f"must be one of {', '.join(plugins.available('tasks'))}")
    return
  for name in ("seed", "batch_size", "data", "mesh", "checkpoint", "log", "evals", *REQUIRED.get(task, ())):
    if name not in config:
      yield Problem(name, None, f"the config lacks it, and the task {task!r} reads it")
  for section in sections(config):
    base, _, variant = str(section.name).partition("/")
    try:
      plugins.require_name(section.socket, base)
    except OptionError as error:
      yield Problem(f"{section.path}.name", section.name, str(error).removesuffix("."))
      continue
    if variant and "variant" not in options_of(section):
      yield Problem(f"{section.path}.name", section.name, f"{base!r} has no variants; write {base!r} alone")
    yield from _missing(section, variant)


def _missing(section: Section, variant: str) -> Iterator[Problem]:
  what = f"{WORDS[section.socket]} {section.name!r}"
  for option in options_of(section).values():
    if not option.required or section.options.get(option.name) is not None:
      continue
    key = f"{section.path}.{option.name}"
    if section.socket == "evaluators" and option.name == "image_size" and option.name in section.options:
      continue  # the size of the data set's images, which is not known yet
    if option.name != "variant":
      way = WAY_OUT.get(f"{section.name}/{option.name}")
      yield Problem(key, "", f"{what} needs {option.name}" + (f", {way}" if way else ""))
    elif not variant:
      yield Problem(f"{section.path}.name", section.name, f"{what} needs a variant: {section.name}/NAME")


def _values(config: ConfigDict) -> list[Problem]:
  """Every option against its rule."""
  problems = []
  for key in dotted_keys(config):
    rule, value = rule_of(config, key), get(config, key)
    if rule is not None:
      text = rule.problem(value)
      if text and not (value is None and _may_be_left(config, key)):
        problems.append(Problem(key, value, text))
    elif value is not None:
      problems.append(Problem(key, value, no_such_option(config, key)))
  return problems


def _may_be_left(config: ConfigDict, key: str) -> bool:
  """Whether None leaves the option to the default of the socket's choice."""
  section = section_of(config, key)
  return section is not None and section.socket != "evaluators"


def _relations(config: ConfigDict, wrong: set[str]) -> Iterator[Problem]:
  """How several options fit together; those in `wrong` are left out."""
  right = lambda *keys: all(get(config, key) is not None and key not in wrong for key in keys)
  checks = (_duration_problems, _optimizer_problems, _view_problems, _grid_problems, _model_problems)
  for each in (*checks, _morpher_problems, _mask_problems, _evaluator_problems):
    yield from each(config, right)


def _duration_problems(config: ConfigDict, right) -> Iterator[Problem]:
  totals = {unit: get(config, f"total_{unit}") for unit in UNITS}
  if all(value is None for value in totals.values()):
    yield Problem(
      "total_steps", None, "the length of the run is missing: type total_steps, _examples or _epochs"
    )
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


def _optimizer_problems(config: ConfigDict, right) -> Iterator[Problem]:
  if right("optim.betas", "optim.name") and config.optim.name != "sgd" and len(config.optim.betas) != 2:
    text = f"must be a pair of numbers of at least 0 and below 1 for optim.name={config.optim.name}"
    yield Problem("optim.betas", config.optim.betas, text)
  if config.task == "linear_probe":
    for option in ("clip_norm", "weight_decay"):
      if right(f"optim.{option}") and config.optim[option]:
        yield Problem(f"optim.{option}", config.optim[option], "must be 0: a linear probe has none")


VIEW_OPTIONS = {
  "random_resized": ("scale", "ratio", "padding", "interpolation", "antialias", "rand_augment"),
  "joint": ("scale", "shorter", "longer", "max_class_share", "interpolation", "antialias"),
}


def _view_problems(config: ConfigDict, right) -> Iterator[Problem]:
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
  allowed = VIEW_OPTIONS["joint" if crop == "joint" else "random_resized"]
  for option in view:
    if option not in ("crop", "prefetch", "max_pixels", *allowed) and right(f"data.view.{option}"):
      yield Problem(f"data.view.{option}", view[option], f"is no option of data.view.crop={crop}")
  if crop != "joint" and right("data.view.scale") and view.scale[1] > 1:
    yield Problem("data.view.scale", view.scale, "must be shares of the image's area: at most 1")
  jitter = right("data.view.rand_augment", "augment.color_jitter")
  if jitter and config.augment.color_jitter:
    yield Problem(
      "augment.color_jitter", config.augment.color_jitter, "must be 0 beside data.view.rand_augment"
    )


def _patch_key(config: ConfigDict) -> str | None:
  keys = {"pretrain": "student", "finetune": "model", "segment": "model", "contrastive": "clip"}
  return f"{keys[config.task]}.patch_size" if config.task in keys else None


def _grid_problems(config: ConfigDict, right) -> Iterator[Problem]:
  key = _patch_key(config)
  if not key or not right(key, "data.image_size") or not config.data.image_size:
    return
  size, patch = config.data.image_size, get(config, key)
  if size % patch:
    near = sorted({max(size // patch, 1) * patch, -(-size // patch) * patch})
    text = f"must divide data.image_size={size}; data.image_size={' or '.join(map(str, near))} would do"
    yield Problem(key, patch, text)


def num_tokens(config: ConfigDict) -> int | None:
  """The number of patches that the student sees, if the config alone tells it."""
  key = _patch_key(config)
  size, patch = get(config, "data.image_size"), get(config, key) if key else None
  return (size // patch) ** 2 if size and patch and not size % patch else None


def _model_problems(config: ConfigDict, right) -> Iterator[Problem]:
  for path in ("student", "model", "clip.image", "clip.text"):
    section = get(config, path)
    if section is None or not all(
      right(f"{path}.{key}") for key in ("width", "num_heads", "variant") if key in section
    ):
      continue
    width, heads = option_rules.TRUNK_SIZES.get(section.get("variant"), (None, None))
    width, heads = section.get("width") or width, section.get("num_heads") or heads
    if width and heads and width % heads:
      key = "width" if "width" in section else "num_heads"
      yield Problem(
        f"{path}.{key}", section.get(key), f"{path}: width {width} must be a multiple of num_heads {heads}"
      )


def _morpher_problems(config: ConfigDict, right) -> Iterator[Problem]:
  if config.task == "pretrain" and "morphers" in config:
    weights = [section.get("weight") for section in config.morphers.values()]
    if not any(weights):
      yield Problem("morphers", list(config.morphers), "one morpher at least must have a weight above 0")
  for section in sections(config):
    if section.socket == "morphers":
      tokens = num_tokens(config) if section.path.startswith("morphers.") else None
      yield from _group_problems(config, section, tokens, right)


def _group_problems(config: ConfigDict, section: Section, tokens: int | None, right) -> Iterator[Problem]:
  value = lambda option: section.options.get(option) if right(f"{section.path}.{option}") else None
  low, high, groups = value("min_groups"), value("max_groups"), value("groups")
  if groups is not None and (low not in (None, 1) or high is not None):
    yield Problem(
      f"{section.path}.groups", groups, "is a fixed number; it goes without min_groups and max_groups"
    )
  if low is not None and high is not None and low > high:
    yield Problem(f"{section.path}.min_groups", low, f"must be at most max_groups={high}")
  for option, number in (("min_groups", low), ("max_groups", high), ("groups", groups)):
    if tokens and number is not None and number > tokens:
      yield Problem(f"{section.path}.{option}", number, f"must be at most {tokens}, the number of patches")
  shards = value("num_shards")
  if shards and right("batch_size") and value("drawn_per") == "shard" and config.batch_size % shards:
    yield Problem(f"{section.path}.num_shards", shards, f"must divide batch_size={config.batch_size}")


def _mask_problems(config: ConfigDict, right) -> Iterator[Problem]:
  mask, tokens = get(config, "mask"), num_tokens(config)
  if mask is None or config.task != "pretrain":
    return
  if mask.get("num_masked") is None and mask.get("share") is None:
    yield Problem("mask.share", None, "is missing: type mask.share or mask.num_masked")
  if tokens and right("mask.num_masked") and mask.num_masked > tokens:
    side = round(tokens**0.5)
    text = f"must be at most {tokens}, the patches of a {side}x{side} grid; mask.share counts in shares"
    yield Problem("mask.num_masked", mask.num_masked, text)
  if mask.get("kind") == "random":
    for option in ("min_block", "min_patches", "max_patches", "min_aspect"):
      if mask.get(option) is not None:
        yield Problem(f"mask.{option}", mask[option], "is an option of mask.kind=block only")


def _evaluator_problems(config: ConfigDict, right) -> Iterator[Problem]:
  offered = option_rules.PREDICTS.get(config.task)
  for section in sections(config) if offered else ():
    if section.socket != "evaluators":
      continue
    if "ema" in config and not config.ema.get("decay"):
      offered = tuple(name for name in offered if name != "logits_ema")
    needs = _asked_of_task(section)
    missing = [name for name in needs if name not in offered]
    if missing:
      keys = ("features", "outputs", "output", "tokens")
      key = next((key for key in keys if key in section.options), "name")
      text = f"the task {config.task!r} has no output {', '.join(missing)}; it has: {', '.join(offered)}"
      yield Problem(f"{section.path}.{key}", section.options.get(key, section.name), text)
    reader = option_rules.READS_LOGITS.get(config.task)
    if not missing and section.name in option_rules.READS_LOGITS.values() and section.name != reader:
      text = f"must be {reader}, which reads the logits of the task {config.task!r}"
      yield Problem(f"{section.path}.name", section.name, text)
    crop = section.options.get("crop") or section.options.get("image_size")
    if right(f"{section.path}.stride") and isinstance(crop, int) and 0 < crop < section.options.stride:
      text = f"must be at most crop={crop}, or pixels are left out"
      yield Problem(f"{section.path}.stride", section.options.stride, text)


def _asked_of_task(section: Section) -> Sequence[str]:
  """Names of the task's functions that a known evaluator calls."""
  options: Mapping[str, Any] = section.options
  asked = {
    "knn": lambda: options.get("features", ("student",)),
    "linear": lambda: options.get("features", ("student",)),
    "classification": lambda: options.get("outputs") or ("logits",),
    "segmentation": lambda: (options.get("output", "logits"),),
    "best_head": lambda: ("logits", "rates"),
    "zeroshot": lambda: ("image", "text"),
    "consistency": lambda: (options.get("tokens", "patches"),),
  }
  return asked.get(section.name, tuple)()


def _mesh_problems(config: ConfigDict, device_count: int) -> Iterator[Problem]:
  data, fsdp = config.mesh.data, config.mesh.fsdp
  if data == fsdp == -1:
    yield Problem("mesh.data", -1, "only one of mesh.data and mesh.fsdp may be -1")
  elif -1 in (data, fsdp):
    key, size = ("mesh.fsdp", fsdp) if data == -1 else ("mesh.data", data)
    if device_count % size:
      yield Problem(key, size, f"must divide the number of devices, {device_count}")
  elif data * fsdp != device_count:
    text = f"times mesh.fsdp={fsdp} must be the number of devices, {device_count}; -1 takes what is left"
    yield Problem("mesh.data", data, text)
