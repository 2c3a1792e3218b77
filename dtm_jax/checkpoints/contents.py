"""Read what one checkpoint holds: its metadata, its arrays, or its parameters alone.

A checkpoint is a folder with its step as the name. It has two of Orbax's items: `state` holds the arrays, and
`meta` holds the caller's metadata, the step, and a table of the arrays with their checksums.
"""

import functools
import json
import logging
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from dtm_jax.arrays import PyTree, named_leaves
from dtm_jax.checkpoints import evidence, retries, s3
from dtm_jax.checkpoints.array_checksums import describe, differing_checksums, differing_shapes, nest
from dtm_jax.checkpoints.retries import CorruptCheckpointError
from dtm_jax.errors import NotThereError, OptionError, UserError
from dtm_jax.storage import paths, writing

s3.install()


def _is_no_forgotten_error(record: logging.LogRecord) -> bool:
  return "exception was never retrieved" not in record.getMessage()


# Orbax reads and writes arrays in parallel and raises the first error. `asyncio` would log a traceback for
# every other task and every group of tasks that failed, although our message says the same.
logging.getLogger("asyncio").addFilter(_is_no_forgotten_error)


def describe_checkpoint(step: int, state: PyTree, meta: dict[str, Any]) -> dict[str, Any]:
  """Return the metadata that a checkpoint stores beside its arrays. All processes must call it together."""
  table = json.loads(json.dumps({"meta": meta, "arrays": describe(state), "step": step}))
  return table | {"crc32": evidence.crc32_of_json(table)}


def stages_of_reading(checkpoint: epath.Path, abstract_state: PyTree) -> list[Callable[[Any], Any]]:
  """Return the stages in which `retries.read_or_prove` reads (state, meta) of a checkpoint."""
  return [lambda _: _read(checkpoint, abstract_state), functools.partial(_verify, checkpoint=checkpoint)]


def load_params(
  folder: str, *, step: int | None = None, retry_delays: Sequence[float] | None = None
) -> PyTree:
  """Return the parameters of one checkpoint as NumPy arrays. Nothing else of the state is read.

  Args:
    folder: the folder `checkpoints` of a run, local or in a bucket.
    step: which checkpoint; None reads the newest.
    retry_delays: seconds between the tries of a read that fails. Default: `retries.RETRY_DELAYS`.

  Raises:
    NotThereError: there is no such checkpoint; the message lists the steps that exist.
    CorruptCheckpointError: its bytes are proven wrong.
    UserError: it cannot be read for another reason, or the name of its folder and its step differ.
  """
  path = paths.resolve(folder)
  steps = sorted(int(child.name) for child in path.iterdir() if _is_whole(child)) if path.exists() else []
  chosen = step if step is not None else max(steps, default=None)
  if chosen not in steps:
    raise NotThereError(f"No checkpoint {'' if step is None else f'{step} '}in {path}. Steps: {steps}.")
  checkpoint = path / str(chosen)
  delays = retries.RETRY_DELAYS if retry_delays is None else retry_delays
  verify = functools.partial(_verify, checkpoint=checkpoint)
  stages: list[Callable[[Any], Any]] = [lambda _: _read_params(checkpoint), verify]
  loaded, proof = retries.read_or_prove(checkpoint, stages, delays, alone=True)
  if proof is not None:
    raise CorruptCheckpointError(f"Cannot load {checkpoint} (steps: {steps}): {proof}")
  return loaded[0]["params"]


def _is_whole(checkpoint: epath.Path) -> bool:
  """Return whether this is the folder of a finished save. In a bucket, Orbax writes a last file to say so."""
  if not checkpoint.name.isdigit():
    return False
  return not paths.is_remote(checkpoint) or (checkpoint / writing.COMMIT_FILE).exists()


def _read(checkpoint: epath.Path, abstract_state: PyTree) -> tuple[PyTree, dict[str, Any]]:
  """Return the arrays and the metadata. This waits for no other process."""
  contents = _read_meta(checkpoint)
  if differing := differing_shapes(abstract_state, contents["arrays"]):
    raise OptionError(
      f"The checkpoint {checkpoint} holds another state than this config makes:\n" + "\n".join(differing)
    )
  handler = ocp.StandardCheckpointHandler()
  return handler.restore(checkpoint / "state", args=ocp.args.StandardRestore(abstract_state)), contents


def _read_params(checkpoint: epath.Path) -> tuple[PyTree, dict[str, Any]]:
  """Return the parameters and the step, and the metadata cut down to them."""
  contents = _read_meta(checkpoint)
  arrays = {n: e for n, e in contents["arrays"].items() if n.startswith("params/") or n == "step"}
  abstract = nest({n: jax.ShapeDtypeStruct(e["shape"], e["dtype"]) for n, e in arrays.items()})
  args = ocp.args.PyTreeRestore(
    item=abstract,
    restore_args=jax.tree.map(lambda x: ocp.RestoreArgs(restore_type=np.ndarray), abstract),
    partial_restore=True,
  )
  state = ocp.PyTreeCheckpointHandler().restore(checkpoint / "state", args=args)
  return state, contents | {"arrays": arrays}


def _read_meta(checkpoint: epath.Path) -> dict[str, Any]:
  """Return the metadata if its checksum agrees. Otherwise a wrong shape would be blamed on the config."""
  path = checkpoint / "meta" / "metadata"
  contents = json.loads(path.read_bytes())
  if not isinstance(contents, dict) or "crc32" not in contents:
    raise CorruptCheckpointError(f"{path} has no checksum")
  saved = contents.pop("crc32")
  found = evidence.crc32_of_json(contents)
  if found != saved:
    raise CorruptCheckpointError(f"the checksum of {path.parent} differs: {found}, saved {saved}")
  _check_step(checkpoint, contents.get("step"))
  return contents


def _verify(read: tuple[PyTree, dict[str, Any]], *, checkpoint: epath.Path) -> tuple[PyTree, dict[str, Any]]:
  """Return the state and the caller's meta if the checksums agree. All processes compute them together."""
  state, contents = read
  if difference := differing_checksums(state, contents["arrays"]):
    raise CorruptCheckpointError(difference)
  if "step" not in contents:  # saved by a version that stored no step in the metadata
    inner = named_leaves(state).get("step")
    _check_step(checkpoint, None if inner is None else int(inner))
  return state, contents["meta"]


def _check_step(checkpoint: epath.Path, inner: int | None) -> None:
  """Raise UserError if the folder is not named by the step that it holds."""
  if inner is not None and str(inner) != checkpoint.name:
    raise UserError(
      f"The checkpoint folder {checkpoint} is named {checkpoint.name} but holds step {inner}. Rename it to "
      f"{inner} (if there is no {checkpoint.parent / str(inner)}) or move it away, then start the same "
      "command again."
    )
