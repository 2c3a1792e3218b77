"""Parameters to start from: an earlier run's, or anyone's weights."""

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
  """Return the parameters, NumPy float32, of a student or classifier.

  Args:
    source: the workdir of a run, or what `vit_weights.load` reads.
    step: of the run; by default its last.
    revision: of a repository of the hub.
    num_heads: only of foreign weights without tables of relative positions.
    weights: the container of the model, for a file that holds several (see `models.checkpoint_contents`).

  Raises:
    NotThereError: there is neither run nor weights.
    UnreadableFileError: names or shapes do not match; lists all of them.
  """
  if run_config(source) is not None:
    return load_params(os.fspath(paths.resolve(source) / "checkpoints"), step=step)
  return vit_weights.load(source, revision=revision, num_heads=num_heads, weights=weights)


def run_config(source: str) -> dict | None:
  """The config of the run whose workdir `source` is, or None where it is no run's."""
  workdir = paths.resolve(source)
  if not (workdir / "checkpoints").exists():
    return None
  return json.loads((workdir / "config.json").read_text())


def num_heads_of(config: dict) -> int | None:
  """Of the student in a run's config; None where it has none."""
  student = config.get("student", {})
  sizes = vit.sizes(student["variant"]) if "variant" in student else {}
  return student.get("num_heads") or sizes.get("num_heads")
