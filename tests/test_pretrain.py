"""The pre-training step equals the paper's figure put together by hand, and compiles once for all draws."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_world
import xla_flags

from dtm_jax import device_options, masking, plugins, rngs
from dtm_jax.augment import augment, normalize
from dtm_jax.models.vit import model as vit
from dtm_jax.normalizations import NORMALIZATIONS
from dtm_jax.tasks import Run, StepKeys, pretrain

BATCH = 4
SMALL = {"student__depth": 1, "student__width": 16, "student__num_heads": 1}


@pytest.fixture(scope="module")
def batch():
  return {"image": np.random.default_rng(0).integers(0, 256, (BATCH, 32, 32, 3), np.uint8)}


def make_task(world, **changes):
  config = small_world.debug_config(world, batch_size=BATCH, **SMALL, **changes)
  return pretrain.build(config, Run(2000, 20.0, BATCH)), config


@dataclasses.dataclass
class Compiled:
  """A task with its jitted functions, and how often its step was traced."""

  task: pretrain.Pretraining
  config: Any
  traces: int = 0

  def __post_init__(self):
    self.init = jax.jit(self.task.init)
    self.step = jax.jit(self._train_step)
    self.frozen = jax.device_put(self.task.frozen)

  def _train_step(self, *arguments):
    self.traces += 1
    return self.task.train_step(*arguments)


@pytest.fixture(scope="module")
def compiled(world):
  """The task of most tests below. A second morpher of its loss leaves every token a group of its own."""
  return Compiled(*make_task(world, morphers__tokens__weight=0.5))


def test_a_hundred_steps_are_traced_once(compiled, batch):
  """The jitted step draws n̄ and k anew each time and for each seed, through one trace and one compilation."""
  state = compiled.init(jax.random.key(0))
  groups = []
  for seed in range(100):
    state, measurements = compiled.step(state, compiled.frozen, batch, jax.random.key(seed))
    groups.append(measurements["groups_dtm"])
  assert compiled.traces == 1
  assert compiled.step._cache_size() == 1
  groups = np.array(groups)
  assert len(np.unique(groups)) > 60  # the mean over 8 draws a step, out of 1..64
  assert 30 < groups.mean() < 40


NORMALIZED = pytest.param(True, marks=pytest.mark.long)  # test_morphing.py has this loss


@pytest.mark.parametrize("normalize_target", [False, NORMALIZED])
def test_the_loss_is_that_of_the_papers_figure(world, compiled, batch, normalize_target):
  """The test calls teacher, mask, student, labels and loss one after the other."""
  if normalize_target != compiled.config.loss.normalize_target:
    compiled = Compiled(*make_task(world, loss__normalize_target=normalize_target))
  config, _ = device_options.resolve(compiled.config)
  key = jax.random.key(config.seed)
  state = compiled.init(key)
  _, measurements = compiled.step(state, compiled.frozen, batch, key)

  each = lambda name: rngs.per_example(rngs.stream(key, name, 0), BATCH)
  image = augment(each("augment"), batch["image"], flip=0.5, color_jitter=0.0)
  teacher = plugins.build("teachers", config.teacher)
  target_BNC = jax.jit(teacher.apply)(teacher.params, normalize(image, teacher.mean, teacher.std))
  mask_BN = jax.jit(partial(masking.masks, grid=(8, 8), **config.mask))(keys_B=each("mask"))
  student = vit.build(**config.student, out_dim=teacher.width)
  seen = normalize(image, *NORMALIZATIONS["imagenet"])
  student_BNC = jax.jit(student.apply)({"params": state["params"]}, seen, mask_BN)["prediction"]

  keys_S = jax.random.split(rngs.stream(rngs.stream(key, "morph", 0), "dtm"), 2)
  options = {k: v for k, v in config.morphers.dtm.items() if k not in ("name", "weight")}
  assign = jax.jit(plugins.load("morphers", "bipartite").build(**options))
  losses = []
  for key in keys_S:
    label_BN = assign(key, target_BNC, image)
    for b in range(BATCH):
      for group in np.unique(label_BN[b]):
        members = np.asarray(label_BN[b]) == group
        u, v = (np.asarray(x[b], np.float64)[members].mean(0) for x in (student_BNC, target_BNC))
        if normalize_target:
          v = (v - v.mean()) / np.sqrt(v.var(ddof=1) + 1e-6)
        error = np.abs(u - v)
        distance = np.where(error < 2, error**2 / 4, error - 1).mean()
        losses.append(members.sum() / 64 * distance / BATCH / 2)
  np.testing.assert_allclose(measurements["loss_dtm"], sum(losses), rtol=1e-5)


def test_the_option_of_a_normalized_target_reaches_the_loss(world, compiled):
  assert not compiled.task.distance["normalize_target"]
  assert make_task(world, loss__normalize_target=True)[0].distance["normalize_target"]


def test_noise_of_the_teacher(world, compiled, batch):
  """It has the strength that the option names, depends on (seed, step, image), and spares evaluations."""
  clean, noisy = compiled.task, make_task(world, teacher__noise=0.5, morphers__tokens__weight=0.5)[0]
  images = {"image": np.tile(batch["image"], (16, 1, 1, 1))}
  outputs = [jax.jit(task.outputs["teacher_tokens"])({}, task.frozen, images) for task in (clean, noisy)]
  np.testing.assert_array_equal(*outputs)
  target_BNC = outputs[0]
  keys = lambda seed, step: StepKeys(jax.random.key(seed), step, len(target_BNC))
  assert clean.add_noise(target_BNC, keys(0, 0)) is target_BNC
  add = jax.jit(lambda seed, step: noisy.add_noise(target_BNC, keys(seed, step)))
  drawn = add(0, 0)
  relative = np.asarray(drawn - target_BNC) / np.std(target_BNC, axis=1, keepdims=True)
  assert abs(relative.std() - 0.5) < 0.01
  assert abs(relative.mean()) < 0.01
  np.testing.assert_array_equal(drawn, add(0, 0))
  for other in (add(0, 1), add(1, 0), np.roll(drawn, BATCH, axis=0)):
    assert np.abs(other - drawn).mean() > 0.1 * np.std(target_BNC)

  key = jax.random.key(0)
  arguments = compiled.init(key), compiled.frozen, batch, key
  losses = [step(*arguments)[1]["loss"] for step in (compiled.step, jax.jit(noisy.train_step))]
  assert losses[1] > losses[0]


def test_only_the_student_learns(compiled, batch):
  state = compiled.init(jax.random.key(0))
  assert set(state["params"]) == {
    "blocks", "cls_token", "head", "mask_token", "norm", "patch_embed", "rel_pos_bias",
  }  # fmt: skip

  def loss(frozen):
    return compiled.task.train_step(state, frozen, batch, jax.random.key(0))[1]["loss"]

  grads = jax.jit(jax.grad(loss))(compiled.frozen)
  assert all(not np.any(leaf) for leaf in jax.tree.leaves(grads))


def test_several_morphers_add_up_with_their_weights(compiled, batch):
  key = jax.random.key(0)
  _, measured = compiled.step(compiled.init(key), compiled.frozen, batch, key)
  total = measured["loss_dtm"] + 0.5 * measured["loss_tokens"]
  np.testing.assert_allclose(measured["loss"], total, rtol=1e-6)
  assert measured["groups_tokens"] == 64


def test_a_grid_that_is_not_the_teachers_is_refused(world):
  with pytest.raises(ValueError, match=r"\(4, 4\).*patch 8.*\(8, 8\).*patch 4"):
    make_task(world, student__patch_size=8, teacher__image_size=32)


def test_predictions_hide_nothing(compiled, batch):
  state = compiled.init(jax.random.key(0))
  student = vit.build(**compiled.config.student, out_dim=32)
  pixels = normalize(jnp.asarray(batch["image"], jnp.float32) / 255, *NORMALIZATIONS["imagenet"])
  expected = jax.jit(student.apply)({"params": state["params"]}, pixels)["patches"].mean(axis=1)
  features = compiled.task.outputs["student"](state, compiled.frozen, batch)
  np.testing.assert_allclose(features, expected, atol=1e-5)


def test_a_probe_learns_beside_and_moves_nothing(world):
  """The probe learns four classes of grey levels. The student's parameters stay the same to the bit."""
  label = np.arange(16, dtype=np.int32) % 4
  noise = np.random.default_rng(3).integers(0, 20, (16, 32, 32, 3))
  labelled = {"image": (60 * label[:, None, None, None] + noise).astype(np.uint8), "label": label}
  states = {}
  for lr in (None, 0.1):
    config = small_world.debug_config(
      world, batch_size=16, probe__lr=lr, morphers__tokens__weight=1.0, mask__kind="random",
      mask__min_block=None, **SMALL,
    )  # fmt: skip
    del config.morphers.dtm  # the loss needs no matching here, and its program would compile for long
    task = pretrain.build(config, Run(2000, 20.0, 16, ("a", "b", "c", "d")))
    assert task.needs_labels == (lr is not None)
    state = jax.jit(task.init)(jax.random.key(0))
    step = jax.jit(task.train_step, compiler_options=xla_flags.SHIPPED_GENERATOR)
    lines = []
    for _ in range(30):
      state, measurements = step(state, task.frozen, labelled, jax.random.key(0))
      lines.append(measurements)
    states[lr] = state
  jax.tree.map(np.testing.assert_array_equal, states[None]["params"], states[0.1]["params"])
  assert "probe" not in states[None]
  np.testing.assert_allclose(lines[0]["probe_loss"], np.log(4), rtol=1e-6)
  assert lines[-1]["probe_loss"] < 0.5 * lines[0]["probe_loss"]
  assert lines[-1]["probe_accuracy"] > 0.9
  with pytest.raises(ValueError, match=r"probe.lr=0.1, but 'cifar10' has no class names"):
    pretrain.build(config, Run(2000, 20.0, 16, None))
