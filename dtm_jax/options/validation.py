"""Check a config before anything is loaded: each option alone first, then how the options fit together.

`check(config)` needs neither JAX nor TensorFlow. `check_devices` gets the devices of the run as numbers.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ml_collections import ConfigDict

from dtm_jax import plugins
from dtm_jax.errors import OptionError
from dtm_jax.options import cross_checks
from dtm_jax.options.known_options import no_such_option, rule_of
from dtm_jax.options.problems import Problem, refuse
from dtm_jax.options.sections import NOUNS, Section, dotted_keys, get, section_of, sections
from dtm_jax.options.task_options import REQUIRED
from dtm_jax.storage import paths

_OF_EVERY_TASK = ("seed", "batch_size", "data", "mesh", "checkpoint", "log", "evals")
_HINTS = {
  "checkpoint/path": "the workdir of a run",
  "folder/data_dir": "the folder of the images",
  "segmentation_folder/data_dir": "the folder of images/ and annotations/",
}
"""What an option that a choice requires must name."""


def check(config: ConfigDict, problems: Sequence[Problem] = ()) -> None:
  """Check every option of a config, and how the options fit together.

  Args:
    config: with all typed options.
    problems: those that are already known, for the same message.

  Raises:
    OptionError: the message lists all problems, each with key, value and what is allowed.
  """
  found = list(problems)
  if not found or get(config, "task") is not None:
    found += _structure(config)
  if not any(problem.key == "task" for problem in found):
    found += _values(config)
    wrong = {problem.key for problem in found}
    found += [problem for problem in cross_checks.problems(config, wrong) if problem.key not in wrong]
  refuse(found)


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
  """Check that the devices and processes of the run divide the mesh and the global batches evenly.

  Raises:
    OptionError: the message lists all problems.
  """
  problems = [*_mesh_problems(config, device_count), *_batch_problems(config, device_count, process_count)]
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
  """Check the task, the sections that it reads, and the names of the chosen modules."""
  task = get(config, "task")
  if task not in plugins.available("tasks"):
    yield Problem("task", task, f"must be one of {', '.join(plugins.available('tasks'))}")
    return
  for name in (*_OF_EVERY_TASK, *REQUIRED.get(task, ())):
    if name not in config:
      yield Problem(name, None, f"the config lacks it, and the task {task!r} reads it")
  for section in sections(config):
    try:
      plugins.require_name(section.socket, section.module)
    except OptionError as error:
      yield Problem(f"{section.path}.name", section.name, str(error).removesuffix("."))
      continue
    variant = str(section.name).partition("/")[2]
    if variant and "variant" not in section.accepted_options():
      text = f"{section.module!r} has no variants; write {section.module!r} alone"
      yield Problem(f"{section.path}.name", section.name, text)
    yield from _missing(section, variant)


def _missing(section: Section, variant: str) -> Iterator[Problem]:
  """Name the options that the chosen module requires and the section does not give."""
  choice = f"{NOUNS[section.socket]} {section.name!r}"
  for option in section.accepted_options().values():
    if not option.required or section.options.get(option.name) is not None:
      continue
    if section.socket == "evaluators" and option.name == "image_size" and option.name in section.options:
      continue  # None means the size of the data set's images, which is not known yet
    if option.name != "variant":
      hint = _HINTS.get(f"{section.name}/{option.name}")
      text = f"{choice} needs {option.name}" + (f", {hint}" if hint else "")
      yield Problem(f"{section.path}.{option.name}", "", text)
    elif not variant:
      yield Problem(f"{section.path}.name", section.name, f"{choice} needs a variant: {section.name}/NAME")


def _values(config: ConfigDict) -> Iterator[Problem]:
  """Check every option against its rule."""
  for key in dotted_keys(config):
    rule, value = rule_of(config, key), get(config, key)
    if rule is not None:
      text = rule.problem(value)
      if text and not (value is None and _has_default(config, key)):
        yield Problem(key, value, text)
    elif value is not None:
      yield Problem(key, value, no_such_option(config, key))


def _has_default(config: ConfigDict, key: str) -> bool:
  """Return whether None leaves the option at the default of the chosen module."""
  section = section_of(config, key)
  return section is not None and section.socket != "evaluators"


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


def _batch_problems(config: ConfigDict, device_count: int, process_count: int) -> Iterator[Problem]:
  batches = {"batch_size": config.batch_size} if get(config, "total_steps") != 0 else {}
  for section in sections(config):
    if section.socket == "evaluators" and section.options.get("batch_size") is not None:
      batches[f"{section.path}.batch_size"] = section.options.batch_size
  for key, size in batches.items():
    for count, what in ((process_count, "processes"), (device_count, "devices")):
      if size % count:
        lower, upper = max(size // count * count, count), -(-size // count) * count
        yield Problem(key, size, f"the {count} {what} must share it evenly; {lower} or {upper} would do")
        break
