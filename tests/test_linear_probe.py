"""The linear probe: parts of splits, independent heads, and a choice that does not see the test set."""

import importlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_world
from safetensors.numpy import load_file, save_file

from dtm_jax import loop, plugins
from dtm_jax.checkpoints.manager import Checkpoints
from dtm_jax.errors import UserError
from dtm_jax.evaluators import Context, best_head
from dtm_jax.tasks import Run, linear_probe
from dtm_jax.teachers import clip as clip_teacher
from dtm_jax.training import mesh as meshes

NAMES = tuple("abcdefghij")


def probe_config(world, rates=(0.1, 1.0, 10.0)):
  config = importlib.import_module("configs.linear_probe_cifar10").get_config()
  config.data.dataset.data_dir = config.evals.test.dataset.data_dir = str(world)
  config.teacher = dict(name="clip", path=str(world / "clip"))
  config.probe.rates = rates
  config.batch_size, config.total_steps = 16, 6
  config.log.log_steps = 2
  return config


# Parts of splits -----------------------------------------------------------------------------------------


def test_parts_are_disjoint_and_together_the_split(world):
  parts = [
    plugins.build("datasets", {"name": "cifar10", "data_dir": str(world)}, split=split)
    for split in ("train", "train[:90%]", "train[90%:]", "train[-8:]")
  ]
  whole, most, rest, last = (
    {dataset.source[i]["image"].tobytes() for i in range(dataset.num_examples)} for dataset in parts
  )
  assert [d.num_examples for d in parts] == [80, 72, 8, 8]
  assert most | rest == whole
  assert not most & rest
  assert last == rest
  assert [d.class_names for d in parts[1:]] == [parts[0].class_names] * 3


def test_a_part_is_of_every_class_though_files_lie_class_by_class(tmp_path):
  for name in "abc":
    (tmp_path / "train" / name).mkdir(parents=True)
    for index in range(40):
      (tmp_path / "train" / name / f"{index}.jpg").write_bytes(b"")
  dataset = plugins.build("datasets", {"name": "folder", "data_dir": str(tmp_path)}, split="train[75%:]")
  labels = [dataset.source[i]["label"] for i in range(dataset.num_examples)]
  assert len(labels) == 30
  assert min(np.bincount(labels, minlength=3)) > 3


@pytest.mark.parametrize(
  ("split", "message"),
  [
    ("train[90:", r"'train\[90:': a part is written \[from:to\]"),
    ("train[0.5:]", "a part is written"),
    ("train[90%:80%]", r"'train\[90%:80%\]' is empty: from 72 to 64 of 80 examples"),
    ("valid[:50%]", "Unknown split of cifar10 'valid'"),
  ],
)
def test_what_is_no_part_is_refused(world, split, message):
  with pytest.raises(ValueError, match=message):
    plugins.build("datasets", {"name": "cifar10", "data_dir": str(world)}, split=split)


# Heads -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def batches():
  rng = np.random.default_rng(1)
  return [
    {"image": rng.integers(0, 256, (16, 32, 32, 3), np.uint8), "label": rng.integers(0, 10, 16, np.int32)}
    for _ in range(3)
  ]


def trained(world, batches, *rates):
  """Return the task and its state after these batches, without flips."""
  config = probe_config(world, *rates)
  config.augment.flip = 0.0
  task = linear_probe.build(config, Run(config.total_steps, 5.0, 16, NAMES))
  state = jax.jit(task.init)(jax.random.key(0))
  step = jax.jit(task.train_step)
  for batch in batches:
    state, _ = step(state, task.frozen, batch, jax.random.key(0))
  return task, state


@pytest.fixture(scope="module")
def three_heads(world, batches):
  return trained(world, batches)


def test_heads_do_not_know_each_other_and_follow_momentum(world, batches, three_heads):
  """A head equals NumPy's softmax regression with momentum, and each head equals a probe of it alone."""
  _, state = three_heads
  teacher = clip_teacher.build(str(world / "clip"))
  teach = jax.jit(lambda image: teacher.apply(teacher.params, image))
  kernel, bias, momentum = np.zeros((teacher.width, 10)), np.zeros(10), [0.0, 0.0]
  for index, batch in enumerate(batches):
    image = (batch["image"] / np.float32(255) - np.float32(teacher.mean)) / np.float32(teacher.std)
    feature = np.asarray(teach(jnp.asarray(image)), np.float64).mean(axis=1)
    feature = (feature - feature.mean(0)) / np.sqrt(feature.var(0) + 1e-6)
    scores = feature @ kernel + bias
    error = np.exp(scores) / np.exp(scores).sum(1, keepdims=True) - np.eye(10)[batch["label"]]
    momentum = [0.9 * momentum[0] + feature.T @ error / 16, 0.9 * momentum[1] + error.mean(0)]
    rate = 0.1 * (16 / 256) * np.cos(np.pi * index / 12) ** 2  # the middle head's factor is 1
    kernel, bias = kernel - rate * momentum[0], bias - rate * momentum[1]
  np.testing.assert_allclose(state["params"]["kernel"][1], kernel, atol=1e-5)
  np.testing.assert_allclose(state["params"]["bias"][1], bias, atol=1e-5)
  for index, rate in enumerate(probe_config(world).probe.rates):
    _, alone = trained(world, batches, (rate,))
    for name in ("kernel", "bias"):
      np.testing.assert_allclose(alone["params"][name][0], state["params"][name][index], rtol=1e-5, atol=1e-6)


def test_evaluation_uses_the_running_statistics(batches, three_heads):
  task, state = three_heads
  one = {"image": batches[0]["image"][:1]}
  alone = jax.jit(task.outputs["logits"])(state, task.frozen, one)
  together = jax.jit(task.outputs["logits"])(state, task.frozen, batches[0])[:1]
  np.testing.assert_allclose(alone, together, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (lambda config: config.probe.update(rates=()), r"probe.rates=\(\) names no learning rate"),
    (lambda config: config.optim.update(weight_decay=0.1), r"no weight_decay \(0.1\)"),
  ],
)
def test_senseless_options_are_refused(world, change, message):
  config = probe_config(world)
  change(config)
  with pytest.raises(ValueError, match=message):
    linear_probe.build(config, Run(6, 5.0, 16, NAMES))


# The choice ---------------------------------------------------------------------------------------


def test_the_test_set_has_no_part_in_the_choice(world):
  """Head h always answers class h. The most frequent held-out class wins, whatever the test labels are."""
  predict = {
    "logits": lambda state, batch: np.broadcast_to(np.eye(3, 10), (len(batch["image"]), 3, 10)),
    "rates": lambda state, batch: np.array([0.1, 1.0, 10.0]),
  }
  options = dict(held_out="train[90%:]", image_size=32, crop_pct=1.0, batch_size=16)
  dataset = {"name": "cifar10", "data_dir": str(world)}
  evaluator = best_head.Evaluator(Context(predict, meshes.make_mesh(8, 1)), dataset=dataset, **options)
  part = plugins.build("datasets", dataset, split="train[90%:]").source
  counts = np.bincount([part[i]["label"] for i in range(len(part))], minlength=10)[:3]
  results = dict(evaluator.run({}))
  best = int(counts.argmax())
  assert results["learning_rate"] == [0.1, 1.0, 10.0][best]
  assert results["held_out_accuracy"] == counts[best] / 8
  assert results["accuracy"] == [4, 4, 3][best] / 32  # labels of the test images are 0..9 round and round

  class Changed:
    """The test set with the class of another head as the label of every image."""

    def __len__(self):
      return 32

    def __getitem__(self, index):
      return {"image": np.zeros((32, 32, 3), np.uint8), "label": (best + 1) % 3, "name": "changed"}

  object.__setattr__(evaluator._test, "source", Changed())
  changed = dict(evaluator.run({}))
  assert changed["learning_rate"] == results["learning_rate"]
  assert changed["accuracy"] == 0.0


@pytest.mark.usefixtures("one_device")
def test_a_run_stops_and_resumes_to_the_bit(world, programs, tmp_path, monkeypatch):
  config = probe_config(world)
  whole = programs.train(config, str(tmp_path / "whole"))
  with monkeypatch.context() as patch:
    patch.setattr(Checkpoints, "reached_preemption", lambda self, step: step == 3)
    programs.train(config, str(tmp_path / "stopped"))
  resumed = programs.train(config, str(tmp_path / "stopped"))
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(whole), jax.device_get(resumed))
  line = small_world.metrics(tmp_path / "stopped")[-1]
  assert {"test/learning_rate", "test/held_out_accuracy", "test/accuracy"} <= line.keys()


@pytest.mark.usefixtures("one_device")
def test_another_teacher_of_the_same_width_in_the_same_workdir_is_refused(world, programs, tmp_path):
  """The run would train nothing and report the heads of one teacher on the features of the other."""
  config = probe_config(world)
  programs.train(config, str(tmp_path / "run"))
  before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
  shutil.copytree(world / "clip", tmp_path / "moved")
  config.teacher.path = str(tmp_path / "moved")
  loop.train(config, str(tmp_path / "run"))  # the same weights in another place
  other = load_file(world / "clip" / "model.safetensors")
  save_file({name: tensor + 1 for name, tensor in other.items()}, tmp_path / "moved" / "model.safetensors")
  with pytest.raises(UserError, match=r"teacher.path: .*/clip' -> .*/moved' \(other weights(.|\n)*--workdir"):
    loop.train(config, str(tmp_path / "run"))
  assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before
