"""Every config imports, names modules that exist, and its task traces at full size without being run."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dtm_jax import plugins
from dtm_jax.models.clip import model as clip
from dtm_jax.models.clip import weights as clip_weights
from dtm_jax.models.files import weight_files
from dtm_jax.tasks import Run
from dtm_jax.teachers import clip as clip_teacher

ROOT = Path(__file__).parents[1]
CONFIGS = sorted({path.stem for path in (ROOT / "configs").glob("*.py")} - {"__init__", "common"})


def abstract_weights(found, **_):
  """Return a CLIP with shapes as parameters: the quickstart's teacher for a folder named tiny, else B/16."""
  if "tiny" in str(found.folder):
    image = clip.ImageConfig(clip.Tower(96, 4, 3, 384), image_size=32, patch_size=4)
    config = clip.CLIPConfig(image=image, text=None, embed_dim=64)
  else:
    config = clip.CLIPConfig(text=None)
  return config, clip_weights.param_shapes(config)


def with_a_data_set(evals):
  """The evaluators that name a data set. The others use that of the training."""
  return [section for section in evals.values() if "dataset" in section]


@pytest.mark.parametrize("name", CONFIGS)
def test_config_traces(name, monkeypatch):
  found = lambda path, **_: weight_files.Found(Path(path) / "model.safetensors")
  monkeypatch.setattr(weight_files, "find", found)
  monkeypatch.setattr(clip_teacher.clip_weights, "load", abstract_weights)
  config = importlib.import_module(f"configs.{name}").get_config()
  if config.get("teacher") and config.teacher.name == "checkpoint":  # of a run that is not there
    config.teacher = dict(name="clip", path="tiny" if config.data.image_size == 32 else "base")
  if config.task == "frozen_clip":
    config.clip.path = str(ROOT / "assets" / "tiny_clip_cifar10")  # for its tokenizer
  config.lock()
  for section in with_a_data_set(config.evals):
    plugins.load("datasets", section.dataset.name)
  for evaluator, section in config.evals.items():
    plugins.load("evaluators", section.get("name", evaluator))
  plugins.load("datasets", config.data.dataset.name)
  names = ("cat", "dog")
  total_steps = 0 if config.total_steps == 0 else 100
  task = plugins.load("tasks", config.task).build(config, Run(total_steps, 10.0, config.batch_size, names))

  state = jax.eval_shape(task.init, jax.random.key(0))
  batch = {
    "image": jax.ShapeDtypeStruct((8, config.data.image_size, config.data.image_size, 3), jnp.uint8),
    "label": jax.ShapeDtypeStruct((8,), jnp.int32),
    "map": jax.ShapeDtypeStruct((8, config.data.image_size, config.data.image_size), jnp.uint8),
  }
  after, measurements = jax.eval_shape(task.train_step, state, task.frozen, batch, jax.random.key(0))
  same = jax.tree.map(lambda x, y: (x.shape, x.dtype) == (y.shape, y.dtype), state, after)
  assert all(jax.tree.leaves(same))
  assert measurements["loss"].shape == ()


@pytest.mark.parametrize("name", CONFIGS)
def test_evaluation_follows_the_data_set_and_the_image_size(name):
  config = importlib.import_module(f"configs.{name}").get_config()
  config.data.dataset.name, config.data.image_size = "folder", 48
  for section in with_a_data_set(config.evals):
    assert section.dataset.name == "folder"
    assert section.image_size == 48


@pytest.mark.parametrize(
  ("override", "hint"),
  [("--config.bach_size=8", "batch_size"), ("--config.loss.schedule=3", "loss.schedules")],
)
def test_a_mistyped_key_names_the_nearest(override, hint):
  command = [sys.executable, "-m", "dtm_jax.main", "--config=configs/vitb16.py", override]
  done = subprocess.run(
    command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"}
  )
  assert done.returncode != 0
  assert hint in done.stderr
  assert "Traceback" not in done.stderr


def test_schedules_of_time_do_not_freeze_other_numbers():
  """Numbers that depend on others are computed at run time, so a changed batch size changes nothing else."""
  config = importlib.import_module("configs.vitb16").get_config()
  before = config.to_dict()
  config.batch_size = 64
  changed = {key for key, value in config.to_dict().items() if not np.array_equal(before[key], value)}
  assert changed == {"batch_size"}
