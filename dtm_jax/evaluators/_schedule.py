"""Make the evaluators of a config, decide when each is due, and run them."""

import time
from collections.abc import Callable, Collection, Iterator
from typing import Any, Protocol

from absl import logging

from dtm_jax import plugins
from dtm_jax.arrays import PyTree
from dtm_jax.evaluators._context import Context, Section
from dtm_jax.options.socket_options import SCHEDULE


class Evaluator(Protocol):
  """What every module of this folder defines as its class `Evaluator`."""

  def run(self, state: PyTree) -> Iterator[tuple[str, float]]:
    """Yield (name, value) of each number about the state."""
    ...


class Evaluators:
  """The evaluators of `config.evals` by name, and when each of them is due.

  Attributes:
    every: the steps between two runs of each evaluator; 0 for none in between.

  Args:
    sections: `config.evals`. The option "name" of a section, or else its key, is a module of this folder.
    context: what the run gives to each evaluator.
    steps: (name, section, default) -> a duration of the section in steps.
    total_steps: the step after which all evaluators run once more.

  Raises:
    OptionError: a section does not fit the data, the task or the devices.
  """

  def __init__(self, sections: Section, context: Context, steps: Callable[..., int], total_steps: int):
    self._evaluators: dict[str, Evaluator] = {
      name: make(name, section, context) for name, section in sections.items()
    }
    self.every = {name: steps("every", section, default=0) for name, section in sections.items()}
    self._at_start = {name for name, section in sections.items() if section.get("at_start", False)}
    self._total_steps = total_steps

  def due(self, step: int) -> list[str]:
    """Return the names of the evaluators that run after `step`.

    These are all evaluators after the last step and those with `at_start` at step 0. After other steps they
    are the evaluators with an interval that divides the step.
    """
    if step >= self._total_steps:
      return list(self._evaluators)
    if step == 0:
      return [name for name in self._evaluators if name in self._at_start]
    return [name for name, every in self.every.items() if every and step % every == 0]

  def due_at_start(
    self, step: int, evaluated: Callable[[int], Collection[str]], changed: Callable[[str], bool]
  ) -> list[str]:
    """Return the names of the evaluators that run before a start trains on from `step`.

    A fresh run and a run without training steps run all that are due. A resumed run repeats only those
    that have no numbers at `step`, for example because it was killed. A finished run also repeats those
    with other options.

    Args:
      step: the step of the restored state, or 0.
      evaluated: step -> the names of the evaluators that have numbers of that step.
      changed: name -> whether the numbers that the evaluator has are of other options.
    """
    due, finished = self.due(step), step >= self._total_steps
    if step == 0 or self._total_steps == 0:
      return due
    done = evaluated(step)
    return [name for name in due if name not in done or (finished and changed(name))]

  def run(self, name: str, state: PyTree) -> dict[str, float]:
    """Return the numbers of one evaluator, named "<name>/<number>".

    Raises:
      Exception: any error of the evaluator, with a note that names the evaluator and the step.
    """
    start = time.perf_counter()
    try:
      results = dict(self._evaluators[name].run(state))
    except Exception as error:
      error.add_note(f"while evaluator {name!r} ran at step {int(state['step'])}")
      raise
    logging.info("Evaluator %s took %.1f s.", name, time.perf_counter() - start)
    return {f"{name}/{key}": value for key, value in results.items()}


def make(name: str, section: Section, context: Context) -> Any:
  """Return the evaluator of one section of `config.evals`, without its schedule.

  Args:
    name: key of the section. It names the evaluator's module unless the section has its own "name".
    section: the options of the evaluator and of its schedule.
    context: what the run gives to each evaluator.

  Raises:
    OptionError: there is no such evaluator, or an option does not fit the data, the task or the devices.
  """
  options = {key: value for key, value in section.items() if key not in ("name", *SCHEDULE)}
  return plugins.load("evaluators", section.get("name", name)).Evaluator(context, **options)
