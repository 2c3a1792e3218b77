"""The CLIP teacher: its tokens are those of the image tower, under the normalisation that was asked for."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dtm_jax import plugins
from dtm_jax.models import clip, clip_weights
from dtm_jax.normalizations import NORMALIZATIONS
from dtm_jax.teachers import Teacher

CONFIG = clip.CLIPConfig(clip.ImageConfig(clip.Tower(32, 2, 4, 64), 32, 8), text=None, embed_dim=16)
build = plugins.load("teachers", "clip").build


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("clip")
  tower = clip.ImageTower(CONFIG.image, CONFIG.embed_dim)
  params = jax.jit(tower.init)(jax.random.key(0), image(32))["params"]
  clip_weights.save(folder, CONFIG, {"image": params}, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
  return folder


def image(size):
  return jax.random.normal(jax.random.key(2), (2, size, size, 3))


@pytest.mark.parametrize(
  ("tokens", "name", "width"), [("projected", "patch_embeddings", 16), ("normalized", "patch_tokens", 32)]
)
def test_tokens_are_those_of_the_tower(folder, tokens, name, width):
  teacher = build(str(folder), tokens=tokens)
  assert isinstance(teacher, Teacher)
  assert (teacher.image_size, teacher.patch_size, teacher.grid, teacher.width) == (32, 8, (4, 4), width)
  assert all(
    isinstance(leaf, np.ndarray) and leaf.dtype == np.float32 for leaf in jax.tree.leaves(teacher.params)
  )
  token_BNC = jax.jit(teacher.tokens)(teacher.params, image(32))
  assert token_BNC.shape == (2, 16, width)
  assert token_BNC.dtype == jnp.float32
  tower = clip.ImageTower(CONFIG.image, CONFIG.embed_dim)
  np.testing.assert_allclose(
    token_BNC, jax.jit(tower.apply)({"params": teacher.params}, image(32))[name], atol=1e-6
  )


def test_another_image_size_resizes_the_positions(folder):
  teacher = build(str(folder), image_size=48)
  assert (teacher.image_size, teacher.grid) == (48, (6, 6))
  assert jax.jit(teacher.tokens)(teacher.params, image(48)).shape == (2, 36, 16)
  with pytest.raises(ValueError, match=r"50x50 .*patch size 8"):
    build(str(folder), image_size=50)


def test_normalisations(folder, tmp_path):
  own = build(str(folder))
  assert (own.mean, own.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
  imagenet = build(str(folder), normalization="imagenet")
  assert (imagenet.mean, imagenet.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
  assert build(str(folder), normalization="inception").mean == (0.5, 0.5, 0.5)
  given = build(str(folder), normalization=([0.0, 0.1, 0.2], [1.0, 1.1, 1.2]))
  assert (given.mean, given.std) == ((0.0, 0.1, 0.2), (1.0, 1.1, 1.2))
  for name in ("config.json", "model.safetensors"):
    (tmp_path / name).write_bytes((folder / name).read_bytes())
  without_preprocessor = build(str(tmp_path))
  assert (without_preprocessor.mean, without_preprocessor.std) == NORMALIZATIONS["clip"]


def test_half_precision_tokens_stay_near(folder):
  exact, rough = (
    jax.jit(teacher.tokens)(teacher.params, image(32))
    for teacher in (build(str(folder), dtype=dtype) for dtype in ("float32", "bfloat16"))
  )
  assert rough.dtype == jnp.float32
  assert 1e-6 < np.abs(exact - rough).max() / np.abs(exact).max() < 0.03


def test_wrong_options_are_named(folder, tmp_path):
  with pytest.raises(ValueError, match=r"'raw'.*projected, normalized"):
    build(str(folder), tokens="raw")
  with pytest.raises(ValueError, match=r"'zero'.*imagenet, clip, inception"):
    build(str(folder), normalization="zero")
  image_params = clip_weights.load(folder)[1]["image"]
  del image_params["projection"]
  clip_weights.save(tmp_path, clip.CLIPConfig(CONFIG.image, None, None), {"image": image_params})
  assert "CLIPVisionModel" in json.loads((tmp_path / "config.json").read_text())["architectures"]
  with pytest.raises(ValueError, match="no projection"):
    build(str(tmp_path))
  assert build(str(tmp_path), tokens="normalized").width == 32
