"""Keep what leads to a loss that is not finite, and write it when the run stops.

The recorder keeps a copy of the last good state on the devices, which costs the memory of one state. Of each
step since then it keeps the measurements and the indices of the batch. The train step is unchanged, so
numbers and compilations stay the same.

A recording is the folder WORKDIR/flight/<first bad step>:

    state/<step>    the last good state, in the form of a checkpoint
    window.json     the steps since then, the seed, the config, and the command that replays them
"""

import functools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from etils import epath
from jax.experimental import multihost_utils

from dtm_jax import processes
from dtm_jax.arrays import Array, Batch, PyTree
from dtm_jax.checkpoints.manager import Checkpoints
from dtm_jax.errors import UserError
from dtm_jax.records.recording import WINDOW, replay_command
from dtm_jax.training import finiteness

DECISIVE = ("loss", "grad_norm")
"""The measurements that must be finite."""

_Call = tuple[Sequence[int], Any, Mapping[str, Any]]
"""The steps of a call, the indices of their batches, and their measurements. With several steps, the arrays
have an axis of steps."""

_Step = tuple[int, Callable[[], list[int]] | None, Mapping[str, Any]]
"""A step, a function that returns the indices of its batch, and its measurements on the host."""


class NonFiniteError(UserError, FloatingPointError):
  """The loss, the gradient or the state of a run is not finite."""


class FlightRecorder:
  """Checks each window of steps and the state after it, and writes a recording if they are not finite.

  Args:
    workdir: of the run.
    config: of the run. With `config.log.flight_recorder` False, the recorder only checks.
    may_diverge: pattern of the arrays of the state that need not be finite; see `Task.may_diverge`.
  """

  def __init__(self, workdir: epath.Path, config: Any, *, may_diverge: str | None = None):
    self._folder, self._config, self._may_diverge = workdir / "flight", config, may_diverge
    self._copy: Any = None
    self._good: PyTree = None
    self._meta: Mapping[str, Any] = {}
    self._calls: list[_Call] = []

  def keep(self, state: PyTree, meta: Mapping[str, Any]) -> None:
    """Copy a good state, so that the next steps can be run again.

    Args:
      state: the arrays; the caller may donate them afterwards.
      meta: the metadata of a checkpoint at this step.
    """
    self._calls, self._meta = [], meta
    if not self._config.log.get("flight_recorder", True):
      return
    if self._copy is None:
      logging.info(
        "The flight recorder keeps a copy of the state, %.2f GiB over all devices. "
        "--config.log.flight_recorder=False keeps none.",
        sum(x.nbytes for x in jax.tree.leaves(state)) / 2**30,
      )
      shardings = jax.tree.map(lambda x: x.sharding, state)
      self._copy = jax.jit(lambda state: jax.tree.map(jnp.copy, state), out_shardings=shardings)
    self._good = None  # its memory is free before the next copy is made
    self._good = self._copy(state)

  def add(self, steps: Sequence[int], rows: Batch, measurements: Mapping[str, Array]) -> None:
    """Note the steps of a call. This waits for nothing.

    Args:
      steps: their numbers.
      rows, measurements: of the one step, or with a leading axis of steps.
    """
    self._calls.append((steps, rows.get("index"), measurements))

  def close_window(self, state: PyTree, meta: Mapping[str, Any]) -> None:
    """Check the steps since the last call and the state after them, and keep that state.

    All processes must call this at the same step.

    Raises:
      NonFiniteError: a measurement in DECISIVE or the state is not finite. The message names the first bad
        step, the recording's folder and the command that replays it.
    """
    steps = [step for call in self._calls for step in _single_steps(*call)]
    bad = [
      (step, name, float(measured[name]))
      for step, _, measured in steps
      for name in DECISIVE
      if name in measured and not np.isfinite(measured[name])
    ]
    if bad:
      step, name, value = bad[0]
      problem = f"The {name} became {value} at step {step}, within steps [{steps[0][0]}, {steps[-1][0]}]."
      self._stop(step, problem, steps)
    if arrays := finiteness.nonfinite(state, but=self._may_diverge):
      first, last = (steps[0][0], steps[-1][0]) if steps else (int(state["step"]),) * 2
      named = "; ".join(map(str, arrays[:3])) + (f"; and {len(arrays) - 3} more" if arrays[3:] else "")
      problem = (
        f"After step {last} the state is not finite, which began within steps [{first}, {last}]: {named}."
      )
      self._stop(last, problem, steps)
    self.keep(state, meta)

  def _stop(self, step: int, problem: str, steps: Sequence[_Step]) -> NoReturn:
    problem += " It was not saved: earlier checkpoints are sound."
    if self._good is None:
      raise NonFiniteError(f"{problem} With --config.log.flight_recorder=True these steps can be replayed.")
    folder = self._write(step, problem, steps)
    raise NonFiniteError(
      f"{problem}\nThe last good state and the steps after it are in {folder}. This command runs these "
      "steps again and names the module with the first output that is not finite:\n"
      f"  {replay_command(folder)}"
    )

  def _write(self, step: int, problem: str, steps: Sequence[_Step]) -> epath.Path:
    """Write the recording and return its folder."""
    folder = self._new_folder(step)
    start = int(self._good["step"])
    config = json.loads(self._config.to_json_best_effort())
    content = {
      "problem": problem,
      "start": start,
      "seed": config["seed"],
      "processes": jax.process_count(),
      "devices": [jax.device_count(), jax.devices()[0].device_kind],
      "steps": [
        {
          "step": step,
          "measurements": {name: _number(value) for name, value in measured.items()},
          "index": None if index is None else index(),
        }
        for step, index, measured in steps
      ],
      "replay": replay_command(folder),
      "config": config,
    }
    checkpoints = Checkpoints(str(folder / "state"), keep=1)
    checkpoints.save(start, self._good, {"seed": config["seed"]} | dict(self._meta))
    checkpoints.close()
    if processes.is_first():
      (folder / WINDOW).write_text(json.dumps(content, indent=1) + "\n")
    return folder

  def _new_folder(self, step: int) -> epath.Path:
    """Return a new folder with the step as its name. Process 0 chooses for all; earlier recordings stay."""
    taken = 0
    while (self._folder / _name(step, taken)).exists():
      taken += 1
    if jax.process_count() > 1:
      taken = int(multihost_utils.broadcast_one_to_all(np.int32(taken)))
    return self._folder / _name(step, taken)


def on_host(array: Array) -> np.ndarray:
  """Return the whole array, of which each process may hold a part."""
  return np.asarray(
    array if array.is_fully_addressable else multihost_utils.process_allgather(array, tiled=True)
  )


def _single_steps(steps: Sequence[int], index: Any, measurements: Mapping[str, Array]) -> Iterator[_Step]:
  measured = {name: np.atleast_1d(value) for name, value in jax.device_get(measurements).items()}
  for i, step in enumerate(steps):
    get = None if index is None else functools.partial(_indices, index, i if len(steps) > 1 else ...)
    yield step, get, {name: value[i] for name, value in measured.items()}


def _indices(index: Array, place: Any) -> list[int]:
  return on_host(index)[place].tolist()


def _name(step: int, taken: int) -> str:
  return f"{step}-{taken + 1}" if taken else str(step)


def _number(value: Any) -> float | str:
  """Return a number for JSON, which has no NaN and no infinities: these become text."""
  value = float(value)
  return value if math.isfinite(value) else str(value)
