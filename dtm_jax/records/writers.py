"""Send the numbers of a run to Weights & Biases and MLflow, beside TensorBoard and metrics.jsonl.

    python -m dtm_jax.main --config=configs/quickstart.py --config.log.writers=wandb,mlflow

Each service is one file, `<name>_writer.py`, behind the extra of its name. It has one function:

    open_writer(workdir, config) -> ScalarWriter

Process 0 alone opens and writes. A service that cannot be opened ends a fresh run before its first step.
Later failures are one warning each, and the run goes on: metrics.jsonl has all numbers.
"""

import importlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from absl import logging
from etils import epath

from dtm_jax import processes
from dtm_jax.errors import OptionError, UserError
from dtm_jax.records.reporting import ScalarWriter
from dtm_jax.storage import writing


def open_writers(
  names: Sequence[str], workdir: epath.Path, config: Mapping[str, Any], *, resumed: bool
) -> list[ScalarWriter]:
  """Return the writers of these services on process 0, and none elsewhere. Every process must call this.

  Args:
    names: the value of the option.
    workdir: keeps the id that each service gave to the run, in <name>.json.
    config: the resolved config as JSON holds it. The services store it.
    resumed: whether the run goes on. A failure is then a warning, because services are down at times.

  Raises:
    OptionError: a service of a fresh run cannot be opened.
  """
  opened: list[ScalarWriter] = []

  def open_all() -> None:
    for name in names:
      try:
        opened.append(Guarded(name, _open_writer(name)(workdir, config)))
      except Exception as error:
        _refuse_or_warn(name, error, resumed)

  if names:
    processes.from_first_process(open_all)
  return opened


def _open_writer(name: str) -> Callable[[epath.Path, Mapping[str, Any]], ScalarWriter]:
  return importlib.import_module(f"dtm_jax.records.{name}_writer").open_writer


def _refuse_or_warn(name: str, error: Exception, resumed: bool) -> None:
  message = f"--config.log.writers={name}: it cannot be opened: {type(error).__name__}: {error}"
  if not resumed:
    raise OptionError(message) from error
  logging.warning("%s The run goes on without it.", message)


class Guarded:
  """A writer that never raises. After its first failure it warns once and stays silent."""

  def __init__(self, name: str, writer: ScalarWriter):
    self._name, self._writer, self._works = name, writer, True

  def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
    finite = {name: value for name, value in scalars.items() if math.isfinite(value)}
    self._try(lambda: self._writer.write_scalars(step, finite))

  def flush(self) -> None:
    self._try(self._writer.flush)

  def close(self) -> None:
    self._try(self._writer.close)

  def _try(self, function: Callable[[], None]) -> None:
    if not self._works:
      return
    try:
      function()
    except Exception as error:
      self._works = False
      logging.warning(
        "%s failed and gets no more numbers of this start; metrics.jsonl has all of them. %s: %s",
        self._name, type(error).__name__, error,
      )  # fmt: skip


def read_identity(workdir: epath.Path, name: str) -> dict[str, Any]:
  """Return what `write_identity` wrote, or {} if there is nothing.

  Raises:
    UserError: the file is damaged. Another run in the service would split the curves.
  """
  path = workdir / f"{name}.json"
  if not path.exists():
    return {}
  try:
    return dict(json.loads(path.read_text()))
  except ValueError as error:
    raise UserError(f"{path} is not JSON. Remove it to begin a new run in {name}. ({error})") from error


def write_identity(workdir: epath.Path, name: str, identity: Mapping[str, Any]) -> None:
  """Keep the id of the run in a service, so that a resumed run continues it."""
  writing.write_whole(workdir / f"{name}.json", json.dumps(identity, indent=2) + "\n")
