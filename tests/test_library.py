"""dtm_jax as a library: the examples of its docstrings run, a teacher takes images, and imports are light."""

import dataclasses
import doctest
import importlib
import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dtm_jax
from dtm_jax.augment import normalize, resize_to, to_float
from dtm_jax.errors import OptionError

ROOT = Path(__file__).parents[1]
TINY = str(ROOT / "assets/tiny_clip_cifar10")
MODULES = (
  "dtm_jax", "dtm_jax.morphing", "dtm_jax.partitions", "dtm_jax.teachers", "dtm_jax.models.clip.zeroshot",
  "dtm_jax.pictures.classes", "dtm_jax.pictures.curves", "dtm_jax.pictures.groups", "dtm_jax.pictures.photos",
  "dtm_jax.pictures.sheet", "dtm_jax.pictures.similarity",
)  # fmt: skip
FINDER = doctest.DocTestFinder(exclude_empty=True)
EXAMPLES = [
  test
  for name in MODULES
  for test in FINDER.find(
    importlib.import_module(name), name, extraglobs={"np": np, "jax": jax, "jnp": jnp, "dtm_jax": dtm_jax}
  )
  if test.examples
]
IMAGE = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.name)
def test_example_of_a_docstring(example, monkeypatch):
  monkeypatch.chdir(ROOT)
  output = []
  results = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(example, out=output.append)
  assert not results.failed, "".join(output)


def test_every_public_name_has_an_example():
  public = {name: getattr(dtm_jax, name) for name in dtm_jax.__all__ if not name.startswith("__")}
  for module in (dtm_jax.morphing, dtm_jax.partitions):
    own = inspect.getmembers(module, inspect.isfunction)
    public |= {name: x for name, x in own if x.__module__ == module.__name__ and not name.startswith("_")}
  pictures = importlib.import_module("dtm_jax.pictures")
  public |= {name: getattr(pictures, name) for name in pictures.__all__}
  public |= {name: getattr(dtm_jax.Teacher, name) for name in ("tokens", "prepare")}
  lacking = [name for name, x in public.items() if ">>>" not in (inspect.getdoc(x) or "")]
  assert not lacking


@pytest.fixture(scope="module")
def teacher():
  return dtm_jax.load_teacher("clip", TINY, tokens="normalized")


def test_tokens_are_those_of_the_train_steps_function(teacher):
  expected = jax.jit(teacher.apply)(teacher.params, normalize(to_float(IMAGE), teacher.mean, teacher.std))
  assert expected.shape == (2, 64, teacher.width)
  for images in (IMAGE, jnp.asarray(IMAGE), IMAGE / np.float32(255), IMAGE / 255):
    np.testing.assert_allclose(teacher.tokens(images), expected, atol=2e-5)


def test_images_of_another_size_are_resized(teacher):
  large = jnp.asarray(IMAGE.repeat(3, axis=1).repeat(3, axis=2))
  expected = teacher.tokens(resize_to(to_float(large), 32))
  np.testing.assert_allclose(teacher.tokens(large), expected, atol=2e-5)
  assert jax.eval_shape(teacher.resized(40).tokens, large).shape == (2, 100, teacher.width)


def test_tokens_work_inside_a_jitted_function_and_are_compiled_once(teacher):
  fresh = dtm_jax.load_teacher("clip", TINY, tokens="normalized")
  inside = jax.jit(lambda images: fresh.tokens(images) * 1.0)(jnp.asarray(IMAGE))
  np.testing.assert_allclose(inside, teacher.tokens(IMAGE), atol=2e-5)
  fresh.tokens(IMAGE)  # a tracer that outlives its function would raise here
  fresh.tokens(IMAGE[::-1].copy())
  assert fresh._jitted._cache_size() == 1


@pytest.mark.parametrize(
  ("arguments", "error", "message"),
  [
    (lambda t: (t.params,), TypeError, r"takes an array of images, not dict.*teacher\.apply"),
    (lambda t: (IMAGE.tolist(),), TypeError, r"not list: use np\.asarray"),
    (lambda t: (normalize(to_float(IMAGE), t.mean, t.std),), ValueError, r"values from 0 to 1, but.*-"),
    (lambda t: (IMAGE.astype(np.float32),), ValueError, r"values from 0 to 1"),
    (lambda t: (IMAGE * np.float32("nan"),), ValueError, r"values from 0 to 1, but theirs are nan"),
    (lambda t: (IMAGE.astype(np.int64),), TypeError, r"uint8, or float .*not int64"),
    (lambda t: (IMAGE[0],), ValueError, r"\[B, H, H, 3\], but their shape is \(32, 32, 3\)"),
    (lambda t: (np.moveaxis(IMAGE, 3, 1),), ValueError, r"shape is \(2, 3, 32, 32\)"),
    (lambda t: (IMAGE[:, :24],), ValueError, r"must be square.*\(2, 24, 32, 3\)"),
  ],
)  # fmt: skip
def test_what_tokens_refuses(teacher, arguments, error, message):
  with pytest.raises(error, match=message):
    teacher.tokens(*arguments(teacher))


def test_a_call_with_parameters_is_apply_as_in_earlier_versions(teacher):
  double = dataclasses.replace(teacher, apply=lambda params, image: params["factor"] * image[:, 0])
  image = normalize(to_float(IMAGE), teacher.mean, teacher.std)
  with pytest.warns(DeprecationWarning, match=r"is teacher\.apply now"):
    token_BNC = double.tokens({"factor": 2}, image)
  np.testing.assert_array_equal(token_BNC, 2 * image[:, 0])


def test_an_unknown_option_of_a_teacher_is_named_with_the_choices():
  with pytest.raises(OptionError, match=r"teacher clip: 'imagesize'\. Available: .*image_size"):
    dtm_jax.load_teacher("clip", "nowhere", imagesize=64)


def test_the_code_of_the_documentation_runs(monkeypatch, tmp_path):
  monkeypatch.chdir(ROOT)
  text = (ROOT / "docs/library.md").read_text()
  direct, step = re.findall(r"```python\n(.*?)```", text, re.DOTALL)[:2]
  names: dict = {}
  for block in (direct, step):
    exec(block.replace("groups.png", str(tmp_path / "groups.png")), names)
  assert (tmp_path / "groups.png").exists()
  assert 0 < names["loss"] < 1
  assert names["target_BNC"].shape == (1, 64, 64)


PROGRAM = """
import json, sys, time
start = time.perf_counter()
import dtm_jax
loaded = {"import": [time.perf_counter() - start, sorted(sys.modules)]}
import jax, jax.numpy as jnp
teacher = dtm_jax.load_teacher("clip", "assets/tiny_clip_cifar10")
label_BN = dtm_jax.bipartite_match(teacher.tokens(jnp.zeros((1, 32, 32, 3))), jnp.array([20, 10]))
assert label_BN.shape == (1, 64)
loaded["use"] = [time.perf_counter() - start, sorted(sys.modules)]
print(json.dumps(loaded))
"""


@pytest.mark.slow
def test_neither_import_nor_use_loads_tensorflow_or_clu():
  done = subprocess.run(
    [sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True, check=False
  )
  assert done.returncode == 0, done.stderr
  loaded = {name: {*modules} for name, (_, modules) in json.loads(done.stdout.splitlines()[-1]).items()}
  heavy = {"tensorflow", "tensorflow_datasets", "clu", "orbax", "matplotlib"}
  assert not loaded["use"] & heavy
  assert not loaded["import"] & (heavy | {"jax", "flax", "transformers", "numpy"})
