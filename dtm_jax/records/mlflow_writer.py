"""Write the numbers of a run to MLflow.

The variables of the service apply: MLFLOW_TRACKING_URI (a server or a folder; default: the folder mlruns) and
MLFLOW_EXPERIMENT_NAME (default: dtm_jax).
"""

import os
import pathlib
import sys
import time
from collections.abc import Mapping
from typing import Any

from absl import logging
from etils import epath
from mlflow import MlflowClient
from mlflow.entities import Metric, Param, Run
from mlflow.exceptions import MlflowException

from dtm_jax.records import writers
from dtm_jax.records.changes import flatten

NAME = "mlflow"
PARAMS_AT_ONCE = 100
"""The number of parameters that a server accepts in one call."""
LONGEST_VALUE = 500
"""Longer values are cut off, because some servers refuse them. config.json has them whole."""


def open_writer(workdir: epath.Path, config: Mapping[str, Any]) -> "MlflowWriter":
  """Begin or continue the MLflow run of a workdir."""
  uri = os.environ.get("MLFLOW_TRACKING_URI") or pathlib.Path("mlruns").absolute().as_uri()
  if "://" not in uri or uri.startswith("file:"):
    os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # who names a folder wants it
  client, identity = MlflowClient(uri), writers.read_identity(workdir, NAME)
  run = _continued(client, identity) or _begun(client, workdir)
  client.update_run(run.info.run_id, status="RUNNING")
  _store_config(client, run, config)
  known = {"run_id": run.info.run_id, "experiment_id": run.info.experiment_id}
  writers.write_identity(workdir, NAME, known)
  return MlflowWriter(client, run.info.run_id)


def _begun(client: MlflowClient, workdir: epath.Path) -> Run:
  name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or "dtm_jax"
  experiment = client.get_experiment_by_name(name)
  experiment_id = experiment.experiment_id if experiment else client.create_experiment(name)
  return client.create_run(experiment_id, run_name=workdir.name, tags={"workdir": os.fspath(workdir)})


def _continued(client: MlflowClient, identity: Mapping[str, Any]) -> Run | None:
  """Return the run of an earlier start, or None if there is none on this server."""
  if "run_id" not in identity:
    return None
  try:
    return client.get_run(identity["run_id"])
  except MlflowException as error:
    if error.error_code != "RESOURCE_DOES_NOT_EXIST":
      raise
    logging.warning("MLflow does not know the run %s any more; a new one begins.", identity["run_id"])
    return None


def _store_config(client: MlflowClient, run: Run, config: Mapping[str, Any]) -> None:
  """Store the options as parameters, which MLflow can't change, and the newest config as an artifact."""
  params = [
    Param(key, str(value)[:LONGEST_VALUE]) for key, value in flatten(config) if key not in run.data.params
  ]
  for start in range(0, len(params), PARAMS_AT_ONCE):
    client.log_batch(run.info.run_id, params=params[start : start + PARAMS_AT_ONCE])
  client.log_dict(run.info.run_id, dict(config), "config.json")


class MlflowWriter:
  """Writes to one MLflow run. Every call waits for the server."""

  def __init__(self, client: MlflowClient, run_id: str):
    self._client, self._run_id = client, run_id

  def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
    now = int(time.time() * 1000)
    metrics = [Metric(name, float(value), now, step) for name, value in scalars.items()]
    self._client.log_batch(self._run_id, metrics=metrics)

  def flush(self) -> None:
    pass

  def close(self) -> None:
    self._client.set_terminated(self._run_id, "FAILED" if sys.exc_info()[0] else "FINISHED")
