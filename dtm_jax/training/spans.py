"""Divide the steps of a run into calls of several steps, which end wherever the host has work to do."""

import dataclasses
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from dtm_jax.errors import OptionError
from dtm_jax.training.course import Course
from dtm_jax.training.schedules import as_typed


@dataclasses.dataclass(frozen=True)
class Stops:
  """The steps after which the host has work to do.

  Attributes:
    total: the last step.
    periods: steps between reports, checkpoints and evaluations, by option as typed ("log.log_steps=50").
      The host has work at their multiples.
    others: further steps.
  """

  total: int
  periods: Mapping[str, int]
  others: Collection[int] = ()

  def after(self, step: int) -> int:
    """Return the first stop after `step`."""
    multiples = (step - step % period + period for period in self.periods.values())
    return min([self.total, *multiples, *(other for other in self.others if other > step)])

  def require_room(self, steps_per_call: int) -> None:
    """Refuse calls that would never fit between two stops.

    Raises:
      OptionError: `steps_per_call` is larger than a period.
    """
    for option, period in self.periods.items():
      if steps_per_call > period:
        raise OptionError(
          f"--config.train.steps_per_call={steps_per_call} must be at most {period}, the number of steps of "
          f"--config.{option}, because a call ends there."
        )


def steps_per_call(config: Any) -> int:
  """Return `train.steps_per_call`, which older configs lack."""
  return config.get("train", {}).get("steps_per_call", 1)


def plan_stops(config: Any, course: Course, every: Mapping[str, int], *, also: Collection[int] = ()) -> Stops:
  """Return the stops of a run, after a check that its calls fit between them.

  Args:
    every: steps between two runs of each evaluator of `config.evals`; 0 for none in between.
    also: further steps.

  Raises:
    OptionError: `train.steps_per_call` is larger than the distance of two reports, saves or evaluations.
  """
  periods = {
    f"{section}.{as_typed(name, config[section])}": course.steps(name, config[section])
    for section, name in (("log", "log"), ("checkpoint", "save"))
  }
  for name, steps in every.items():
    if steps:
      periods[f"evals.{name}.{as_typed('every', config.evals[name])}"] = steps
  stops = Stops(course.total_steps(config), periods, also)
  stops.require_room(steps_per_call(config))
  return stops


def spans(start: int, stops: Stops, size: int) -> Iterator[range]:
  """Yield the steps of each call of a run that goes on after the step `start`.

  Between two stops, calls of `size` steps come first. The steps that are left come one by one. So
  only two programs are compiled, and a run that is resumed at a stop, or at the end of a call, makes the
  calls that the uninterrupted run makes.
  """
  step = start
  while step < stops.total:
    number = size if step + size <= stops.after(step) else 1
    yield range(step + 1, step + number + 1)
    step += number
