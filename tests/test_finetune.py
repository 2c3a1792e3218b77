"""Fine-tuning: the parts of the recipe equal NumPy's, and whole runs stop, resume and evaluate."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_world
from shared_programs import SharedPrograms

from dtm_jax import loop, rngs
from dtm_jax.augment import augment, mix, normalize, random_erase
from dtm_jax.checkpoints.manager import Checkpoints
from dtm_jax.models.vit import classifier as vit_classifier
from dtm_jax.models.vit import model as vit
from dtm_jax.models.vit import weights as vit_weights
from dtm_jax.normalizations import NORMALIZATIONS
from dtm_jax.tasks import Run, finetune
from dtm_jax.training import optim

NAMES = tuple("abcdefghij")
TINY = dict(width=24, depth=2, num_heads=2)


def tiny_config(world):
  """Return configs/finetune_cifar10.py at toy size, with everything switched on."""
  config = importlib.import_module("configs.finetune_cifar10").get_config()
  config.data.dataset.data_dir = config.evals.test.dataset.data_dir = str(world)
  config.batch_size, config.total_steps = 16, 6
  config.augment.erase_prob = 0.25
  config.mix.update(mixup=0.8, cutmix=1.0)
  config.model.update(**TINY, drop_path=0.1)
  config.init_from.path = None
  config.optim.warmup_steps = 0
  config.ema.decay = 0.9
  config.log.log_steps = 2
  return config


def plain_config(world):
  """Return the config without augmentation and mixing, for tests of the updates alone."""
  config = tiny_config(world)
  config.augment.update(flip=0.0, erase_prob=0.0)
  config.mix.update(mixup=0.0, cutmix=0.0)
  config.model.drop_path = 0.0
  return config


def make_task(config):
  return finetune.build(config, Run(config.total_steps, 5.0, config.batch_size, NAMES))


@pytest.fixture(scope="module")
def batch():
  rng = np.random.default_rng(1)
  return {
    "image": rng.integers(0, 256, (16, 32, 32, 3), np.uint8),
    "label": np.arange(16, dtype=np.int32) % 10,
  }


def test_the_step_is_its_parts(world, batch):
  """The test calls augmentation, mixing and model in turn. NumPy smooths and takes the cross-entropy."""
  config = tiny_config(world)
  config.model.drop_path = 0.0
  task = make_task(config)
  state = jax.jit(task.init)(jax.random.key(0))
  _, measurements = jax.jit(task.train_step)(state, {}, batch, jax.random.key(0))

  smooth = np.full((16, 10), 0.01, np.float32)
  smooth[np.arange(16), batch["label"]] = 0.91
  model = vit_classifier.build(**config.model, num_classes=10)

  @jax.jit
  def parts(params, key):
    each = lambda name: rngs.per_example(rngs.stream(key, name, 0), 16)
    image = normalize(augment(each("augment"), batch["image"]), *NORMALIZATIONS["imagenet"])
    image = random_erase(each("erase"), image, 0.25)
    image, target = mix(rngs.stream(key, "mix", 0), image, jnp.asarray(smooth), mixup=0.8, cutmix=1.0)
    return model.apply({"params": params}, image)["logits"], target

  logits, target = (np.asarray(x, np.float64) for x in parts(state["params"], jax.random.key(0)))
  log_softmax = logits - np.log(np.exp(logits).sum(1, keepdims=True))
  np.testing.assert_allclose(measurements["loss"], -(target * log_softmax).sum(1).mean(), rtol=1e-5)


ONE = pytest.param(1, marks=pytest.mark.long)  # with 2, the average skips the steps without an update too


@pytest.mark.parametrize("accumulate", [ONE, 2])
def test_the_average_follows_every_update(world, batch, accumulate):
  config = plain_config(world)
  config.optim.accumulate = accumulate
  task = make_task(config)
  state = jax.jit(task.init)(jax.random.key(0))
  expected = jax.tree.map(np.asarray, state["params"])
  step = jax.jit(task.train_step)
  for i in range(4):
    state, _ = step(state, {}, batch, jax.random.key(0))
    if (i + 1) % accumulate == 0:
      expected = jax.tree.map(lambda e, p: 0.9 * e + 0.1 * np.asarray(p), expected, state["params"])
  jax.tree.map(lambda e, x: np.testing.assert_allclose(e, x, atol=1e-6), expected, state["ema"])
  moved = jax.tree.map(lambda e, p: np.abs(e - p).max(), state["ema"], state["params"])
  assert max(jax.tree.leaves(moved)) > 1e-5
  predict = {name: jax.jit(task.outputs[name]) for name in ("logits", "logits_ema")}
  logits = {name: function(state, {}, batch) for name, function in predict.items()}
  averaged = state | {"params": state["ema"]}
  np.testing.assert_array_equal(logits["logits_ema"], predict["logits"](averaged, {}, batch))
  assert not np.array_equal(logits["logits"], logits["logits_ema"])


def test_without_a_decay_there_is_no_average(world):
  config = tiny_config(world)
  config.ema.decay = None
  task = make_task(config)
  assert set(jax.eval_shape(task.init, jax.random.key(0))) == {"params", "opt_state", "step"}
  assert "logits_ema" not in task.outputs


def test_layer_decay_reaches_the_update(world, batch):
  """With SGD and a rate of one, the update is the gradient of each layer times its factor."""
  config = plain_config(world)
  config.optim.update(name="sgd", lr=1.0, final_lr=1.0, weight_decay=0.0, betas=(0.0, 0.0))
  plain = config.copy_and_resolve_references()
  plain.optim.layer_decay = 1.0
  steps = []
  for each in (config, plain):
    task = make_task(each)
    state = jax.jit(task.init)(jax.random.key(0))
    after, _ = jax.jit(task.train_step)(state, {}, batch, jax.random.key(0))
    steps.append(jax.tree.map(lambda new, old: np.asarray(new - old), after["params"], state["params"]))
  scales = optim.layer_decay_scales(steps[0], 0.75)
  jax.tree.map(
    lambda d, p, s: np.testing.assert_allclose(d, s * p, rtol=1e-3, atol=1e-6), steps[0], steps[1], scales
  )


@pytest.fixture(scope="module")
def student_weights(tmp_path_factory):
  """Write a random student in the authors' names and return the file."""
  folder = tmp_path_factory.mktemp("student")
  student = vit.build("Ti", **TINY, patch_size=4, out_dim=8)
  params = jax.jit(lambda key: vit.init(student, key, 32))(jax.random.key(3))
  vit_weights.save(folder, jax.device_get(params), "authors")
  return folder


def test_a_run_stops_and_resumes_to_the_bit(world, student_weights, tmp_path, monkeypatch):
  """The run starts from pre-trained weights, keeps an average and evaluates. fsdp shards the average too."""
  config = plain_config(world)  # test_loop.py resumes a run with augmentation
  config.init_from.path = str(student_weights)
  config.mesh.update(data=4, fsdp=2)
  programs = SharedPrograms()
  uninterrupted = programs.train(config, str(tmp_path / "whole"))
  monkeypatch.setattr(Checkpoints, "reached_preemption", lambda self, step: step == 3)
  assert int(programs.train(config, str(tmp_path / "parts"))["step"]) == 3
  monkeypatch.undo()
  resumed = programs.train(config, str(tmp_path / "parts"))
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(resumed), jax.device_get(uninterrupted))
  sharded = [jax.tree.map(lambda x: str(x.sharding.spec), resumed[name]) for name in ("params", "ema")]
  assert sharded[0] == sharded[1]
  assert any("fsdp" in spec for spec in jax.tree.leaves(sharded[1]))

  whole, parts = (small_world.metrics(tmp_path / name) for name in ("whole", "parts"))
  found = small_world.timeless(whole[-1] | {"compilations": 0})  # the resumed run shares the program
  assert small_world.timeless(parts[-1]) == found
  for output in ("logits", "logits_ema"):
    assert {f"test/{output}_{what}" for what in ("top1", "top5", "loss")} < whole[-1].keys()
  assert all(line.get("compilations", 1) == 1 for line in whole)


def test_a_label_that_is_no_class_stops_the_run(tmp_path):
  small_world.write_cifar10(tmp_path)
  path = tmp_path / "cifar10" / "arrays" / "train_labels.npy"
  labels = np.load(path)
  labels[7] = 12
  np.save(path, labels)
  with pytest.raises(ValueError, match=r"Example 7 of data set 'cifar10.*label 12.* 10 classes"):
    loop.train(tiny_config(tmp_path), str(tmp_path / "run"))


def test_a_data_set_without_classes_is_refused(world):
  with pytest.raises(ValueError, match=r"'cifar10' has no class names"):
    finetune.build(tiny_config(world), Run(1, 1.0, 16, None))


def test_weights_of_another_shape_name_both(world, student_weights):
  config = tiny_config(world)
  config.init_from.path = str(student_weights)
  config.model.update(width=32)
  with pytest.raises(ValueError, match=r"cls_token: \(24,\), the classifier wants \(32,\)"):
    make_task(config).pretrained(jax.random.key(0))
