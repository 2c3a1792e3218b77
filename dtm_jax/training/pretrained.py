"""Read parameters to start from: those of an earlier run, or weights from anywhere."""

import json
import os

from dtm_jax.arrays import PyTree
from dtm_jax.checkpoints.contents import load_params
from dtm_jax.models.vit import model as vit
from dtm_jax.models.vit import weights as vit_weights
from dtm_jax.storage import paths


def load(
  source: str,
  *,
  step: int | None = None,
  revision: str | None = None,
  num_heads: int | None = None,
  weights: str | None = None,
) -> PyTree:
  """Return the parameters of a student or classifier, NumPy float32.

  Args:
    source: the workdir of a run, or a source that `models.vit.weights.load` reads.
    step: a step of the run. The default is its last one.
    revision: a revision of a repository of the hub.
    num_heads: the number of heads, which foreign weights without relative position tables do not give.
    weights: the container of the model if a file holds several (see `models.files.checkpoint_contents`).

  Raises:
    NotThereError: there is neither a run nor weights.
    UnreadableFileError: names or shapes do not match. The message lists all of them.
  """
  if run_config(source) is not None:
    return load_params(os.fspath(paths.resolve(source) / "checkpoints"), step=step)
  return vit_weights.load(source, revision=revision, num_heads=num_heads, weights=weights)


def run_config(source: str) -> dict | None:
  """Return the config of the run in the workdir `source`, or None if there is no run."""
  workdir = paths.resolve(source)
  if not (workdir / "checkpoints").exists():
    return None
  return json.loads((workdir / "config.json").read_text())


def num_heads_of(config: dict) -> int | None:
  """Return the number of heads of the student in the config of a run, or None without a student."""
  student = config.get("student", {})
  sizes = vit.sizes(student["variant"]) if "variant" in student else {}
  return student.get("num_heads") or sizes.get("num_heads")
