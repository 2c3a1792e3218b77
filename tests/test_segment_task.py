"""The segmentation task: the parts of its step, its starts, and runs that stop and resume."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_world
from shared_programs import SharedPrograms

from dtm_jax import device_options, rngs
from dtm_jax.augment import normalize, to_float
from dtm_jax.checkpoints.manager import Checkpoints
from dtm_jax.data.label_maps import IGNORE
from dtm_jax.datasets import shapes
from dtm_jax.evaluators._sliding_windows import bilinear_matrix
from dtm_jax.models.vit import model as vit
from dtm_jax.models.vit import segmenter
from dtm_jax.models.vit import weights as vit_weights
from dtm_jax.normalizations import NORMALIZATIONS
from dtm_jax.tasks import Run, segment
from dtm_jax.training import schedules

TINY = dict(width=16, depth=2, num_heads=2, channels=8, auxiliary_channels=4)


def tiny_config(**sections):
  """Return configs/seg_debug.py at a small size."""
  config = importlib.import_module("configs.seg_debug").get_config()
  shapes_32 = dict(name="shapes", side=32, num_examples=40, border=3)
  config.data.dataset = config.evals.val.dataset = shapes_32
  config.batch_size, config.total_steps = 8, 6
  config.data.image_size = 32
  config.model.update(**TINY, head="linear")
  config.evals.val.update(dict(image_size=32, crop=32, stride=21, windows=1, at_start=False))
  config.optim.warmup_steps = 0
  config.log.log_steps = 2
  for section, options in sections.items():
    config[section].update(options)
  return config


def make_task(config):
  return segment.build(config, Run(config.total_steps, 5.0, config.batch_size, shapes.CLASS_NAMES))


@pytest.fixture(scope="module")
def batch():
  rng = np.random.default_rng(1)
  label_map = rng.integers(0, 4, (8, 32, 32)).astype(np.uint8)
  label_map[rng.random(label_map.shape) < 0.2] = IGNORE
  return {"image": rng.integers(0, 256, (8, 32, 32, 3), np.uint8), "map": label_map}


def cross_entropy(logits, label_map):
  """Return the mean over labelled pixels in float64. Matrices upsample the scores."""
  rows, columns = (bilinear_matrix(old, 32) for old in logits.shape[1:3])
  scores = np.einsum("ya,xb,nabg->nyxg", rows, columns, np.asarray(logits, np.float64))
  log_softmax = scores - np.log(np.exp(scores).sum(-1, keepdims=True))
  valid = label_map != IGNORE
  label = np.where(valid, label_map, 0)
  return -np.take_along_axis(log_softmax, label[..., None].astype(int), axis=-1)[..., 0][valid].mean()


# The other head has one loss more and mirrors the images. The test of frozen parameters takes a linear step.
LINEAR = pytest.param("linear", 0.0, marks=pytest.mark.long)


@pytest.mark.parametrize(("head", "flip"), [LINEAR, ("upernet", 1.0)])
def test_the_step_is_its_parts(batch, head, flip):
  """NumPy computes the losses of the heads. Images and maps are mirrored together."""
  config, _ = device_options.resolve(tiny_config(augment=dict(flip=flip), model=dict(dropout=0.0, head=head)))
  task = make_task(config)
  state = jax.jit(task.init)(jax.random.key(0))
  after, measurements = jax.jit(task.train_step)(state, {}, batch, jax.random.key(0))
  way = slice(None, None, -1 if flip else 1)
  image = normalize(to_float(batch["image"][:, :, way]), *NORMALIZATIONS["imagenet"])
  model = segmenter.build(**config.model, num_classes=4)
  variables = {"params": state["params"], "batch_stats": state["batch_stats"]}
  keys = {"drop_path": jax.random.key(0), "dropout": jax.random.key(0)}
  forward = jax.jit(lambda x: model.apply(variables, x, train=True, mutable=["batch_stats"], rngs=keys))
  outputs, updated = forward(image)
  label_map = batch["map"][:, :, way]
  expected = cross_entropy(outputs["logits"], label_map)
  if head == "upernet":
    expected += 0.4 * cross_entropy(outputs["auxiliary"], label_map)
  np.testing.assert_allclose(measurements["loss"], expected, rtol=1e-5)
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), after["batch_stats"],
    updated["batch_stats"],
  )  # fmt: skip


def test_each_image_draws_its_own_flip(batch):
  keys = rngs.per_example(rngs.stream(jax.random.key(0), "flip", 0), 8)
  image, label_map = segment.flip_together(keys, to_float(batch["image"]), jnp.asarray(batch["map"]), 0.5)
  mirrored = [np.array_equal(new, old[:, ::-1]) for new, old in zip(label_map, batch["map"], strict=True)]
  assert 0 < sum(mirrored) < 8
  for place, flipped in enumerate(mirrored):
    way = slice(None, None, -1 if flipped else 1)
    np.testing.assert_allclose(image[place], batch["image"][place][:, way] / 255.0, atol=1e-6)


def test_a_batch_without_labelled_pixels_has_a_loss_of_zero():
  loss, accuracy = segment.cross_entropy(jnp.ones((2, 4, 4, 3)), jnp.full((2, 8, 8), IGNORE, jnp.uint8))
  assert float(loss) == float(accuracy) == 0.0


def test_the_linear_decay_is_a_straight_line():
  schedule = schedules.make_schedule(peak=2.0, total_steps=30, warmup_steps=10, final=0.5, decay="linear")
  rates = np.array([schedule(step) for step in range(40)])
  np.testing.assert_allclose(rates[10:30], 0.5 + 1.5 * (1 - np.arange(20) / 20), rtol=1e-6)
  np.testing.assert_allclose(rates[30:], 0.5)
  np.testing.assert_allclose(rates[:10], np.arange(10) / 9 * 2.0, rtol=1e-6)
  with pytest.raises(ValueError, match=r"decay 'poly'.*cosine, linear"):
    schedules.make_schedule(peak=1.0, total_steps=3, warmup_steps=0, final=0.0, decay="poly")


@pytest.mark.long  # the loop is that of test_finetune.py
def test_a_run_stops_and_resumes_to_the_bit(tmp_path, monkeypatch):
  config = tiny_config(mesh=dict(data=4, fsdp=2))
  programs = SharedPrograms()
  uninterrupted = programs.train(config, str(tmp_path / "whole"))
  monkeypatch.setattr(Checkpoints, "reached_preemption", lambda self, step: step == 3)
  assert int(programs.train(config, str(tmp_path / "parts"))["step"]) == 3
  monkeypatch.undo()
  resumed = programs.train(config, str(tmp_path / "parts"))
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(resumed), jax.device_get(uninterrupted))
  whole, parts = (small_world.metrics(tmp_path / name) for name in ("whole", "parts"))
  found = small_world.timeless(whole[-1] | {"compilations": 0})  # the resumed run shares the program
  assert small_world.timeless(parts[-1]) == found
  assert {"val/miou", "val/pixel_accuracy", "val/mean_accuracy"} < whole[-1].keys()
  assert all(line.get("compilations", 1) == 1 for line in whole)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
  """The file of a random student for images of 64 pixels, and its parameters."""
  folder = tmp_path_factory.mktemp("student")
  student = vit.build("Ti", width=16, depth=2, num_heads=2, patch_size=8, out_dim=8)
  params = jax.jit(lambda key: vit.init(student, key, 64))(jax.random.key(3))
  vit_weights.save(folder, jax.device_get(params), "authors")
  return folder, params


class TestStart:
  def test_from_a_student_of_another_grid(self, weights):
    folder, given = weights
    task = make_task(tiny_config(init_from=dict(path=str(folder))))
    params = task.pretrained(jax.random.key(0))
    np.testing.assert_array_equal(params["cls_token"], given["cls_token"])
    assert params["blocks"]["attn"]["rel_pos_bias"]["table"].shape == (2, 7 * 7 + 3, 2)
    assert set(jax.eval_shape(task.init, jax.random.key(0), params)) == {
      "params",
      "opt_state",
      "batch_stats",
      "step",
    }

  def test_the_error_of_another_width_names_both_shapes(self, weights):
    config = tiny_config(init_from=dict(path=str(weights[0])), model=dict(width=32))
    with pytest.raises(ValueError, match=r"cls_token: \(16,\), the segmenter wants \(32,\)"):
      make_task(config).pretrained(jax.random.key(0))

  def test_frozen_parameters_do_not_move(self, batch):
    config = tiny_config()
    config.optim.fixed = ("patch_embed/.*", "blocks/.*", "cls_token", "norm/.*")
    task = make_task(config)
    state = jax.jit(task.init)(jax.random.key(0))
    after, _ = jax.jit(task.train_step)(state, {}, batch, jax.random.key(0))
    moved = jax.tree.map(lambda x, y: not np.array_equal(x, y), state["params"], after["params"])
    assert {name for name, part in moved.items() if any(jax.tree.leaves(part))} == {"decoder"}

  def test_data_that_do_not_fit_are_refused(self):
    config = tiny_config()
    with pytest.raises(ValueError, match=r"'shapes' has no class names"):
      segment.build(config, Run(1, 1.0, 8, None))
    config.data.view.crop = "random_resized"
    with pytest.raises(ValueError, match=r"data\.view\.crop='random_resized'.*'joint'"):
      make_task(config)
