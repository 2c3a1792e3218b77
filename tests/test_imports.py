"""Test that a run imports only the libraries that it needs, and when."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import small_world
from PIL import Image

ROOT = Path(__file__).parents[1]
HEAVY = ("clu", "matplotlib", "orbax", "pandas", "tensorflow", "tensorflow_datasets", "torch", "transformers")

PROGRAM = """
import json, sys, threading
heavy = lambda: sorted(set({heavy}) & sys.modules.keys())
{body}
print("RESULT", json.dumps(found))
"""

RUN = """
from dtm_jax import loop
from dtm_jax.options.arguments import split_arguments
from dtm_jax.options.config_file import load_config
from dtm_jax.options.overrides import apply
found = {"import": heavy()}
config = load_config("configs/linear_probe_cifar10.py")
assert not apply(config, split_arguments(["main", *sys.argv[2:]]).typed)
begin = loop.begin
def begin_and_look(setup):
  found["prepared"] = heavy()
  return begin(setup)
loop.begin = begin_and_look
loop.train(config, sys.argv[1])
found["end"] = heavy()
"""


def modules_of(body, *arguments, **environment):
  """Return what a program finds in `sys.modules` at several moments."""
  program = PROGRAM.format(heavy=HEAVY, body=body)
  done = subprocess.run(
    [sys.executable, "-c", program, *map(str, arguments)],
    cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, check=False,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr[-3000:]
  return json.loads(done.stdout.partition("RESULT ")[2])


def test_the_loop_and_all_that_a_config_names_need_no_tensorflow():
  """Data sets, teachers and evaluators import TensorFlow, TFDS and transformers where they use them."""
  body = """
from dtm_jax import loop, plugins
for socket in plugins.SOCKETS:
  for name in plugins.available(socket):
    if name != "tfds": plugins.load(socket, name)
found = heavy()
"""
  assert set(modules_of(body)) <= {"orbax"}


@pytest.mark.slow
def test_a_run_on_a_folder_imports_tensorflow_for_its_writers_alone(world, tmp_path):
  rng = np.random.default_rng(0)
  for i in range(32):
    path = tmp_path / "photos" / "train" / "ab"[i % 2] / f"{i}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rng.integers(256, size=(40, 40, 3), dtype=np.uint8)).save(path)
  found = modules_of(
    RUN, tmp_path / "run", "--config.total_steps=1", "--config.evals={}",
    "--config.data.dataset.name=folder", f"--config.data.dataset.data_dir={tmp_path / 'photos'}",
    "--config.teacher.name=clip", f"--config.teacher.path={world / 'clip'}", "--config.batch_size=16",
    **small_world.environment(1),
  )  # fmt: skip
  assert set(found["import"]) <= {"orbax"}
  assert set(found["prepared"]) == {"orbax"}
  assert {"clu", "tensorflow"} <= set(found["end"])
  assert "tensorflow_datasets" not in found["end"]


def test_a_failing_import_of_the_writers_is_raised_before_the_second_step():
  body = """
sys.modules["tensorflow"] = None  # its import fails
from dtm_jax.records import reporting
reporting.import_writers_meanwhile()
for thread in threading.enumerate():
  if thread is not threading.main_thread(): thread.join()
try:
  reporting.make_writer(None)
except ImportError as error:
  found = str(error)
"""
  assert "tensorflow" in modules_of(body)
