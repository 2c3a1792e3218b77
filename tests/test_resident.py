"""A data set on the devices has the examples of the host's pipeline and its crops."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dtm_jax import data, rngs
from dtm_jax.data import device_views, resident, views
from dtm_jax.data.device_views import DeviceView, resize_box
from dtm_jax.data.resampling import resize
from dtm_jax.errors import OptionError
from dtm_jax.training import feeds

N = 23
LIMIT = 2**30


@pytest.fixture(scope="module")
def dataset():
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (N, 12, 12, 3), np.uint8)
  examples = [{"image": image, "label": k % 10, "name": str(k)} for k, image in enumerate(images)]
  return data.Dataset("random", N, tuple("abcdefghij"), examples, image_size=12)


def from_host(dataset, **options):
  return data.train_batches(dataset, image_size=12, num_threads=2, crop="none", **options)


def assert_same_examples(dataset, steps=7, **options):
  """N is no multiple of a batch, so epochs end inside of batches."""
  ours = resident.load(dataset, limit=LIMIT, num_threads=2).order.rows(**options)
  for host, rows in itertools.islice(zip(from_host(dataset, **options), ours, strict=False), steps):
    np.testing.assert_array_equal(host["index"], rows["index"])


@pytest.mark.parametrize("start", [0, 8, 19, 3 * N + 5], ids="start{}".format)
@pytest.mark.parametrize("batch_size", [4, 8])
def test_the_examples_are_those_of_the_host(dataset, batch_size, start):
  """This holds over the ends of epochs, after a resume in mid epoch, and with another batch size."""
  assert_same_examples(dataset, batch_size=batch_size, seed=3, start=start)


def test_two_processes_have_the_rows_of_one(dataset):
  options = {"batch_size": 8, "seed": 1, "process_count": 2}
  for index in range(2):
    assert_same_examples(dataset, process_index=index, **options)


def test_a_place_in_the_run_has_one_number(dataset):
  order = resident.load(dataset, limit=LIMIT, num_threads=2).order
  place = lambda batch, start, steps: np.concatenate(
    [rows["place"] for rows in itertools.islice(order.rows(batch_size=batch, seed=0, start=start), steps)]
  )
  np.testing.assert_array_equal(place(4, 0, 12), place(8, 0, 6))
  np.testing.assert_array_equal(place(4, 0, 12)[16:], place(8, 16, 4))
  assert place(4, 0, 12)[[0, N]].tolist() == [[0, 0], [1, 0]]


class Faulty(list):
  """A data set in which example 5 is missing."""

  def __getitem__(self, index):
    if index == 5:
      raise FileNotFoundError(2, "No such file", "five.png")
    return super().__getitem__(index)


@pytest.fixture
def faulty(dataset):
  """Examples 5 (missing), 6 and 7 (corrupt) cannot be used."""
  broken = {k: {"image": b"no image"} for k in (6, 7)}
  corrupt = [example | broken.get(k, {}) for k, example in enumerate(dataset.source)]
  return data.Dataset("faulty", N, dataset.class_names, Faulty(corrupt))


def test_unusable_images_are_replaced_as_on_the_host(faulty):
  loaded = resident.load(faulty, limit=LIMIT, num_threads=2)
  assert sorted(loaded.order.unusable) == [5, 6, 7]
  loaded.require_labels()
  before = data.corrupt_count()
  rows = list(itertools.islice(loaded.order.rows(batch_size=N, seed=0), 2))
  ours = data.corrupt_count() - before
  assert not {5, 6, 7} & set(np.concatenate([batch["index"] for batch in rows]).tolist())
  host = [next(from_host(faulty, batch_size=N, seed=0, start=start)) for start in (0, N)]
  np.testing.assert_array_equal([each["index"] for each in host], [each["index"] for each in rows])
  assert ours >= 6


def test_sets_that_do_not_fit_are_refused(dataset):
  with pytest.raises(OptionError, match=r"device_resident=True needs .* GiB .* 23 images of 12x12 pixels"):
    resident.load(dataset, limit=1000)
  other = {"image": np.zeros((8, 10, 3), np.uint8), "label": 0, "name": "small.png"}
  mixed = data.Dataset("mixed", N + 1, None, [*dataset.source, other])
  with pytest.raises(OptionError, match=r"images of 12x12 pixels, and small.png has 10x8"):
    resident.load(mixed, limit=LIMIT)
  broken = data.Dataset("broken", 1, None, [{"image": b"no image", "label": 0, "name": "x"}])
  with pytest.raises(OptionError, match="None of the 1 images"):
    resident.load(broken, limit=LIMIT)


def test_images_without_a_class_are_refused_if_labels_are_needed(dataset):
  unlabelled = [example | {"label": -1 if k == 4 else 0} for k, example in enumerate(dataset.source)]
  loaded = resident.load(data.Dataset("unlabelled", N, ("a",), unlabelled), limit=LIMIT)
  with pytest.raises(OptionError, match="Example 4 of data set 'unlabelled' has label -1"):
    loaded.require_labels()


# Crops ---------------------------------------------------------------------------------------------------


def photo(height, width):
  """Return smooth structure with edges and noise, as photos have."""
  rng = np.random.default_rng(1)
  y, x = np.mgrid[:height, :width]
  smooth = 128 + 100 * np.sin(x / 5)[..., None] * np.cos(y / 7)[..., None] * np.array([1, 0.5, -1])
  smooth[height // 3 : height // 2, width // 4 : width // 2] = (255, 0, 10)
  return np.clip(smooth + rng.normal(0, 20, smooth.shape), 0, 255).astype(np.uint8)


BOXES = [(0, 0, 32, 40), (3, 5, 20, 17), (10, 30, 22, 10), (31, 39, 1, 1), (0, 7, 9, 30), (4, 4, 24, 24)]


@pytest.mark.parametrize("antialias", [False, True], ids=["opencv", "pillow"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "area", "lanczos"])
def test_a_resized_box_equals_the_hosts(interpolation, antialias):
  """At most one grey level differs: libraries round their weights, and both sides round the result once."""
  if interpolation not in device_views.INTERPOLATIONS[antialias]:
    pytest.skip("is refused")
  image = photo(32, 40)
  ours = jax.jit(functools.partial(resize_box, size=24, interpolation=interpolation, antialias=antialias))
  for box in BOXES:
    expected = resize(image, (24, 24), interpolation, antialias, box).astype(int)
    found = np.asarray(ours(image, tuple(map(jnp.int32, box)))).astype(int)
    difference = np.abs(found - expected)
    assert difference.max() <= 1, (box, difference.max())
    assert (difference > 0).mean() < 0.25
  np.testing.assert_array_equal(ours(image, tuple(map(jnp.int32, BOXES[-1]))), image[4:28, 4:28])


@pytest.mark.parametrize("shape", [(32, 32), (20, 60), (60, 20)], ids=str)
def test_boxes_are_distributed_as_the_hosts(shape):
  """The quantiles of 2,000 boxes agree, also where no box fits and the centre is taken."""
  options = (0.3, 0.9), (0.6, 1.2)
  rng, keys = np.random.default_rng(0), jax.random.split(jax.random.key(0), 2000)
  host = np.array([views.random_resized_box(rng, *shape, *options) for _ in range(2000)]).T
  draw = lambda key: device_views.random_resized_box(key, *shape, *options)
  ours = np.array(jax.jit(jax.vmap(draw))(keys))
  for top, left, h, w in (ours, host):
    assert ((top >= 0) & (left >= 0) & (top + h <= shape[0]) & (left + w <= shape[1])).all()
  for side, length in zip(range(4), (*shape, *shape), strict=True):
    quantiles = [np.quantile(each[side], np.linspace(0.05, 0.95, 10)) for each in (ours, host)]
    np.testing.assert_allclose(*quantiles, atol=0.06 * length)


def test_pad_crops_a_shifted_image_and_none_keeps_it():
  image = photo(16, 16)
  keys = jax.random.split(jax.random.key(0), 200)
  images = np.asarray(jax.jit(jax.vmap(DeviceView(16, "pad", padding=2), (0, None)))(keys, image))
  padded = np.pad(image, ((2, 2), (2, 2), (0, 0)))
  allowed = {padded[i : i + 16, j : j + 16].tobytes() for i in range(5) for j in range(5)}
  assert {each.tobytes() for each in images} == allowed
  np.testing.assert_array_equal(DeviceView(16, "none")(keys[0], jnp.asarray(image)), image)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"crop": "joint"}, "joint"),
    ({"interpolation": "area"}, "bicubic, bilinear, lanczos"),
    ({"rand_augment": "rand-m9-mstd0.5-inc1"}, "rand_augment=rand-m9"),
  ],
)
def test_other_views_are_refused(options, message):
  with pytest.raises(OptionError, match=message):
    DeviceView(8, **options)


def test_a_row_has_the_same_view_in_every_batch():
  """It depends on (seed, place), so that runs with other batch sizes and calls see the same images."""
  view, key = DeviceView(8), jax.random.key(0)
  images = np.random.default_rng(0).integers(0, 256, (6, 10, 10, 3), np.uint8)
  arrays = {"image": jnp.asarray(images), "label": jnp.arange(6)}
  rows = {"index": np.arange(4, dtype=np.int32), "place": np.array([[0, k] for k in range(4)], np.uint32)}
  prepare = jax.jit(functools.partial(feeds.view_rows, view))
  whole = prepare(arrays, rows, key)
  part = prepare(arrays, {name: each[2:] for name, each in rows.items()}, key)
  np.testing.assert_array_equal(whole["image"][2:], part["image"])
  np.testing.assert_array_equal(whole["label"], rows["index"])
  places = rows["place"] + np.array([1, 0], np.uint32)
  later = prepare(arrays, rows | {"place": places}, key)
  assert (np.asarray(whole["image"]) != np.asarray(later["image"])).any(axis=(1, 2, 3)).all()
  key = jax.random.fold_in(jax.random.fold_in(rngs.stream(key, "view"), 1), 2)
  expected = jax.jit(view)(key, arrays["image"][2])
  np.testing.assert_array_equal(later["image"][2], expected)
