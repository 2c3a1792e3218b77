"""Run the steps of a flight recording again, and find what is not finite first.

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


def replay(
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
      step, batch = recorded["step"], next(batches)
      _require_same_examples(recorded, batch)
      watch.clear()
      state, measured = train_step(state, batch)
      values = {name: float(measured[name]) for name in DECISIVE if name in measured}
      logging.info("Step %d: %s", step, _beside(values, recorded["measurements"]))
      before, broken = broken, nonfinite(state, but=may_diverge)
      gradients = [g for g in watch.gradients() if not re.fullmatch(may_diverge or "", f"params/{g.name}")]
      bad = [name for name, value in values.items() if not np.isfinite(value)]
      if bad or gradients or broken:
        finding = _describe(step, watch.first_module(), values, bad, gradients, before, broken)
        logging.error("%s", finding.text)
        return finding
  logging.warning(
    "All %d steps are finite here. The recorded steps ran on %s.",
    len(steps),
    " ".join(map(str, recording.devices)),
  )
  return None


def _describe(
  step: int,
  module: Place | None,
  values: Mapping[str, float],
  bad: list[str],
  gradients: list[Place],
  before: list[Place],
  broken: list[Place],
) -> Finding:
  """Return what comes first in the order of a step: forward pass, loss, backward pass, update."""
  if module:
    owned = [place for place in before if _belongs(place, module)]
    reason = (
      "its input was not finite already" if not module.input_finite
      else f"its parameters were not finite: {_list(owned)}" if owned
      else "its input and parameters were finite"
    )  # fmt: skip
    return Finding(
      step,
      "module",
      module,
      f"Step {step}: the first output that is not finite is that of module {module}; {reason}.",
    )
  if "loss" in bad:
    text = f"Step {step}: the outputs of all modules are finite, but the loss is {values['loss']}."
    return Finding(step, "measurement", Place("loss"), text)
  if gradients:
    text = (
      f"Step {step}: the loss is finite. The first gradient that is not finite, in the order of the backward "
      f"pass, is that of {gradients[0]}; {len(gradients)} gradients in total are not finite."
    )
    return Finding(step, "gradient", gradients[0], text)
  if bad:  # each gradient is finite, but the sum of their squares overflows
    text = f"Step {step}: every gradient is finite, but {bad[0]} is {values[bad[0]]}."
    return Finding(step, "measurement", Place(bad[0]), text)
  text = (
    f"Step {step}: loss and gradients are finite. These are not finite after the update: {_list(broken)}."
  )
  return Finding(step, "state", broken[0], text)


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
