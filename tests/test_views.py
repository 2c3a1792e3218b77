"""Decoding of ordinary files, and the square views of images, against Pillow."""

import collections
import io

import cv2
import numpy as np
import pytest
from PIL import Image

from dtm_jax.data import image_decoding
from dtm_jax.data.views import EvalView, TrainView, random_resized_box


def encode(image: Image.Image, kind: str) -> bytes:
  file = io.BytesIO()
  image.save(file, kind)
  return file.getvalue()


def photo(height=90, width=120) -> np.ndarray:
  noise = np.random.default_rng(0).integers(0, 256, (height // 10, width // 10, 3)).astype(np.uint8)
  return cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC)


@pytest.mark.parametrize(("mode", "tolerance"), [("RGB", 0.1), ("L", 0.1), ("CMYK", 1.1)])
def test_jpeg_of_every_colour_space_is_read_as_pillow_reads_it(mode, tolerance):
  encoded = encode(Image.fromarray(photo()).convert(mode), "JPEG")
  expected = np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB"), np.int32)
  got = image_decoding.decode(encoded)
  assert got.dtype == np.uint8
  assert np.abs(got - expected).mean() < tolerance
  assert np.abs(got - expected).max() <= 4


@pytest.mark.parametrize("kind", ["PNG", "BMP", "WEBP", "TIFF", "PPM"])
def test_other_formats_are_read_as_pillow_reads_them(kind):
  encoded = encode(Image.fromarray(photo()), kind)
  expected = np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB"))
  np.testing.assert_array_equal(image_decoding.decode(encoded), expected)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_cut_files_and_text_are_corrupt(kind):
  encoded = encode(Image.fromarray(photo()), kind)
  for bad in (encoded[: len(encoded) // 2], b"", b"no image", encoded[:2]):
    with pytest.raises(image_decoding.CorruptImageError):
      image_decoding.decode(bad)


def test_boxes_have_uniform_areas_log_aspects_and_places():
  import scipy.stats

  rng, scale, ratio = np.random.default_rng(0), (0.1, 0.4), (3 / 4, 4 / 3)
  height, width = 700, 900  # every box of these scales fits, so none is rejected
  boxes = np.array([random_resized_box(rng, height, width, scale, ratio) for _ in range(4000)])
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
def test_if_no_box_fits_the_largest_centred_box_is_used(shape, box):
  rng = np.random.default_rng(0)
  assert random_resized_box(rng, *shape, (1.0, 1.0), (3 / 4, 4 / 3)) == box


@pytest.mark.parametrize("antialias", [False, True])
def test_a_training_view_is_its_box_resized(antialias):
  image, seed = photo(), 3
  view = TrainView(32, scale=(0.3, 0.9), antialias=antialias)
  box = random_resized_box(np.random.default_rng(seed), 90, 120, view.scale, view.ratio)
  top, left, h, w = box
  pixels = Image.fromarray(image).crop((left, top, left + w, top + h))
  expected = np.asarray(pixels.resize((32, 32), Image.Resampling.BICUBIC), np.int32)
  difference = np.abs(view(image, np.random.default_rng(seed)) - expected)
  assert difference.mean() < (1.0 if antialias else 4.0)
  assert not antialias or difference.max() == 0


def test_padded_crops_show_every_shift_of_the_image():
  image = np.arange(1, 4 * 4 * 3 + 1, dtype=np.uint8).reshape(4, 4, 3)
  rng, view = np.random.default_rng(0), TrainView(4, crop="pad", padding=2)
  padded = np.pad(image, ((2, 2), (2, 2), (0, 0)))
  shifts = {padded[y : y + 4, x : x + 4].tobytes(): (y, x) for y in range(5) for x in range(5)}
  seen = collections.Counter(shifts[view(image, rng).tobytes()] for _ in range(500))
  assert len(seen) == 25
  assert TrainView(4, crop="pad", padding=0)(image, rng).tobytes() == image.tobytes()


def test_an_image_of_the_right_size_stays_as_it_is_without_a_crop():
  image = photo(32, 32)
  np.testing.assert_array_equal(TrainView(32, crop="none")(image, np.random.default_rng(0)), image)
  np.testing.assert_array_equal(EvalView(32)(image), image)


@pytest.mark.parametrize("shape", [(90, 120), (120, 90), (64, 64), (20, 31)])
def test_the_evaluation_view_is_the_centre_of_the_resized_image(shape):
  image = photo(*shape)
  factor = 40 / min(shape)
  size = int(shape[0] * factor), int(shape[1] * factor)
  resized = np.asarray(Image.fromarray(image).resize(size[::-1], Image.Resampling.BICUBIC))
  top, left = round((size[0] - 32) / 2), round((size[1] - 32) / 2)
  expected = resized[top : top + 32, left : left + 32]
  np.testing.assert_array_equal(EvalView(32, resize=40)(image), expected)
