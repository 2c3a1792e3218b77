"""Check that the evaluators of a config fit its task: the outputs that they ask for, and their windows."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from dtm_jax.options.problems import Problem
from dtm_jax.options.sections import Section, sections
from dtm_jax.options.task_options import PREDICTS, READS_LOGITS


def problems(config: ConfigDict, right: Callable[..., bool]) -> Iterator[Problem]:
  """Yield the problems of the evaluators. See `cross_checks.Right` for `right`."""
  offered = PREDICTS.get(config.task, ())
  if "ema" in config and not config.ema.get("decay"):
    offered = tuple(name for name in offered if name != "logits_ema")
  for section in sections(config) if offered else ():
    if section.socket == "evaluators":
      yield from _outputs(config.task, section, offered)
      yield from _windows(section, right)


def _outputs(task: str, section: Section, offered: Sequence[str]) -> Iterator[Problem]:
  missing = [name for name in _asked_of_task(section) if name not in offered]
  if missing:
    keys = ("features", "outputs", "output", "tokens")
    key = next((key for key in keys if key in section.options), "name")
    text = f"the task {task!r} has no output {', '.join(missing)}; it has: {', '.join(offered)}"
    yield Problem(f"{section.path}.{key}", section.options.get(key, section.name), text)
    return
  reader = READS_LOGITS.get(task)
  if section.name in READS_LOGITS.values() and section.name != reader:
    text = f"must be {reader}, which reads the logits of the task {task!r}"
    yield Problem(f"{section.path}.name", section.name, text)


def _asked_of_task(section: Section) -> Sequence[str]:
  """Return the outputs of the task that a known evaluator reads."""
  options: Mapping[str, Any] = section.options
  match section.name:
    case "knn" | "linear":
      return options.get("features", ("student",))
    case "classification":
      return options.get("outputs") or ("logits",)
    case "segmentation":
      return (options.get("output", "logits"),)
    case "best_head":
      return ("logits", "rates")
    case "zeroshot":
      return ("image", "text")
    case "snapshots":
      return options.get("tokens", ("student_patches", "teacher_tokens"))
    case "consistency":
      return (options.get("tokens", "patches"),)
  return ()


def _windows(section: Section, right: Callable[..., bool]) -> Iterator[Problem]:
  crop = section.options.get("crop") or section.options.get("image_size")
  if right(f"{section.path}.stride") and isinstance(crop, int) and 0 < crop < section.options.stride:
    text = f"must be at most crop={crop}, or pixels are left out"
    yield Problem(f"{section.path}.stride", section.options.stride, text)
