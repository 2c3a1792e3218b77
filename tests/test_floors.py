"""Imports go strictly downward, and every file has its floor."""

import ast
import graphlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = {
  "__init__": 10,
  **dict.fromkeys(("main", "doctor", "seeds"), 9),
  "loop": 8,
  **dict.fromkeys(("tasks", "report"), 7),
  **dict.fromkeys(("evaluators", "device_options"), 6),
  **dict.fromkeys(("morphers", "teachers", "datasets", "records", "options"), 5),
  **dict.fromkeys(("training", "pictures"), 4),
  **dict.fromkeys(("models", "data", "checkpoints", "morphing", "augment"), 3),
  **dict.fromkeys(("matching", "masking", "storage"), 2),
  **dict.fromkeys(("rngs", "partitions", "plugins", "normalizations", "processes", "progress"), 1),
  **dict.fromkeys(("arrays", "devices", "errors", "renamed", "signatures"), 0),
}
MODULES = sorted((ROOT / "dtm_jax").rglob("*.py"))


def unit_of(path: Path) -> str:
  return path.relative_to(ROOT / "dtm_jax").with_suffix("").parts[0]


def imported_names(path: Path) -> set[str]:
  names = set()
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      names |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      names |= {f"{node.module}.{alias.name}" for alias in node.names}
  return {name for name in names if name.startswith("dtm_jax.")}


def imported_units(path: Path) -> set[str]:
  return {name.split(".")[1] for name in imported_names(path)}


def module_of(name: str) -> Path | None:
  """The file of an imported name: a module, a package, or the module that defines the name."""
  for dotted in (name, name.rpartition(".")[0]):
    for path in (ROOT / (dotted.replace(".", "/") + ".py"), ROOT / dotted.replace(".", "/") / "__init__.py"):
      if path in MODULES:
        return path
  return None


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_down(path):
  unit = unit_of(path)
  assert unit in FLOORS, f"{path} has no floor"
  upward = {name for name in imported_units(path) - {unit} if FLOORS[name] >= FLOORS[unit]}
  assert not upward, f"{path} on floor {FLOORS[unit]} imports {upward}"


def test_no_circle_of_imports():
  graph = {path: {module_of(name) for name in imported_names(path)} - {None, path} for path in MODULES}
  list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError, which names the files


@pytest.mark.parametrize("path", sorted((ROOT / "tests").glob("*.py")) + MODULES, ids=lambda path: path.name)
def test_one_owner_each_for_orbax_and_clu(path):
  source = path.read_text()
  for library, owner in (("orbax", "checkpoints"), ("clu", "reporting")):
    lines = [f"import {library}", f"from {library}"]
    importing = any(line.strip().startswith(tuple(lines)) for line in source.splitlines())
    assert not importing or owner in str(path.relative_to(ROOT)), f"{path} imports {library}"
