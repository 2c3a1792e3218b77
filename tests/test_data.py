"""The stream of batches: a function of (seed, step), whole, seekable, and robust to bad files."""

import collections
import io
import itertools
import logging as std_logging

import cv2
import numpy as np
import pytest
import scipy.stats
import simplejpeg
from PIL import Image

from dtm_jax import data
from dtm_jax.data import image_decoding, views


class Images:
  """Numbered images of noise, the number in the label; some of them corrupt."""

  def __init__(self, count: int, corrupt: tuple[int, ...] = (), shape=(12, 15, 3)):
    pixels = np.random.default_rng(0).integers(0, 256, (count, *shape)).astype(np.uint8)
    self.encoded = [simplejpeg.encode_jpeg(image, 95) for image in pixels]
    for index in corrupt:
      self.encoded[index] = self.encoded[index][: len(self.encoded[index]) // 2]

  def __len__(self):
    return len(self.encoded)

  def __getitem__(self, index):
    return {"image": self.encoded[index], "label": index, "name": f"photo {index}"}


class StreamedImages(Images):
  """The same, readable in sequence only."""

  def _part(self, process_index, process_count):
    return np.array_split(np.arange(len(self)), process_count)[process_index]

  def num_local(self, process_index, process_count):
    return len(self._part(process_index, process_count))

  def read(self, process_index, process_count, seed, skip):
    part = self._part(process_index, process_count)
    if seed is not None:
      part = np.random.default_rng(seed).permutation(part)
    for index in part[skip:].tolist():
      yield {**self[index], "index": index}


def _dataset(count=23, kind=Images, **kwargs):
  return data.Dataset("numbers", count, None, kind(count, **kwargs))


def _train(dataset, steps, process=(0, 1), **kwargs):
  options = {"batch_size": 8, "image_size": 8, "seed": 5, "num_threads": 2} | kwargs
  batches = data.train_batches(dataset, process_index=process[0], process_count=process[1], **options)
  return list(itertools.islice(batches, steps))


def _eval(dataset, process=(0, 1), **kwargs):
  options = {"batch_size": 8, "image_size": 8, "num_threads": 2} | kwargs
  return list(data.eval_batches(dataset, process_index=process[0], process_count=process[1], **options))


def _assert_same(batches, others):
  for batch, other in zip(batches, others, strict=True):
    assert batch.keys() == other.keys()
    for name, value in batch.items():
      np.testing.assert_array_equal(value, other[name])


def _indices(batches):
  return np.concatenate([batch["index"] for batch in batches]).tolist()


def test_a_batch_has_the_agreed_arrays():
  (batch,) = _train(_dataset(), 1)
  assert {name: (value.dtype, value.shape) for name, value in batch.items()} == {
    "image": (np.uint8, (8, 8, 8, 3)),
    "label": (np.int32, (8,)),
    "index": (np.int64, (8,)),
  }
  np.testing.assert_array_equal(batch["label"], batch["index"])


@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("batch_size", [8, 72])  # within one chunk of work, and several of unequal size
def test_processes_see_together_what_one_sees(processes, batch_size):
  whole = _train(_dataset(), 5, batch_size=batch_size)
  parts = [_train(_dataset(), 5, (p, processes), batch_size=batch_size) for p in range(processes)]
  joined = [
    {k: np.concatenate([part[k] for part in step]) for k in step[0]} for step in zip(*parts, strict=True)
  ]
  _assert_same(joined, whole)


@pytest.mark.parametrize("kind", [Images, StreamedImages])
def test_a_stream_from_step_7_is_the_stream_without_its_first_7(kind):
  dataset = _dataset(kind=kind)
  _assert_same(_train(dataset, 4, start=7 * 8), _train(dataset, 11)[7:])


@pytest.mark.parametrize("num_threads", [1, 7])
def test_threads_do_not_change_the_stream(num_threads):
  _assert_same(_train(_dataset(), 6, num_threads=num_threads, prefetch=1), _train(_dataset(), 6))


def test_the_seed_changes_order_and_crops():
  first, second = (_train(_dataset(), 3, seed=seed, batch_size=23) for seed in (5, 6))
  assert _indices(first) != _indices(second)
  place = [batch[0]["index"].tolist().index(4) for batch in (first, second)]
  assert not np.array_equal(first[0]["image"][place[0]], second[0]["image"][place[1]])


@pytest.mark.parametrize("kind", [Images, StreamedImages])
def test_every_example_once_an_epoch_in_an_order_of_its_own(kind):
  order = _indices(_train(_dataset(kind=kind), 23, batch_size=8))  # 8 epochs of 23, which 8 does not divide
  epochs = [tuple(order[first : first + 23]) for first in range(0, 184, 23)]
  assert all(sorted(epoch) == list(range(23)) for epoch in epochs)
  assert len(set(epochs)) == 8


@pytest.mark.parametrize("kind", [Images, StreamedImages])
@pytest.mark.parametrize("processes", [1, 2, 4])
@pytest.mark.parametrize("count", [1, 16, 23])
def test_evaluation_sees_every_example_once(kind, processes, count):
  parts = [_eval(_dataset(count, kind=kind), (p, processes)) for p in range(processes)]
  assert {len(part) for part in parts} == {-(-count // 8)}
  seen = []
  for batch in itertools.chain(*parts):
    assert batch["image"].shape == (8 // processes, 8, 8, 3)
    np.testing.assert_array_equal(batch["label"], batch["index"])
    np.testing.assert_array_equal(batch["index"] >= 0, batch["valid"])
    seen += batch["index"][batch["valid"]].tolist()
  assert sorted(seen) == list(range(count))


@pytest.mark.parametrize("kind", [Images, StreamedImages])
def test_a_corrupt_image_is_replaced_named_and_counted(kind, caplog):
  dataset, before = _dataset(kind=kind, corrupt=(3, 11)), data.corrupt_count()
  with caplog.at_level(std_logging.WARNING):
    batches = _train(dataset, 3, batch_size=23, prefetch=1)
  order = [batch["index"].tolist() for batch in batches]
  assert [len(step) for step in order] == [23] * 3
  assert not {3, 11} & set(_indices(batches))
  assert data.corrupt_count() - before >= 6
  assert "photo 3" in caplog.text
  assert "photo 11" in caplog.text
  _assert_same(batches, _train(dataset, 3, batch_size=23))  # the replacements too are a function of the seed


def test_only_corrupt_images_end_the_stream_with_their_names():
  dataset = _dataset(3, corrupt=(0, 1, 2))
  with pytest.raises(image_decoding.CorruptImageError, match="photo"):
    _train(dataset, 1)


def test_in_evaluation_a_corrupt_image_is_marked_and_named(caplog):
  with caplog.at_level(std_logging.WARNING):
    (batch,) = _eval(_dataset(8, corrupt=(3,)))
  assert batch["index"].tolist() == list(range(8))
  assert batch["valid"].tolist() == [index != 3 for index in range(8)]
  assert "photo 3" in caplog.text


def test_an_error_of_the_source_is_not_taken_for_a_corrupt_image():
  class Missing(Images):
    def __getitem__(self, index):
      raise FileNotFoundError("gone")

  with pytest.raises(FileNotFoundError, match="gone"):
    _train(_dataset(kind=Missing), 1)


def test_errors_name_the_numbers_and_the_choices():
  with pytest.raises(ValueError, match=r"batch_size=9.*2 processes"):
    _train(_dataset(), 1, (0, 2), batch_size=9)
  with pytest.raises(ValueError, match="'numbers' is empty"):
    _train(data.Dataset("numbers", 0, None, Images(0)), 1)
  with pytest.raises(ValueError, match=r"crop 'middle'.*random_resized, pad, none"):
    _train(_dataset(), 1, crop="middle")
  with pytest.raises(ValueError, match=r"interpolation 'sinc'.*bicubic"):
    _eval(_dataset(), interpolation="sinc")
  with pytest.raises(ValueError, match=r"resize=6.*image_size=8"):
    _eval(_dataset(), resize=6)


def _encode(image: Image.Image, kind: str) -> bytes:
  file = io.BytesIO()
  image.save(file, kind)
  return file.getvalue()


def _photo(height=90, width=120) -> np.ndarray:
  noise = np.random.default_rng(0).integers(0, 256, (height // 10, width // 10, 3)).astype(np.uint8)
  return cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC)


@pytest.mark.parametrize(("mode", "tolerance"), [("RGB", 0.1), ("L", 0.1), ("CMYK", 1.1)])
def test_jpeg_of_every_colour_space_is_read_as_pillow_reads_it(mode, tolerance):
  encoded = _encode(Image.fromarray(_photo()).convert(mode), "JPEG")
  expected = np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB"), np.int32)
  got = image_decoding.decode(encoded)
  assert got.dtype == np.uint8
  assert np.abs(got - expected).mean() < tolerance
  assert np.abs(got - expected).max() <= 4


@pytest.mark.parametrize("kind", ["PNG", "BMP", "WEBP", "TIFF", "PPM"])
def test_other_formats(kind):
  encoded = _encode(Image.fromarray(_photo()), kind)
  expected = np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB"))
  np.testing.assert_array_equal(image_decoding.decode(encoded), expected)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_cut_file_is_corrupt_and_so_is_text(kind):
  encoded = _encode(Image.fromarray(_photo()), kind)
  for bad in (encoded[: len(encoded) // 2], b"", b"no image", encoded[:2]):
    with pytest.raises(image_decoding.CorruptImageError):
      image_decoding.decode(bad)


def test_boxes_have_the_stated_areas_aspects_and_places():
  rng, scale, ratio = np.random.default_rng(0), (0.1, 0.4), (3 / 4, 4 / 3)
  height, width = 700, 900  # every box of these scales fits, so none is rejected
  boxes = np.array([views.random_resized_box(rng, height, width, scale, ratio) for _ in range(4000)])
  top, left, h, w = boxes.T
  uniform = {
    "area": (h * w / (height * width) - scale[0]) / (scale[1] - scale[0]),
    "aspect": (np.log(w / h) - np.log(ratio[0])) / np.log(ratio[1] / ratio[0]),
    "top": (top + 0.5) / (height - h + 1),
    "left": (left + 0.5) / (width - w + 1),
  }
  for name, values in uniform.items():
    assert scipy.stats.kstest(values, "uniform").pvalue > 1e-3, name
  assert np.abs(np.corrcoef(list(uniform.values())) - np.eye(4)).max() < 0.07


@pytest.mark.parametrize(("shape", "box"), [((30, 300), (0, 130, 30, 40)), ((300, 30), (130, 0, 40, 30))])
def test_where_no_box_fits_the_centre_is_taken_within_the_aspects(shape, box):
  rng = np.random.default_rng(0)
  assert views.random_resized_box(rng, *shape, (1.0, 1.0), (3 / 4, 4 / 3)) == box


@pytest.mark.parametrize("antialias", [False, True])
def test_a_view_is_its_box_resized(antialias):
  image, seed = _photo(), 3
  view = views.TrainView(32, scale=(0.3, 0.9), antialias=antialias)
  box = views.random_resized_box(np.random.default_rng(seed), 90, 120, view.scale, view.ratio)
  top, left, h, w = box
  pixels = Image.fromarray(image).crop((left, top, left + w, top + h))
  expected = np.asarray(pixels.resize((32, 32), Image.Resampling.BICUBIC), np.int32)
  difference = np.abs(view(image, np.random.default_rng(seed)) - expected)
  assert difference.mean() < (1.0 if antialias else 4.0)
  assert not antialias or difference.max() == 0


def test_padded_crops_are_every_shift_of_the_image():
  image = np.arange(1, 4 * 4 * 3 + 1, dtype=np.uint8).reshape(4, 4, 3)
  rng, view = np.random.default_rng(0), views.TrainView(4, crop="pad", padding=2)
  padded = np.pad(image, ((2, 2), (2, 2), (0, 0)))
  shifts = {padded[y : y + 4, x : x + 4].tobytes(): (y, x) for y in range(5) for x in range(5)}
  seen = collections.Counter(shifts[view(image, rng).tobytes()] for _ in range(500))
  assert len(seen) == 25
  assert views.TrainView(4, crop="pad", padding=0)(image, rng).tobytes() == image.tobytes()


def test_no_crop_keeps_an_image_of_the_right_size():
  image = _photo(32, 32)
  np.testing.assert_array_equal(views.TrainView(32, crop="none")(image, np.random.default_rng(0)), image)
  np.testing.assert_array_equal(views.EvalView(32)(image), image)


@pytest.mark.parametrize("shape", [(90, 120), (120, 90), (64, 64), (20, 31)])
def test_the_view_of_evaluation_is_the_centre_after_the_shorter_side_is_resized(shape):
  image = _photo(*shape)
  factor = 40 / min(shape)
  size = int(shape[0] * factor), int(shape[1] * factor)
  resized = np.asarray(Image.fromarray(image).resize(size[::-1], Image.Resampling.BICUBIC))
  top, left = round((size[0] - 32) / 2), round((size[1] - 32) / 2)
  expected = resized[top : top + 32, left : left + 32]
  np.testing.assert_array_equal(views.EvalView(32, resize=40)(image), expected)


def _recording(kind, count):
  """A dataset, and the set of the examples that were opened."""
  opened = set()

  class Recording(kind):
    def __getitem__(self, index):
      opened.add(index)
      return super().__getitem__(index)

  return _dataset(count, kind=Recording), opened


@pytest.mark.parametrize("kind", [Images, StreamedImages])
@pytest.mark.parametrize("start", [0, 5 * 8])
def test_a_process_opens_its_own_examples_alone(kind, start):
  """Also after a resume, and with all that it reads ahead; 400 are an epoch that is not left here."""
  parts = []
  for process in range(2):
    dataset, opened = _recording(kind, 400)
    batches = _train(dataset, 3, (process, 2), start=start, prefetch=1)
    assert set(_indices(batches)) <= opened
    assert len(opened) < 200
    parts.append((batches, opened))
  (first, first_opened), (second, second_opened) = parts
  assert not first_opened & second_opened
  if kind is Images:  # the order of a stream is that of its processes
    together = [[*a["index"], *b["index"]] for a, b in zip(first, second, strict=True)]
    assert together == [batch["index"].tolist() for batch in _train(_dataset(400), 3, start=start)]


@pytest.mark.parametrize("kind", [Images, StreamedImages])
def test_in_evaluation_too_a_process_opens_its_own_examples_alone(kind):
  every = []
  for process in range(2):
    dataset, opened = _recording(kind, 23)
    batches = _eval(dataset, (process, 2))
    assert opened == {index for index in _indices(batches) if index >= 0}
    every += opened
  assert sorted(every) == list(range(23))
