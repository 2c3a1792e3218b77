"""Imports go strictly downward, and every file has its floor."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = {
  "main": 7,
  "loop": 6,
  "tasks": 5,
  "evaluators": 4,
  **dict.fromkeys(("morphers", "teachers", "datasets", "dataset_settings"), 3),
  "training": 3,
  "pretrained": 2.5,  # others' parameters: models and checkpoints, and teachers are made of them
  **dict.fromkeys(("models", "data", "augment", "mixing", "checkpoints", "online_probe", "optim"), 2),
  **dict.fromkeys(("mesh", "reporting"), 2),
  "segmentation": 1.7,
  "stored_checkpoints": 1.7,
  "checkpoint_retries": 1.5,  # what checkpoints and the loading of parameters share
  "label_maps": 1.5,  # an image and its map are read together
  "matching_kernel": 1.5,  # of morphing's rounds, for TPUs
  **dict.fromkeys(
    ("morphing", "masking", "image_decoding", "clustering", "consistency", "s3_checkpoints"), 1
  ),
  **dict.fromkeys(("array_checksums", "checkpoint_evidence"), 1),
  **dict.fromkeys(("mirror", "progress", "rngs", "plugins", "prompts", "normalizations", "rand_augment"), 0),
  **dict.fromkeys(("processes", "storage_faults"), 0),
  **dict.fromkeys(("orientation", "pixel_values", "resampling"), 0),  # parts of image_decoding
  # The letters, paths and errors, which the ground floor itself uses.
  **dict.fromkeys(("arrays", "paths"), -1),
  "object_stores": -2,
  "errors": -3,
}
MODULES = sorted((ROOT / "dtm_jax").rglob("*.py"))


def unit_of(path: Path) -> str:
  return path.relative_to(ROOT / "dtm_jax").with_suffix("").parts[0]


def imported_units(path: Path) -> set[str]:
  units = set()
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
      names = [f"{node.module}.{alias.name}" for alias in node.names]
    else:
      continue
    units |= {name.split(".")[1] for name in names if name.startswith("dtm_jax.")}
  return units


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_down(path):
  unit = unit_of(path)
  assert unit in FLOORS or unit == "__init__", f"{path} has no floor"
  upward = {name for name in imported_units(path) - {unit} if FLOORS[name] >= FLOORS[unit]}
  assert not upward, f"{path} on floor {FLOORS[unit]} imports {upward}"


@pytest.mark.parametrize("path", sorted((ROOT / "tests").glob("*.py")) + MODULES, ids=lambda path: path.name)
def test_only_checkpoints_import_orbax_and_only_reporting_clu(path):
  source = path.read_text()
  for library, owner in (("orbax", "checkpoints"), ("clu", "reporting")):
    lines = [f"import {library}", f"from {library}"]
    importing = any(line.strip().startswith(tuple(lines)) for line in source.splitlines())
    assert not importing or owner in path.stem, f"{path} imports {library}"
