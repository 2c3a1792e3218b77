"""Write the numbers of a run to Weights & Biases.

The variables of the service apply: WANDB_PROJECT (default: dtm_jax), WANDB_ENTITY, WANDB_API_KEY, and
WANDB_MODE=offline for machines without a network. `wandb sync` sends what was written offline.
"""

import os
import sys
import uuid
from collections.abc import Mapping
from typing import Any

import wandb
from etils import epath

from dtm_jax.records import writers
from dtm_jax.storage import paths

NAME = "wandb"
STEP = "step"
"""The x-axis of all curves. The service's own step can't go back, which a resumed run has to do."""


def open_writer(workdir: epath.Path, config: Mapping[str, Any]) -> "WandbWriter":
  """Begin or continue the W&B run of a workdir.

  Local files go to WORKDIR/wandb. If WANDB_DIR is set or the workdir is in a bucket, W&B chooses the place.
  """
  identity = writers.read_identity(workdir, NAME)
  identity.setdefault("id", uuid.uuid4().hex[:12])
  run = wandb.init(
    id=identity["id"],
    resume="allow",
    project=identity.get("project") or os.environ.get("WANDB_PROJECT") or "dtm_jax",
    entity=identity.get("entity") or None,  # offline, the entity is not known
    name=identity.get("name") or workdir.name,
    dir=None if os.environ.get("WANDB_DIR") or paths.is_remote(workdir) else os.fspath(workdir),
  )
  run.config.update(dict(config), allow_val_change=True)
  run.define_metric(STEP)
  run.define_metric("*", step_metric=STEP)
  writers.write_identity(
    workdir,
    NAME,
    {"id": run.id, "project": run.project, "entity": run.entity, "name": run.name, "url": run.url},
  )
  return WandbWriter(run)


class WandbWriter:
  """Writes to one W&B run. Its own process sends the numbers, so no call waits for the network."""

  def __init__(self, run: Any):
    self._run = run

  def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
    self._run.log({STEP: step, **scalars})

  def flush(self) -> None:
    pass

  def close(self) -> None:
    self._run.finish(exit_code=1 if sys.exc_info()[0] else 0)
