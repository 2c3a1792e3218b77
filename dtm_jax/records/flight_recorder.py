"""What led to a loss that is not finite: kept on the device while a run goes on, written when it stops.

The recorder keeps a copy of the last good state, which costs the memory of one state. Of each step since then
it keeps the measurements and the indices of the batch. The train step stays as it is, so numbers and
compilations do not change.

A recording is the folder WORKDIR/flight/<first bad step>:

    state/<step>    the last good state, in the form of a checkpoint
    window.json     the steps since then, the random key, and the command that replays them
"""

import dataclasses
import json
import math
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from etils import epath
from jax.experimental import multihost_utils

from dtm_jax.arrays import Array, Batch, PyTree
from dtm_jax.checkpoints.manager import Checkpoints
from dtm_jax.errors import NotThereError, UserError
from dtm_jax.training import finiteness

DECISIVE = ("loss", "grad_norm")  # the measurements that must be finite
WINDOW = "window.json"


class NonFiniteError(UserError, FloatingPointError):
  """The loss, the gradient or the state of a run is not finite."""


@dataclasses.dataclass(frozen=True)
class Recording:
  """What `read` returns of a recording.

  Attributes:
    folder: the recording's own folder.
    start: the step of the last good state.
    steps: for each step since then "step", "measurements" and "index", the examples of its batch.
    seed: of the run.
    config: of the run, as its JSON text gives it.
    devices: of the run: their number and kind.
  """

  folder: epath.Path
  start: int
  steps: Sequence[Mapping[str, Any]]
  seed: int
  config: Mapping[str, Any]
  devices: Sequence[Any]


class FlightRecorder:
  """Checks what every window of steps leaves, and writes a recording if it is not finite.

  Args:
    workdir: of the run.
    config: the run's config; `config.log.flight_recorder` False keeps and writes nothing, and only checks.
    may_diverge: pattern of the arrays of the state that need not be finite; see `Task.may_diverge`.
  """

  def __init__(self, workdir: epath.Path, config: Any, *, may_diverge: str | None = None):
    self._folder, self._config, self._may_diverge = workdir / "flight", config, may_diverge
    self._copy, self._good, self._meta, self._steps = None, None, {}, []

  def keep(self, state: PyTree, meta: Mapping[str, Any]) -> None:
    """Takes a copy of a good state, from which the next steps can be run again; `meta` is a checkpoint's."""
    self._steps, self._meta = [], meta
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

  def add(self, step: int, batch: Batch, measurements: Mapping[str, Array]) -> None:
    """Notes a step; waits for nothing."""
    self._steps.append((step, batch.get("index"), measurements))

  def close_window(self, state: PyTree, meta: Mapping[str, Any]) -> None:
    """Checks the steps since the last call and the state after them, and keeps that state.

    All processes must call it at the same step.

    Raises:
      NonFiniteError: a measurement in DECISIVE or the state is not finite. The message names the first bad
        step, the recording's folder and the command that replays it.
    """
    steps = [(step, index, jax.device_get(measured)) for step, index, measured in self._steps]
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

  def _stop(self, step: int, problem: str, steps: Sequence[tuple]) -> None:
    problem += " It was not saved: earlier checkpoints are sound."
    if self._good is None:
      raise NonFiniteError(f"{problem} With --config.log.flight_recorder=True these steps can be replayed.")
    folder = self._write(step, problem, steps)
    raise NonFiniteError(
      f"{problem}\nThe last good state and what followed it are in {folder}. This command runs these "
      f"steps again and names the module whose output is not finite:\n  {replay_command(folder)}"
    )

  def _write(self, step: int, problem: str, steps: Sequence[tuple]) -> epath.Path:
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
          "index": None if index is None else on_host(index).tolist(),
        }
        for step, index, measured in steps
      ],
      "replay": replay_command(folder),
      "config": config,
    }
    checkpoints = Checkpoints(str(folder / "state"), keep=1)
    checkpoints.save(start, self._good, {"seed": config["seed"]} | self._meta)
    checkpoints.close()
    if jax.process_index() == 0:
      (folder / WINDOW).write_text(json.dumps(content, indent=1) + "\n")
    return folder

  def _new_folder(self, step: int) -> epath.Path:
    """Named by the step; earlier recordings of the same step stay. The first process chooses for all."""
    taken = 0
    while (self._folder / _name(step, taken)).exists():
      taken += 1
    if jax.process_count() > 1:
      taken = int(multihost_utils.broadcast_one_to_all(np.int32(taken)))
    return self._folder / _name(step, taken)


def read(folder: epath.Path) -> Recording:
  """The recording in `folder`, without its state.

  Raises:
    NotThereError: there is no recording.
  """
  if not (folder / WINDOW).exists():
    found = [*folder.glob(f"*/{WINDOW}"), *folder.glob(f"flight/*/{WINDOW}")] if folder.is_dir() else []
    near = sorted(str(path.parent) for path in found)
    raise NotThereError(
      f"--config.replay={folder}: there is no recording, which has a file {WINDOW}. "
      + (
        f"There is one in: {', '.join(near)}."
        if near
        else "A run whose loss is not finite makes one in WORKDIR/flight."
      )
    )
  content = json.loads((folder / WINDOW).read_text())
  names = [field.name for field in dataclasses.fields(Recording) if field.name != "folder"]
  return Recording(folder, **{name: content[name] for name in names})


def log_changes(recording: Recording, config: Any) -> None:
  """Warns of options that differ from the recorded run's, because the steps may then be others."""
  now = json.loads(config.to_json_best_effort())
  different = [
    f"{name}={then!r} then, {_get(now, name)!r} now"
    for name, then in _flat(recording.config)
    if name != "replay" and not name.startswith(("log.", "evals.", "checkpoint.")) and _get(now, name) != then
  ]
  if different:
    logging.warning("The config is not that of the recording: %s.", "; ".join(different))


def _flat(section: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
  for name, value in section.items():
    if isinstance(value, Mapping):
      yield from _flat(value, f"{prefix}{name}.")
    else:
      yield prefix + name, value


def _get(section: Any, name: str) -> Any:
  for part in name.split("."):
    section = section.get(part) if isinstance(section, Mapping) else None
  return section


def replay_command(folder: epath.Path) -> str:
  """The command of this process with `--config.replay=folder`."""
  own = (
    sys.argv[1:] if any(arg.lstrip("-").startswith("config") for arg in sys.argv[1:]) else ["--config=CONFIG"]
  )
  return shlex.join(["python", "-m", "dtm_jax.main", *own, f"--config.replay={folder}"])


def _name(step: int, taken: int) -> str:
  return f"{step}-{taken + 1}" if taken else str(step)


def _number(value: Any) -> float | str:
  """A number for JSON, which has none for NaN and infinities: they become text."""
  value = float(value)
  return value if math.isfinite(value) else str(value)


def on_host(array: Array) -> np.ndarray:
  """The whole array, of which each process may have a part."""
  return np.asarray(
    array if array.is_fully_addressable else multihost_utils.process_allgather(array, tiled=True)
  )
