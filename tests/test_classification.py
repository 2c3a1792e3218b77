"""The classification evaluator counts every image once, with any batch size and number of devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dtm_jax.evaluators import Context, classification
from dtm_jax.evaluators._label_rank import label_rank
from dtm_jax.training import mesh as meshes

RNG = np.random.default_rng(0)
NUM = 53


@pytest.fixture
def images(tmp_path):
  """Random images. The first ten pixels are the scores of the ten classes."""
  folder = tmp_path / "cifar10" / "arrays"
  folder.mkdir(parents=True)
  image = RNG.integers(0, 256, (NUM, 32, 32, 3), np.uint8)
  label = RNG.integers(0, 10, NUM).astype(np.int32)
  np.save(folder / "test_images.npy", image)
  np.save(folder / "test_labels.npy", label)
  return tmp_path, image[:, 0, :10, 0], label


def scores(state, batch):
  return batch["image"][:, 0, :10, 0].astype(jnp.float32) / 16


def evaluate(folder, mesh, **options):
  dataset = {"name": "cifar10", "data_dir": str(folder)}
  context = Context({"logits": scores, "logits_ema": scores}, mesh)
  evaluator = classification.Evaluator(context, dataset=dataset, image_size=32, crop_pct=1.0, **options)
  return dict(evaluator.run({}))


def expected(logits, label):
  logits = logits.astype(np.float64) / 16
  order = np.argsort(-logits, axis=1, kind="stable")
  log_softmax = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
  return {
    "top1": np.mean(order[:, 0] == label),
    "top5": np.mean(np.any(order[:, :5] == label[:, None], axis=1)),
    "loss": -np.mean(log_softmax[np.arange(NUM), label]),
  }


def test_the_same_numbers_for_any_batch_size_and_number_of_devices(images):
  folder, logits, label = images
  one = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("data", "fsdp"))
  results = [evaluate(folder, one, batch_size=5), evaluate(folder, one, batch_size=53)]
  results += [evaluate(folder, meshes.make_mesh(4, 2), batch_size=size) for size in (8, 16, 64)]
  for result in results:
    assert result == pytest.approx(expected(logits, label), abs=1e-12)
    assert (result["top1"], result["top5"]) == (results[0]["top1"], results[0]["top5"])


def test_numbers_of_several_outputs_start_with_their_names(images):
  result = evaluate(images[0], meshes.make_mesh(8, 1), outputs=("logits", "logits_ema"))
  assert result["logits_top1"] == result["logits_ema_top1"]
  assert len(result) == 6
  with pytest.raises(ValueError, match=r"'logit'.*logits, logits_ema"):
    evaluate(images[0], meshes.make_mesh(8, 1), outputs=("logit",))


def test_a_label_that_is_not_a_class_is_refused(images):
  folder, _, label = images
  label[41] = -1
  np.save(folder / "cifar10" / "arrays" / "test_labels.npy", label)
  with pytest.raises(ValueError, match=r"Example 41 of data set 'cifar10.* label -1.* 10 classes"):
    evaluate(folder, meshes.make_mesh(8, 1))


def test_the_rank_counts_higher_scores_and_earlier_equal_scores():
  logits = np.array([[0, 0, 0], [1, 2, 3], [3, 2, 1], [np.nan, np.nan, np.nan], [np.nan, 1, 0]], np.float32)
  label = np.array([1, 0, 0, 0, 1])
  np.testing.assert_array_equal(label_rank(logits, label), [1, 2, 0, 3, 1])


@pytest.mark.parametrize(
  ("image_size", "crop_pct", "resize"), [(224, None, 256), (384, None, 384), (32, 1.0, 32)]
)
def test_the_size_before_the_crop(images, image_size, crop_pct, resize):
  context = Context({"logits": scores}, meshes.make_mesh(8, 1))
  dataset = {"name": "cifar10", "data_dir": str(images[0])}
  evaluator = classification.Evaluator(context, dataset=dataset, image_size=image_size, crop_pct=crop_pct)
  assert evaluator._view["resize"] == resize
