"""Describe options for people: the meaning, type, default and choices of each, for `--help` and the docs.

for option in options_of_config(load_config("configs/vitb16.py")):
  print(option.key, option.value, option.meaning)

for title, options in all_options().items(): ...        # independent of a config, for the docs
"""

import dataclasses
import functools
from typing import Any

from ml_collections import ConfigDict

from dtm_jax import plugins
from dtm_jax.options.known_options import known_keys, rule_of, rule_of_choice
from dtm_jax.options.run_options import RUN_OPTIONS
from dtm_jax.options.sections import NOUNS, get, section_of
from dtm_jax.options.socket_options import ALWAYS, SOCKET_OPTIONS
from dtm_jax.options.task_options import TASK_OPTIONS
from dtm_jax.options.value_rules import UNITS, Rule
from dtm_jax.signatures import parameters_in_source

_SIZES_OF_VARIANT = ("width", "depth", "num_heads")
_VIT, _VIEWS = "models/vit/model.py", "data/views.py"
_DEFINITIONS: dict[str, list[tuple[str, str]]] = {
  "optim": [("training/optim.py", "make_optimizer")],
  "student": [(_VIT, "Trunk"), (_VIT, "build")],
  "model": [
    (_VIT, "Trunk"),
    (_VIT, "build"),
    ("models/vit/classifier.py", "Classifier"),
    ("models/vit/segmenter.py", "Segmenter"),
  ],
  "mask": [("masking.py", "block_mask")],
  "mix": [("augment.py", "mix")],
  "init_from": [("models/vit/transfer.py", "to_finetune")],
  "data.view": [
    (_VIEWS, "JointView"),
    (_VIEWS, "TrainOptions"),
    ("data/training_batches.py", "train_batches"),
  ],
}
"""Section -> the functions and classes that get its options as keyword arguments and so hold their defaults.
If several have the same option, the last one counts."""

_DEFAULTS = {
  "resume": "'check'",
  "replay": "None",
  "log.flight_recorder": "True",
  "log.report": "True",
  "log.writers": "()",
  "at_start": "False",
  "noise": "0.0",
  "data.device_resident": "False",
  "train.steps_per_call": "1",
  "data.view.max_pixels": "200000000",
}
"""Other defaults: those with which the code reads an option from the config, and a constant's value."""


@dataclasses.dataclass(frozen=True)
class Option:
  """Describe one option.

  Attributes:
    key: as users type it after "--config.", such as "optim.lr".
    meaning: sentences, with unit.
    type: in words, such as "whole number or None".
    allowed: what is allowed, in words that follow "must be".
    choices: the allowed names, if it is one of a list of names.
    default: what holds if a config leaves the option out, as Python code; "" if it must not be left out.
    value: its value in the config, or `LEFT_OUT`.
  """

  key: str
  meaning: str
  type: str
  allowed: str
  choices: tuple[str, ...] = ()
  default: str = ""
  value: Any = None

  @property
  def section(self) -> str:
    """The key of the section that holds the option; "" for options at the top."""
    return self.key.rpartition(".")[0]


class _LeftOut:
  def __repr__(self) -> str:
    return "(its default)"


LEFT_OUT = _LeftOut()
"""The value of an option that a config could have and does not have."""


def options_of_config(config: ConfigDict) -> list[Option]:
  """Return all options that a config has or could have, section by section, those at the top first."""
  keys = [key for key in known_keys(config) if not isinstance(get(config, key), ConfigDict)]
  rules = {key: rule for key in keys if (rule := rule_of(config, key)) is not None}
  options = [_option_of_config(config, key, rule) for key, rule in rules.items()]
  places = {
    section: i for i, section in enumerate(dict.fromkeys(["", *(option.section for option in options)]))
  }
  return sorted(options, key=lambda option: places[option.section])


def all_options() -> dict[str, list[Option]]:
  """Return the options of every run, task, teacher, data set, morpher and evaluator by title.

  The key of an option of a choice begins with the usual place of the choice, such as "teacher." or
  "evals.NAME.".
  """
  tables = {"Every run": _of_table(RUN_OPTIONS, "")}
  tables |= {f"Task {task}": _of_table(rules, task) for task, rules in TASK_OPTIONS.items()}
  places = {
    "teachers": "teacher.",
    "datasets": "data.dataset.",
    "morphers": "morphers.NAME.",
    "evaluators": "evals.NAME.",
  }
  for socket, place in places.items():
    noun = NOUNS[socket].capitalize()
    if always := ALWAYS.get(socket):
      tables[f"Every {noun.lower()}"] = [
        _described(f"{place}{option}", SOCKET_OPTIONS[socket][option], _default(option, ""))
        for option in always
      ]
    for name in plugins.available(socket):
      tables[f"{noun} {name}"] = [
        _described(f"{place}{option.name}", rule_of_choice(socket, name, option), option.default or "")
        for option in plugins.options_of(socket, name).values()
      ]
  return tables


def _of_table(rules: dict[str, Rule], task: str) -> list[Option]:
  return [_described(key, rule, _default(key, task)) for key, rule in rules.items()]


def _option_of_config(config: ConfigDict, key: str, rule: Rule) -> Option:
  section, option = section_of(config, key), key.rpartition(".")[2]
  if section is None or not section.exists:
    default = _default(key, config.get("task"))
  else:
    parameter = section.accepted_options().get(option)
    default = _default(option, "") if parameter is None else parameter.default or ""
  choices = rule.names
  if option == "name" and section is not None:
    choices = tuple(plugins.available(section.socket))
  return _described(key, dataclasses.replace(rule, names=choices), default, get(config, key, LEFT_OUT))


def _described(key: str, rule: Rule, default: str, value: Any = LEFT_OUT) -> Option:
  choices = tuple(plugins.available("tasks")) if key == "task" else rule.names
  return Option(key, rule.about, rule.type_name, rule.allowed, choices, default, value)


def _default(key: str, task: str) -> str:
  """Return the default of an option of a run or a task, as the code has it; "" if the code has none."""
  section, _, option = key.rpartition(".")
  if section in ("student", "model") and option in _SIZES_OF_VARIANT:
    return "that of variant"
  if key in _DEFAULTS or option.rpartition("_")[2] in UNITS:
    return _DEFAULTS.get(key, "None")
  default = ""
  for file, name in _DEFINITIONS.get(section, ()):
    if name != {"finetune": "Segmenter", "segment": "Classifier"}.get(task):
      default = _defaults_in(file, name).get(option, default)
  return default


@functools.cache
def _defaults_in(file: str, name: str) -> dict[str, str]:
  source = (plugins.PACKAGE / file).read_text(encoding="utf-8")
  found = parameters_in_source(source, name) or ()
  return {each.name: each.default for each in found if each.default is not None}
