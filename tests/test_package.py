"""The package as users install it: what `import dtm_jax` loads, its names, its extras and its wheel."""

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import dtm_jax
from dtm_jax import morphing

ROOT = Path(__file__).parents[1]


def test_import_loads_no_large_library():
  """`import dtm_jax` and `dir(dtm_jax)` load only modules of the standard library."""
  program = (
    "import sys, dtm_jax; dir(dtm_jax); "
    "print(*{name.partition('.')[0] for name in sys.modules} - set(sys.stdlib_module_names))"
  )
  done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
  loaded = {name for name in done.stdout.split() if not name.startswith("__editable__")}
  assert not loaded & {"jax", "jaxlib", "tensorflow", "transformers", "clu", "flax", "numpy"}, loaded
  assert "dtm_jax" in loaded


@pytest.mark.slow
def test_use_as_a_library_loads_neither_tensorflow_nor_clu():
  program = "import sys, dtm_jax; dtm_jax.dtm_loss; print(*sys.modules)"
  done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
  loaded = done.stdout.split()
  assert "jax" in loaded
  assert not {"tensorflow", "clu", "transformers", "orbax"} & set(loaded)


def test_every_name_of_the_package_is_there():
  assert {*dtm_jax.__all__} <= {*dir(dtm_jax)}
  for name in dtm_jax.__all__:
    assert getattr(dtm_jax, name) is not None
  assert dtm_jax.bipartite_match is morphing.bipartite_match
  with pytest.raises(AttributeError, match="no attribute 'bipartite'"):
    dtm_jax.bipartite  # noqa: B018


def test_load_teacher_is_the_teacher_of_a_config():
  teacher = dtm_jax.load_teacher("clip", str(ROOT / "assets/tiny_clip_cifar10"), tokens="normalized")
  assert isinstance(teacher, dtm_jax.Teacher)
  assert teacher.grid == (8, 8)


def test_the_accelerator_extras_keep_the_tested_versions_of_jax():
  versions = lambda file: re.search(r"^jax(?:\[\w+\])?(.*)$", (ROOT / file).read_text(), re.M)[1]
  assert versions("requirements-cuda.txt") == versions("requirements.txt")
  assert versions("requirements-tpu.txt") == versions("requirements.txt")


def test_the_citation_names_this_version():
  text = (ROOT / "CITATION.cff").read_text()
  assert f"version: {dtm_jax.__version__}\n" in text


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
  """The built wheel, opened. setuptools alone builds it, without network."""
  source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
  for path in ("pyproject.toml", "README.md", "LICENSE", *map(str, ROOT.glob("requirements*.txt"))):
    shutil.copy(ROOT / path, source)
  for folder in ("dtm_jax", "configs", "tests"):
    shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
  build = f"from setuptools import build_meta; build_meta.build_wheel({str(out)!r})"
  subprocess.run([sys.executable, "-c", build], cwd=source, capture_output=True, check=True)
  (path,) = out.glob("*.whl")
  with zipfile.ZipFile(path) as archive:
    yield archive


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_nothing_else(wheel):
  names = set(wheel.namelist())
  assert {name.partition("/")[0] for name in names} == {
    "dtm_jax", f"dtm_jax-{dtm_jax.__version__}.dist-info"
  }  # fmt: skip
  assert not any("__pycache__" in name for name in names)
  sources = {str(path.relative_to(ROOT)) for path in (ROOT / "dtm_jax").rglob("*.py")}
  assert sources <= names
  data = {str(path.relative_to(ROOT)) for path in (ROOT / "dtm_jax/models/clip/prompt_files").iterdir()}
  assert {*data, "dtm_jax/py.typed", "dtm_jax/report/page.html"} <= names


@pytest.mark.slow
def test_the_wheel_names_its_requirements_and_extras(wheel):
  (name,) = [name for name in wheel.namelist() if name.endswith("dist-info/METADATA")]
  metadata = wheel.read(name).decode()
  extras = set(re.findall(r"^Provides-Extra: (.*)$", metadata, re.M))
  assert extras == {"cuda", "docs", "mlflow", "studies", "test", "tpu", "wandb"}
  required = set(re.findall(r"^Requires-Dist: ([\w.-]+)[^;\n]*$", metadata, re.M))
  assert {"jax", "clu", "tensorflow-cpu", "tensorflow-datasets"} <= required
  assert "matplotlib" not in required
