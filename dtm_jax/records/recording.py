"""Read a flight recording, and compare its config with the present one.

`flight_recorder` writes recordings and describes their files.
"""

import dataclasses
import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from absl import logging
from etils import epath

from dtm_jax.errors import NotThereError
from dtm_jax.records import changes

WINDOW = "window.json"


@dataclasses.dataclass(frozen=True)
class Recording:
  """The steps that led to numbers that are not finite.

  Attributes:
    folder: of the recording.
    start: the step of the last good state.
    steps: for each step since then "step", "measurements", and "index", the examples of its batch.
    seed: of the run.
    config: of the run, as JSON holds it.
    devices: number and kind of the run's devices.
  """

  folder: epath.Path
  start: int
  steps: Sequence[Mapping[str, Any]]
  seed: int
  config: Mapping[str, Any]
  devices: Sequence[Any]


def read_recording(folder: epath.Path) -> Recording:
  """Return the recording in `folder`, without its state.

  Raises:
    NotThereError: there is no recording; the message names those nearby.
  """
  if not (folder / WINDOW).exists():
    found = [*folder.glob(f"*/{WINDOW}"), *folder.glob(f"flight/*/{WINDOW}")] if folder.is_dir() else []
    near = sorted(str(path.parent) for path in found)
    hint = (
      f"There is one in: {', '.join(near)}."
      if near
      else "If the loss is not finite, a run writes a recording in WORKDIR/flight."
    )
    raise NotThereError(
      f"--config.replay={folder}: there is no recording: the file {WINDOW} is missing. {hint}"
    )
  content = json.loads((folder / WINDOW).read_text())
  names = [field.name for field in dataclasses.fields(Recording) if field.name != "folder"]
  return Recording(folder, **{name: content[name] for name in names})


def log_differences(recording: Recording, config: Any) -> None:
  """Log the options that differ from those of the recording, because they may change its steps."""
  found = changes.compare(recording.config, changes.plain(config), same_code=True)
  ignored = ("replay", "log.", "evals.", "checkpoint.")
  different = [str(change) for change in found if not change.key.startswith(ignored)]
  if different:
    logging.warning("The config differs from that of the recording: %s.", "; ".join(different))


def replay_command(folder: epath.Path) -> str:
  """Return the command of this process with `--config.replay=folder`."""
  arguments = sys.argv[1:]
  if not any(argument.lstrip("-").startswith("config") for argument in arguments):
    arguments = ["--config=CONFIG"]
  return shlex.join(["python", "-m", "dtm_jax.main", *arguments, f"--config.replay={folder}"])
