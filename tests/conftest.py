"""Configure JAX before it is imported, share one small world, and put the slow tests first."""

import gc
import os
import time
from pathlib import Path

import jaxtyping
import pytest
import xla_flags

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + (
  # Eight devices on busy cores may wait for one another longer than the 40 s after which XLA aborts.
  " --xla_force_host_platform_device_count=8 --xla_cpu_collective_call_terminate_timeout_seconds=600"
  f" {xla_flags.QUICK}"
)
# Full precision, and no silent broadcasting. Processes that a test starts inherit both.
os.environ["JAX_DEFAULT_MATMUL_PRECISION"] = "highest"
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
DAYS_OF_PROGRAMS = 14
"""Age at which a compiled program of an earlier session is removed."""


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
  """Return a folder with CIFAR-shaped images and a small CLIP, for `small_world.debug_config`."""
  import small_world

  folder = tmp_path_factory.mktemp("world")
  small_world.write_cifar10(folder)
  small_world.write_clip(folder / "clip")
  return folder


@pytest.fixture(scope="session")
def programs():
  """Return what the runs of this process share, so that only the first of a config traces and compiles."""
  from shared_programs import SharedPrograms

  return SharedPrograms()


@pytest.fixture
def one_device(monkeypatch: pytest.MonkeyPatch) -> None:
  """Make meshes of one device in this test, because programs for one device compile sooner than for eight."""
  import jax

  from dtm_jax.training import mesh as meshes

  alone = meshes.make_mesh(devices=jax.devices()[:1])
  monkeypatch.setattr(meshes, "make_mesh", lambda *sizes: alone)


def pytest_addoption(parser: pytest.Parser) -> None:
  parser.addoption("--fast", action="store_true", help="run the quickest tests of every file only")
  parser.addoption("--save-seconds", action="store_true", help="write the CPU seconds of the tests that run")


def pytest_configure(config: pytest.Config) -> None:
  import seconds

  config.pluginmanager.register(seconds, "seconds")
  jaxtyping.install_import_hook(_modules_with_arrays(), "beartype.beartype")
  if "PYTEST_XDIST_WORKER" not in os.environ and hasattr(config, "cache"):  # workers inherit it
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(_folder_of_programs(config))


def _folder_of_programs(config: pytest.Config) -> Path:
  """Return the folder in which all processes of this and of later sessions keep their compiled programs.

  Compilation is nearly half of the suite's time. JAX finds a program by its text, its options and the
  versions of the libraries, so a change of the code compiles anew what it changes. `--cache-clear` removes
  the folder.
  """
  from dtm_jax.training.startup import kind_of_processor

  folder = config.cache.mkdir(f"programs-{kind_of_processor()}")
  for file in folder.iterdir():
    if time.time() - file.stat().st_mtime > DAYS_OF_PROGRAMS * 86400:
      file.unlink(missing_ok=True)
  return folder


def _modules_with_arrays() -> list[str]:
  """Return the modules that name array types. Their calls are checked; mypy is enough for the others."""
  root = Path(__file__).parents[1]
  modules = {
    ".".join(file.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): file.read_text()
    for file in (root / "dtm_jax").rglob("*.py")
  }
  return [name for name, text in modules.items() if "from dtm_jax.arrays import" in text]


@pytest.hookimpl(trylast=True)
def pytest_collection_finish() -> None:
  """Collect garbage seldom, and not in the imported modules. Tracing makes many objects that live on."""
  gc.collect()
  gc.freeze()
  gc.set_threshold(100_000, 20, 50)
