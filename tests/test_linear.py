"""The closed-form probe against NumPy's least squares, and its choice of the ridge strength."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dtm_jax.evaluators import Context, linear
from dtm_jax.evaluators._unit_norm import unit_norm
from dtm_jax.training import mesh as meshes

SIZES = {"train": 60, "test": 37}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
  """Images of noise. The mean colour hints at the class."""
  rng = np.random.default_rng(0)
  folder = tmp_path_factory.mktemp("world")
  (folder / "cifar10" / "arrays").mkdir(parents=True)
  for split, size in SIZES.items():
    label = rng.integers(0, 3, size).astype(np.int32)
    image = rng.integers(0, 200, (size, 32, 32, 3))
    image[np.arange(size), :, :, label] += rng.integers(-8, 16, (size, 1, 1))
    np.save(folder / "cifar10" / "arrays" / f"{split}_images.npy", image.clip(0, 255).astype(np.uint8))
    np.save(folder / "cifar10" / "arrays" / f"{split}_labels.npy", label)
  return folder


@jax.jit
def colour(state, batch):
  return jnp.asarray(batch["image"], jnp.float32).mean((1, 2)) - 97.0


def run(world, mesh=None, **options):
  keywords = dict(
    dataset={"name": "cifar10", "data_dir": str(world)}, fit="train[:48]", held_out="train[48:]",
    image_size=32, batch_size=16,
  )  # fmt: skip
  context = Context({"student": colour}, mesh or meshes.make_mesh(8, 1))
  made = linear.Evaluator(context, **keywords | options)
  return dict(made.run({}))


def test_it_is_least_squares_and_every_image_counts_once(world):
  result = run(world, ridges=(0.0,))
  arrays = world / "cifar10" / "arrays"
  order = np.random.default_rng(0).permutation(60)  # a part of a split is a part of a fixed shuffle
  data = {name: np.load(arrays / f"{name}.npy") for name in ("train_images", "train_labels")}
  test = {name: np.load(arrays / f"{name}.npy") for name in ("test_images", "test_labels")}

  def inputs(image):
    x = unit_norm(image.astype(np.float64).mean((1, 2)) - 97.0)
    return np.concatenate([x, np.ones((len(x), 1))], axis=1)

  fit = order[:48]
  weights = np.linalg.lstsq(inputs(data["train_images"][fit]), np.eye(10)[data["train_labels"][fit]])[0]
  expected = np.mean((inputs(test["test_images"]) @ weights).argmax(1) == test["test_labels"])
  assert result["student_accuracy"] == expected
  assert (37 * result["student_accuracy"]) % 1 == pytest.approx(0, abs=1e-9)


def test_the_best_strength_on_the_held_out_images_is_chosen(world):
  ridges = (1e-6, 1e-2, 1e3)
  alone = [run(world, ridges=(ridge,)) for ridge in ridges]
  chosen = run(world, ridges=ridges)
  best = int(np.argmax([each["student_held_out_accuracy"] for each in alone]))
  assert chosen == alone[best]
  assert len({each["student_held_out_accuracy"] for each in alone}) > 1


def test_the_same_numbers_for_any_batch_size_and_number_of_devices(world):
  one = meshes.make_mesh(1, 1, devices=jax.devices()[:1])
  assert run(world) == run(world, one) == run(world, one, batch_size=7)
