"""The segmentation evaluator: sliding windows, scores, and counts of pixels that are known exactly."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_world

from dtm_jax.data.label_maps import IGNORE
from dtm_jax.datasets import shapes
from dtm_jax.evaluators import Context, segmentation
from dtm_jax.evaluators._confusion_matrix import confusion_matrix, segmentation_scores
from dtm_jax.evaluators._sliding_windows import SlidingWindows
from dtm_jax.training import mesh as meshes


class TestWindows:
  def test_windows_cover_the_image_as_mmseg_places_them(self):
    image = np.zeros((100, 230, 3), np.uint8)
    windows, layout = SlidingWindows(shorter=50, crop=50, stride=33).cut(image)
    assert layout.size == (50, 115)
    assert layout.starts == ((0,), (0, 33, 65))
    assert [square.shape for square in windows] == [(50, 50, 3)] * 3

  def test_an_image_within_the_crop_is_one_window_with_grey_around(self):
    windows, layout = SlidingWindows(shorter=8, longer=12, crop=12, stride=8).cut(
      np.zeros((4, 8, 3), np.uint8)
    )
    assert (layout.size, layout.starts) == ((6, 12), ((0,), (0,)))
    assert (windows[0][6:] == (124, 116, 104)).all()
    assert not windows[0][:6].any()

  def test_gaps_between_windows_are_refused(self):
    with pytest.raises(ValueError, match=r"stride=9.*crop=8"):
      SlidingWindows(shorter=8, crop=8, stride=9)

  @pytest.mark.parametrize("shape", [(40, 70), (33, 20), (16, 16), (90, 31)])
  def test_scores_are_put_together_as_pytorch_does(self, shape):
    """PyTorch upsamples each window, adds it to a canvas, divides by the counts, and resizes the canvas."""
    torch = pytest.importorskip("torch")
    resize = lambda x, size: torch.nn.functional.interpolate(x, size, mode="bilinear", align_corners=False)
    rng = np.random.default_rng(0)
    windows, layout = SlidingWindows(shorter=24, crop=24, stride=10).cut(np.zeros((*shape, 3), np.uint8))
    logits = [rng.normal(size=(6, 6, 5)).astype(np.float32) for _ in windows]
    canvas, count = torch.zeros(1, 5, *layout.size), torch.zeros(1, 1, *layout.size)
    places = [(y, x) for y in layout.starts[0] for x in layout.starts[1]]
    for (y, x), each in zip(places, logits, strict=True):
      up = resize(torch.from_numpy(each.transpose(2, 0, 1))[None], (24, 24))
      height, width = min(24, layout.size[0] - y), min(24, layout.size[1] - x)
      canvas[:, :, y : y + height, x : x + width] += up[:, :, :height, :width]
      count[:, :, y : y + height, x : x + width] += 1
    expected = resize(canvas / count, shape)[0].argmax(0).numpy()
    assert count.min() == 1
    assert np.mean(layout.classes(logits) == expected) > 0.999  # the rest are near ties

  def test_scores_of_nan_are_refused(self):
    _, layout = SlidingWindows(shorter=8, crop=8, stride=8).cut(np.zeros((8, 8, 3), np.uint8))
    with pytest.raises(FloatingPointError):
      layout.classes([np.full((2, 2, 3), np.nan, np.float32)])


class TestScores:
  def test_scores_by_hand(self):
    label = np.array([[0, 0, 1, IGNORE], [1, 1, 2, IGNORE]], np.uint8)
    predicted = np.array([[0, 1, 1, 0], [1, 0, 2, 3]])
    confusion = confusion_matrix(label, predicted, 5)
    assert confusion[:3, :3].tolist() == [[1, 1, 0], [1, 2, 0], [0, 0, 1]]
    assert confusion.sum() == 6
    scores = segmentation_scores(confusion)  # classes 3 and 4 occur nowhere
    assert scores["miou"] == pytest.approx((1 / 3 + 2 / 4 + 1) / 3)
    assert scores["pixel_accuracy"] == 4 / 6
    assert scores["mean_accuracy"] == pytest.approx((1 / 2 + 2 / 3 + 1) / 3)

  def test_a_class_that_is_only_predicted_counts_as_wrong(self):
    confusion = confusion_matrix(np.zeros((1, 4), np.uint8), np.array([[0, 0, 0, 1]]), 3)
    scores = segmentation_scores(confusion)
    assert scores == {"miou": (3 / 4 + 0) / 2, "pixel_accuracy": 3 / 4, "mean_accuracy": 3 / 4}

  def test_without_a_labelled_pixel_there_is_no_score(self):
    with pytest.raises(ValueError, match="No pixel of the data set has a label"):
      segmentation_scores(np.zeros((3, 3), np.int64))


def red_and_green(state, batch):
  """Return scores that depend only on the colours of each pixel, so they are the same in every window."""
  pixel = batch["image"].astype(jnp.float32)
  return jnp.stack([pixel[..., 0], pixel[..., 1], pixel[..., 2], jnp.full(pixel.shape[:3], 120.0)], axis=-1)


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("windows", [1, 3])
def test_every_labelled_pixel_counts_once(devices, windows):
  """Images keep their size, so nothing is interpolated and the answer is known for each pixel."""
  options = dict(name="shapes", side=32, num_examples=11, border=3)
  mesh = meshes.make_mesh(devices=jax.devices()[:devices])
  dataset = shapes.build("val", side=32, num_examples=11, border=3)
  expected = np.zeros((4, 4), np.int64)
  examples = [dataset.source[i] for i in range(11)]
  for example in examples:
    scores = np.concatenate([example["image"], np.full((*example["map"].shape, 1), 120)], axis=2)
    valid = example["map"] != IGNORE
    np.add.at(expected, (example["map"][valid], scores.argmax(2)[valid]), 1)
  fresh = lambda state, batch: red_and_green(state, batch)  # a new function has a new cache of compilations
  jitted = jax.jit(fresh, out_shardings=meshes.replicated(mesh))
  context = Context({"logits": jitted}, mesh)
  evaluator = segmentation.Evaluator(context, dataset=options, image_size=24, stride=10, windows=windows)
  evaluator._windows = OwnSize(shorter=24, crop=24, stride=10)
  scores = dict(evaluator.run({}))
  assert scores == segmentation_scores(expected)
  assert scores["pixel_accuracy"] == expected.trace() / sum((e["map"] != IGNORE).sum() for e in examples)
  assert jitted._cache_size() == 1


class OwnSize(SlidingWindows):
  """Windows of images at their original size."""

  def cut(self, image):
    own = SlidingWindows(min(image.shape[:2]), self.crop, self.stride)
    return own.cut(image)


def test_a_model_with_other_classes_names_both_numbers():
  mesh = meshes.make_mesh(devices=jax.devices()[:1])
  context = Context({"logits": lambda state, batch: jnp.zeros((1, 2, 2, 7))}, mesh)
  evaluator = segmentation.Evaluator(context, dataset=dict(name="shapes"), image_size=32)
  with pytest.raises(ValueError, match=r"scores 7 classes, data set 'shapes/val' has 4"):
    dict(evaluator.run({}))


def test_counts_beyond_32_bits_survive_the_way_between_processes(monkeypatch):
  counts = np.array([[2**40 + 3, 5], [2**33, 0]], np.int64)
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  monkeypatch.setattr(
    segmentation.multihost_utils, "process_allgather", lambda x: np.asarray(jnp.stack([jnp.asarray(x)] * 2))
  )
  np.testing.assert_array_equal(segmentation._sum_over_processes(counts), 2 * counts)


def test_a_data_set_without_label_maps_is_refused(tmp_path):
  small_world.write_cifar10(tmp_path)
  context = Context({"logits": lambda state, batch: None}, meshes.make_mesh(devices=jax.devices()[:1]))
  with pytest.raises(ValueError, match="'cifar10' has no label maps"):
    segmentation.Evaluator(
      context, dataset=dict(name="cifar10", data_dir=str(tmp_path)), split="test", image_size=32
    )
