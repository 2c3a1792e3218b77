"""scripts/export.py writes a run's weights in the formats of other libraries."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from dtm_jax.checkpoints.manager import Checkpoints
from dtm_jax.errors import OptionError
from dtm_jax.models.vit import (
  classifier as vit_classifier,
)
from dtm_jax.models.vit import (
  config as vit_config,
)
from dtm_jax.models.vit import (
  model as vit,
)
from dtm_jax.models.vit import (
  transfer as vit_transfer,
)
from dtm_jax.models.vit import (
  weights as vit_weights,
)
from scripts.weights.export import export

ROOT = Path(__file__).parents[1]
MODEL = vit.VisionTransformer(patch_size=4, width=24, depth=2, num_heads=3, out_dim=10)


def random_params(seed, model=MODEL):
  rng = np.random.default_rng(seed)
  shapes = vit_config.param_shapes(model, (5, 5))
  return jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape, np.float32), shapes)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  """Return the workdir of a pre-training run with the checkpoints of two steps."""
  folder = tmp_path_factory.mktemp("run")
  student = {"variant": "Ti", "width": 24, "depth": 2, "num_heads": 3, "patch_size": 4}
  config = {"augment": {"normalization": "clip"}, "student": student}
  (folder / "config.json").write_text(json.dumps(config))
  saved = Checkpoints(str(folder / "checkpoints"))
  for step in (1, 2):
    saved.save(step, {"params": random_params(step), "step": np.int32(step)}, {})
  saved.wait()
  saved.close()
  return folder


def assert_same(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  jax.tree.map(np.testing.assert_array_equal, a, b)


def test_the_last_step_of_a_run_or_another(workdir, tmp_path):
  export(str(workdir), "authors", tmp_path / "last")
  assert_same(vit_weights.load(tmp_path / "last"), random_params(2))
  export(str(workdir), "authors", tmp_path / "first", step=1)
  assert_same(vit_weights.load(tmp_path / "first"), random_params(1))
  config = json.loads((tmp_path / "last" / "config.json").read_text())
  assert config["mean"] == [0.48145466, 0.4578275, 0.40821073]


def test_from_one_format_to_the_next(workdir, tmp_path):
  """The weights go from the authors' format to transformers' and to timm's."""
  export(str(workdir), "authors", tmp_path / "a")
  export(str(tmp_path / "a"), "transformers", tmp_path / "b", normalization="inception")
  export(str(tmp_path / "b"), "timm", tmp_path / "c")
  params = random_params(2)
  del params["head"]
  expected = vit_transfer.sum_tables(params) | {"mask_token": np.zeros(24, np.float32)}
  assert_same(vit_weights.load(tmp_path / "c"), expected)
  preprocessor = json.loads((tmp_path / "b" / "preprocessor_config.json").read_text())
  assert preprocessor["image_mean"] == [0.5] * 3
  timm_config = json.loads((tmp_path / "c" / "config.json").read_text())
  assert timm_config["pretrained_cfg"]["mean"] == [0.485, 0.456, 0.406]


def test_the_heads_of_a_run_without_tables_are_the_configs(tmp_path):
  model = MODEL.clone(rel_pos_bias=False, shared_rel_pos_bias=False, abs_pos_emb=True)
  config = {"augment": {"normalization": "imagenet"}, "student": {"variant": "Ti", "width": 24}}
  (tmp_path / "config.json").write_text(json.dumps(config))
  saved = Checkpoints(str(tmp_path / "checkpoints"))
  saved.save(1, {"params": random_params(0, model)}, {})
  saved.close()
  export(str(tmp_path), "timm", tmp_path / "out")
  assert json.loads((tmp_path / "out" / "config.json").read_text())["model_args"]["num_heads"] == 3


def test_the_command(workdir, tmp_path):
  flags = [f"--source={workdir}", "--format=timm", f"--to={tmp_path}"]
  done = subprocess.run(
    [sys.executable, "-m", "scripts.weights.export", *flags],
    cwd=ROOT,
    env={"JAX_PLATFORMS": "cpu", "PATH": ""},
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  assert "Leaving out for timm, which has no place for them: mask_token, head." in done.stderr
  assert vit_weights.load(tmp_path)["blocks"]["ln1"]["scale"].shape == (2, 24)


def test_the_classes_of_a_run_are_named_in_every_format(tmp_path):
  """transformers and timm read the names from these files. For the authors' format, the file is ours."""
  names = ["zebra", "10", "9"]
  classifier = vit_classifier.build(
    variant="Ti",
    width=24,
    depth=1,
    num_heads=3,
    patch_size=4,
    num_classes=3,
    abs_pos_emb=False,
    rel_pos_bias=True,
  )
  run = tmp_path / "run"
  saved = Checkpoints(str(run / "checkpoints"))
  saved.save(1, {"params": random_params(0, classifier), "step": np.int32(1)}, {})
  saved.close()
  config = {"augment": {"normalization": "clip"}, "class_names": names}
  (run / "config.json").write_text(json.dumps(config))
  for layout in ("authors", "timm", "transformers"):
    export(str(run), layout, tmp_path / layout)
  read = lambda layout: json.loads((tmp_path / layout / "config.json").read_text())
  assert read("transformers")["id2label"] == {"0": "zebra", "1": "10", "2": "9"}
  assert read("transformers")["label2id"] == {"zebra": 0, "10": 1, "9": 2}
  assert read("timm")["label_names"] == names
  assert read("authors")["class_names"] == names
  (run / "config.json").write_text(json.dumps(config | {"class_names": names[:2]}))
  with pytest.raises(OptionError, match="has 3 classes, but 2 names"):
    export(str(run), "timm", tmp_path / "wrong")
