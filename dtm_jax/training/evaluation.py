"""When each evaluator of the config is due, and its numbers."""

import time
from collections.abc import Callable, Mapping
from typing import Any

from absl import logging

from dtm_jax.arrays import PyTree


class Evaluators:
  """The evaluators of `config.evals` by name.

  Args:
    evaluators: made from the sections, each with `run(state)`.
    sections: `config.evals`.
    steps: (name, section, default) -> steps of a duration.
  """

  def __init__(self, evaluators: Mapping[str, Any], sections: Any, steps: Callable[..., int]):
    self._evaluators = evaluators
    self._every = {name: steps("every", section, default=0) for name, section in sections.items()}
    self._at_start = {name for name, section in sections.items() if section.get("at_start", False)}

  def due(self, step: int, *, last: bool) -> list[str]:
    """The names of those that run after `step`: all after the last step, at step 0 those with `at_start`."""
    if last:
      return list(self._evaluators)
    if step == 0:
      return [name for name in self._evaluators if name in self._at_start]
    return [name for name, every in self._every.items() if every and step % every == 0]

  def run(self, name: str, state: PyTree) -> dict[str, float]:
    """The numbers of one evaluator, named "<name>/<number>"."""
    start = time.perf_counter()
    try:
      results = dict(self._evaluators[name].run(state))
    except Exception as error:
      error.add_note(f"while evaluator {name!r} ran at step {int(state['step'])}")
      raise
    logging.info("Evaluator %s took %.1f s.", name, time.perf_counter() - start)
    return {f"{name}/{key}": value for key, value in results.items()}
