"""Run the steps of a flight recording again, and find the first value that is not finite.

The steps start from the recorded state and see the same batches, which are functions of (seed, step).
Nothing is written.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from absl import logging

from dtm_jax.arrays import Batch, PyTree
from dtm_jax.errors import UserError
from dtm_jax.records.flight_recorder import DECISIVE, on_host
from dtm_jax.records.recording import Recording
from dtm_jax.training.finiteness import Place, Watch, nonfinite


@dataclass(frozen=True)
class Finding:
  """The first thing that is not finite.

  Attributes:
    step: the first bad step.
    kind: "module" (its output), "measurement", "gradient" (of a parameter) or "state" (after the update).
    place: the module, parameter or array; for a measurement, its name.
    text: the finding in full sentences.
  """

  step: int
  kind: str
  place: Place
  text: str


def replay_steps(
  recording: Recording,
  train_step: Callable[[PyTree, Batch], tuple[PyTree, Mapping[str, Any]]],
  state: PyTree,
  batches: Iterator[Batch],
  *,
  may_diverge: str | None = None,
) -> Finding | None:
  """Return the first thing that is not finite, or None if all steps are finite here.

  Args:
    recording: the steps to run.
    train_step: (state, batch) -> (state, measurements). It must be jitted and not called before, because the
      watch works while it is traced.
    state: the recorded state.
    batches: the batches from the step after that state on.
    may_diverge: pattern of the arrays that need not be finite; see `Task.may_diverge`.

  Raises:
    UserError: a batch holds other examples than the recorded one.
  """
  steps = recording.steps
  logging.info("Replaying steps %d to %d of %s.", steps[0]["step"], steps[-1]["step"], recording.folder)
  broken = nonfinite(state, but=may_diverge)
  with Watch() as watch:
    for recorded in steps:
      batch = next(batches)
      _require_same_examples(recorded, batch)
      watch.clear()
      state, measured = train_step(state, batch)
      values = {name: float(measured[name]) for name in DECISIVE if name in measured}
      logging.info("Step %d: %s", recorded["step"], _beside(values, recorded["measurements"]))
      before, broken = broken, nonfinite(state, but=may_diverge)
      gradients = [g for g in watch.gradients() if not re.fullmatch(may_diverge or "", f"params/{g.name}")]
      seen = _Seen(recorded["step"], values, watch.first_module(), gradients, before, broken)
      if seen.bad_values or gradients or broken:
        finding = _describe(seen)
        logging.error("%s", finding.text)
        return finding
  devices = " ".join(map(str, recording.devices))
  logging.warning("All %d steps are finite here. The recorded steps ran on %s.", len(steps), devices)
  return None


@dataclass(frozen=True)
class _Seen:
  """What one replayed step showed.

  Attributes:
    step: the step.
    values: the decisive measurements.
    module: the first module with an output that is not finite.
    gradients: those that are not finite, in the order of the backward pass.
    before, after: arrays of the state that are not finite before and after the step.
  """

  step: int
  values: Mapping[str, float]
  module: Place | None
  gradients: list[Place]
  before: list[Place]
  after: list[Place]

  @property
  def bad_values(self) -> list[str]:
    """The names of the measurements that are not finite."""
    return [name for name, value in self.values.items() if not np.isfinite(value)]


def _describe(seen: _Seen) -> Finding:
  """Return what comes first in the order of a step: forward pass, loss, backward pass, update."""
  start, bad = f"Step {seen.step}: ", seen.bad_values
  if seen.module:
    text = (
      f"the first output that is not finite is that of module {seen.module}; {_reason(seen, seen.module)}."
    )
    return Finding(seen.step, "module", seen.module, start + text)
  if "loss" in bad:
    text = f"the outputs of all modules are finite, but the loss is {seen.values['loss']}."
    return Finding(seen.step, "measurement", Place("loss"), start + text)
  if seen.gradients:
    text = (
      "the loss is finite. The first gradient that is not finite, in the order of the backward pass, is that "
      f"of {seen.gradients[0]}; {len(seen.gradients)} gradients in total are not finite."
    )
    return Finding(seen.step, "gradient", seen.gradients[0], start + text)
  if bad:  # each gradient is finite, but the sum of their squares overflows
    text = f"every gradient is finite, but {bad[0]} is {seen.values[bad[0]]}."
    return Finding(seen.step, "measurement", Place(bad[0]), start + text)
  text = f"loss and gradients are finite. These are not finite after the update: {_list(seen.after)}."
  return Finding(seen.step, "state", seen.after[0], start + text)


def _reason(seen: _Seen, module: Place) -> str:
  """Return whether input and parameters of the module were finite, in words."""
  if not module.input_finite:
    return "its input was not finite already"
  own = [place for place in seen.before if _belongs(place, module)]
  return f"its parameters were not finite: {_list(own)}" if own else "its input and parameters were finite"


def _belongs(place: Place, module: Place) -> bool:
  """Return whether the array of the state is a parameter of the module, in its layer."""
  path = module.name.partition("/")[2]
  return place.name.startswith(f"params/{path}/") and place.layer == module.layer


def _list(places: list[Place], most: int = 5) -> str:
  return "; ".join(map(str, places[:most])) + (
    f"; and {len(places) - most} more" if len(places) > most else ""
  )


def _beside(values: Mapping[str, float], recorded: Mapping[str, Any]) -> str:
  """Return the measurements in words, and the recorded ones if they differ."""
  parts = []
  for name, value in values.items():
    before = float(recorded.get(name, "nan"))
    same = np.isclose(value, before, rtol=1e-4, equal_nan=True)
    parts.append(f"{name} {value:.6g}" + ("" if same else f" (recorded: {before:.6g})"))
  return ", ".join(parts)


def _require_same_examples(recorded: Mapping[str, Any], batch: Batch) -> None:
  index = recorded["index"]
  if index is not None and "index" in batch and not np.array_equal(on_host(batch["index"]), index):
    raise UserError(
      f"The batch of step {recorded['step']} holds other examples than the recorded one: the data set, its "
      "split or --config.batch_size has changed since. The replay needs the same."
    )
