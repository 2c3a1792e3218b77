"""Every kind of image file: depth of values, orientation, size, and views of long images."""

import contextlib
import io
import struct
import subprocess
import sys
import zlib

import cv2
import numpy as np
import pytest
import simplejpeg
from PIL import Image, ImageOps, PngImagePlugin

from configs import vitb16_released
from dtm_jax import data
from dtm_jax.data import image_decoding, label_maps, orientation, resampling, settings, views
from dtm_jax.data.image_decoding import CorruptImageError, decode
from dtm_jax.data.views import EvalView, TrainView

RNG = np.random.default_rng(0)
DEEP = np.linspace(0, 65535, 12 * 20).astype(np.uint16).reshape(12, 20)
DEEP_RGB = RNG.integers(0, 65536, (12, 20, 3), dtype=np.uint16)
UNIT = np.linspace(0, 1, 12 * 20, dtype=np.float32).reshape(12, 20)


def encode(image, kind, **options) -> bytes:
  file = io.BytesIO()
  (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(file, kind, **options)
  return file.getvalue()


def opencv(array, kind) -> bytes:
  """Encode an RGB(A) array with OpenCV."""
  if array.ndim == 3:
    array = np.ascontiguousarray(array[..., [2, 1, 0, 3][: array.shape[2]]])
  return cv2.imencode(kind, array)[1].tobytes()


def png_chunk(kind: bytes, content: bytes) -> bytes:
  return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(array, color_type, depth=16) -> bytes:
  """Write a PNG of 16-bit channels by the specification: big-endian rows, each after a filter byte of 0."""
  rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in array)
  header = struct.pack(">IIBBBBB", array.shape[1], array.shape[0], depth, color_type, 0, 0, 0)
  chunks = (b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")
  return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*chunk) for chunk in chunks)


def tiff(array, sample_format, photometric=1, order="<", **tags) -> bytes:
  """Write an uncompressed TIFF by the specification. `sample_format`: 1 unsigned, 2 signed, 3 float."""
  depth = 1 if array.ndim == 2 else array.shape[2]
  pixels = array.astype(array.dtype.newbyteorder(order)).tobytes()
  bits = 8 * array.dtype.itemsize
  fields = {
    256: array.shape[1], 257: array.shape[0], 258: bits, 259: 1, 262: photometric, 273: 0, 277: depth,
    278: array.shape[0], 279: len(pixels), 339: sample_format, **{int(k[1:]): v for k, v in tags.items()},
  }  # fmt: skip
  start = 8 + 2 + 12 * len(fields) + 4
  fields[273] = start + 16
  extra = struct.pack(order + "4H4H", *[bits] * 4, *[sample_format] * 4)
  entries = b""
  for tag, value in sorted(fields.items()):
    if tag in (258, 339) and depth > 2:
      entries += struct.pack(order + "HHII", tag, 3, depth, start + (8 if tag == 339 else 0))
    elif tag in (258, 339) and depth == 2:
      entries += struct.pack(order + "HHIHH", tag, 3, 2, value, value)
    else:
      entries += struct.pack(order + "HHII", tag, 4, 1, value)
  head = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(order + "IH", 8, len(fields))
  return head + entries + struct.pack(order + "I", 0) + extra + pixels


def grey(values) -> np.ndarray:
  return np.repeat(values.astype(np.uint8)[..., None], 3, axis=2)


HIGH = grey(DEEP >> 8)
SIXTEEN = {
  "PNG": (lambda: png(DEEP, 0), HIGH),
  "PNG of Pillow": (lambda: encode(DEEP, "PNG"), HIGH),
  "PNG, dark": (lambda: png(DEEP >> 9, 0), grey(DEEP >> 17)),
  "PNG of 12 bits": (lambda: png(DEEP >> 4, 0), grey(DEEP >> 12)),
  "PNG with alpha": (lambda: png(np.stack([DEEP, DEEP[::-1]], -1), 4), HIGH),
  "RGB PNG": (lambda: png(DEEP_RGB, 2), DEEP_RGB >> 8),
  "RGBA PNG": (lambda: png(np.concatenate([DEEP_RGB, DEEP[..., None]], -1), 6), DEEP_RGB >> 8),
  "TIFF": (lambda: tiff(DEEP, 1), HIGH),
  "big-endian TIFF": (lambda: tiff(DEEP, 1, order=">"), HIGH),
  "TIFF of OpenCV": (lambda: opencv(DEEP, ".tiff"), HIGH),
  "TIFF, white is zero": (lambda: tiff(DEEP, 1, photometric=0), 255 - HIGH),
  "signed TIFF": (lambda: tiff((DEEP >> 1).astype(np.int16), 2), grey(DEEP >> 9)),
  "RGB TIFF": (lambda: tiff(DEEP_RGB, 1, 2), DEEP_RGB >> 8),
  "RGB TIFF, big-endian": (lambda: tiff(DEEP_RGB, 1, 2, ">"), DEEP_RGB >> 8),
  "RGBA TIFF": (lambda: opencv(np.concatenate([DEEP_RGB, DEEP[..., None]], -1), ".tiff"), DEEP_RGB >> 8),
  "PGM": (lambda: b"P5 20 12 65535\n" + DEEP.astype(">u2").tobytes(), HIGH),
  "dark PGM": (lambda: b"P5 20 12 65535\n" + (DEEP >> 9).astype(">u2").tobytes(), grey(DEEP >> 17)),
  "PPM": (lambda: b"P6 20 12 65535\n" + DEEP_RGB.astype(">u2").tobytes(), None),
}


@pytest.mark.parametrize("kind", SIXTEEN)
def test_sixteen_bits_become_their_high_byte(kind):
  encoded, expected = SIXTEEN[kind][0](), SIXTEEN[kind][1]
  if expected is None:  # Pillow rounds the colours of a PPM
    assert np.abs(decode(encoded).astype(int) - DEEP_RGB / 257).max() <= 0.5
  else:
    np.testing.assert_array_equal(decode(encoded), expected)


def test_sixteen_bits_are_read_as_in_tensorflow_and_opencv():
  import tensorflow as tf

  for encoded in (png(DEEP, 0), png(DEEP_RGB, 2)):
    np.testing.assert_array_equal(decode(encoded), tf.io.decode_png(encoded, channels=3).numpy())
    bgr = cv2.imdecode(np.frombuffer(encoded, np.uint8), cv2.IMREAD_COLOR)
    np.testing.assert_array_equal(decode(encoded), bgr[..., ::-1])


WIDE = DEEP.astype(np.int64)
FULL = (WIDE << 16) | WIDE
OTHER_DEPTHS = {
  "float": (lambda: tiff(UNIT, 3), np.rint(UNIT * 255)),
  "big-endian float": (lambda: tiff(UNIT, 3, order=">"), np.rint(UNIT * 255)),
  "float of Pillow": (lambda: encode(UNIT, "TIFF"), np.rint(UNIT * 255)),
  "float, white is zero": (lambda: tiff(UNIT, 3, photometric=0), 255 - np.rint(UNIT * 255)),
  "PFM": (lambda: b"Pf 20 12 -1.0\n" + UNIT[::-1].tobytes(), np.rint(UNIT * 255)),
  "double": (lambda: tiff(UNIT.astype(np.float64), 3), np.rint(UNIT * 255)),
  "uint32": (lambda: tiff(FULL.astype(np.uint32), 1), WIDE >> 8),
  "int32": (lambda: tiff((FULL >> 1).astype(np.int32), 2), WIDE >> 8),
  "16 bits in int32": (lambda: encode(DEEP.astype(np.int32), "TIFF"), WIDE >> 8),
  "16 bits in uint32": (lambda: tiff(DEEP.astype(np.uint32), 1, order=">"), WIDE >> 8),
  "8 bits in int32": (lambda: encode((DEEP >> 8).astype(np.int32), "TIFF"), WIDE >> 8),
}


@pytest.mark.parametrize("kind", OTHER_DEPTHS)
def test_other_depths_are_scaled_to_8_bits(kind):
  make, expected = OTHER_DEPTHS[kind]
  np.testing.assert_array_equal(decode(make()), grey(expected))


def test_floating_point_colours_are_scaled():
  colours = RNG.random((12, 20, 3), np.float32)
  for encoded in (tiff(colours, 3, 2), tiff(colours, 3, 2, ">"), opencv(colours, ".tiff")):
    np.testing.assert_array_equal(decode(encoded), np.rint(colours * 255).astype(np.uint8))


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (lambda: tiff(UNIT * 2, 3), r"from 0 to 2: only those in \[0, 1\]"),
    (lambda: tiff(UNIT - 0.5, 3), r"from -0\.5 to 0\.5"),
    (lambda: tiff(255 * UNIT, 3), "from 0 to 255"),
    (lambda: tiff(np.where(UNIT > 0.5, np.nan, UNIT).astype(np.float32), 3), "NaN or infinite"),
    (lambda: tiff(np.where(UNIT > 0.5, np.inf, UNIT).astype(np.float32), 3), "NaN or infinite"),
    (lambda: tiff(np.full((4, 4, 3), np.nan, np.float32), 3, 2), "NaN or infinite"),
    (lambda: tiff(DEEP.astype(np.int32) - 9, 2), "from -9 to 65526: negative"),
    (lambda: tiff(DEEP.astype(np.int32) + 5000, 2), "up to 70535: this is neither 8, 16 nor 32 bits"),
  ],
)
def test_values_without_a_defined_white_are_refused(make, message):
  with pytest.raises(CorruptImageError, match=message):
    decode(make())


COLOURS = np.array([[(200, 10, 30), (5, 250, 90), (0, 0, 0), (255, 255, 255)]], np.uint8).repeat(5, axis=0)
ALPHA = np.array([[0, 90, 255, 0]], np.uint8).repeat(5, axis=0)


def palette(**options):
  picture = Image.fromarray(np.arange(4, dtype=np.uint8)[None].repeat(5, axis=0), "P")
  picture.putpalette(COLOURS[0].ravel().tolist())
  return encode(picture, **options)


def animation(kind):
  second = Image.fromarray(255 - COLOURS)
  options = {"lossless": True} if kind == "WEBP" else {}
  return encode(COLOURS, kind, save_all=True, append_images=[second], **options)


BITS = ALPHA > 100
OTHER_KINDS = {
  "1 bit": (lambda: encode(Image.fromarray(BITS), "PNG"), grey(255 * BITS)),
  "1 bit TIFF": (lambda: encode(Image.fromarray(BITS), "TIFF"), grey(255 * BITS)),
  "palette": (lambda: palette(kind="PNG"), COLOURS),
  "palette, one transparent": (lambda: palette(kind="PNG", transparency=1), COLOURS),
  "palette, alpha for each": (lambda: palette(kind="PNG", transparency=bytes([0, 90, 255, 0])), COLOURS),
  "GIF": (lambda: palette(kind="GIF", transparency=1), COLOURS),
  "RGBA": (lambda: encode(np.dstack([COLOURS, ALPHA]), "PNG"), COLOURS),
  "RGBA TIFF": (lambda: encode(np.dstack([COLOURS, ALPHA]), "TIFF"), COLOURS),
  "RGB, one transparent": (lambda: encode(COLOURS, "PNG", transparency=(200, 10, 30)), COLOURS),
  "grey and alpha": (lambda: encode(np.dstack([ALPHA, ALPHA]), "PNG"), grey(ALPHA)),
  "CMYK TIFF": (
    lambda: encode(Image.fromarray(np.dstack([255 - COLOURS, 0 * ALPHA]), "CMYK"), "TIFF"),
    COLOURS,
  ),
  "animated WebP": (lambda: animation("WEBP"), COLOURS),
  "animated PNG": (lambda: animation("PNG"), COLOURS),
  "animated GIF": (lambda: animation("GIF"), COLOURS),
  "multi-page TIFF": (lambda: animation("TIFF"), COLOURS),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", OTHER_KINDS)
def test_stored_colours_are_read_without_alpha_and_from_the_first_frame(kind):
  make, expected = OTHER_KINDS[kind]
  np.testing.assert_array_equal(decode(make()), expected)


def by_pillow(encoded, monkeypatch):
  """Return what decode returns if simplejpeg refuses the file."""

  def refuse(*_):
    raise ValueError

  with monkeypatch.context() as patch:
    patch.setattr(simplejpeg, "decode_jpeg_header", refuse)
    return decode(encoded)


def smooth(height=48, width=64) -> np.ndarray:
  return cv2.resize(
    RNG.integers(0, 256, (6, 8, 3), dtype=np.uint8), (width, height), interpolation=cv2.INTER_CUBIC
  )


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_both_readers_of_jpeg_agree(mode, monkeypatch):
  picture = Image.fromarray(smooth()).convert(mode)
  plain = encode(picture, "JPEG", quality=95)
  for encoded in (plain, encode(picture, "JPEG", quality=95, progressive=True)):
    difference = np.abs(decode(encoded).astype(int) - by_pillow(encoded, monkeypatch))
    assert difference.max() <= 2
  assert np.abs(decode(plain).astype(int) - np.array(picture.convert("RGB"))).mean() < 4


# How a viewer shows a picture of each orientation, by Pillow's names.
TURNS = {
  1: None, 2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
  4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270,
  7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_90,
}  # fmt: skip
LOSSLESS = {"WEBP": {"lossless": True}, "TIFF": {"compression": "tiff_lzw"}}


def exif_of(value):
  exif = Image.Exif()
  exif[0x0112] = value
  return exif


@pytest.mark.parametrize("turn", TURNS)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_every_orientation_is_applied_by_both_readers(kind, turn, monkeypatch):
  stored = smooth()
  encoded = encode(stored, kind, exif=exif_of(turn), **LOSSLESS.get(kind, {}))
  raw = Image.fromarray(decode(encode(stored, kind, **LOSSLESS.get(kind, {}))))
  shown = np.array(raw if TURNS[turn] is None else raw.transpose(TURNS[turn]))
  np.testing.assert_array_equal(decode(encoded), shown)
  assert image_decoding.decode_stored(encoded)[1] == turn
  if kind == "JPEG":
    assert np.abs(by_pillow(encoded, monkeypatch).astype(int) - shown).max() <= 2


@pytest.mark.parametrize("turn", TURNS)
def test_deep_pixels_are_also_turned(turn):
  shown = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(encode(HIGH, "PNG", exif=exif_of(turn))))))
  for encoded in (
    encode(DEEP, "PNG", exif=exif_of(turn)),
    tiff(DEEP, 1, t274=turn),
    tiff(np.repeat(DEEP[..., None] / 65535, 3, axis=2).astype(np.float32), 3, 2, t274=turn),
  ):
    assert np.abs(decode(encoded).astype(int) - shown).max() <= 1


def test_orientation_is_found_among_other_segments_and_damage_is_no_error():
  jpeg, exif = encode(smooth(), "JPEG"), exif_of(6).tobytes()
  app1 = lambda block: b"\xff\xe1" + struct.pack(">H", 2 + len(block)) + block
  big_endian = b"Exif\0\0MM\0*" + struct.pack(">IHHHIHHI", 8, 1, 0x0112, 3, 1, 6, 0, 0)
  for block in (exif, big_endian):
    for before in (b"", app1(b"http://ns.adobe.com/xap/1.0/\0<x/>"), b"\xff\xfe\0\x04hi", b"\xff\xff"):
      assert orientation.jpeg_orientation(jpeg[:2] + before + app1(block) + jpeg[2:]) == 6
  for length in range(len(exif)):  # cut short anywhere
    assert orientation.jpeg_orientation(jpeg[:2] + app1(exif[:length]) + jpeg[2:]) in (1, 6)
  for value in (0, 9, 65535):
    assert orientation.jpeg_orientation(jpeg[:2] + app1(exif_of(value).tobytes()) + jpeg[2:]) == 1
  for cut in range(60):
    assert orientation.jpeg_orientation(jpeg[:cut]) == 1


def test_an_orientation_in_xmp_is_ignored():
  xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><d tiff:Orientation="6"/></x:xmpmeta>'
  text = PngImagePlugin.PngInfo()
  text.add_itxt("XML:com.adobe.xmp", xmp.decode())
  for encoded in (
    encode(COLOURS, "PNG", pnginfo=text),
    encode(COLOURS, "WEBP", lossless=True, xmp=xmp),
    encode(COLOURS, "TIFF", tiffinfo={700: xmp}),
  ):
    np.testing.assert_array_equal(decode(encoded), COLOURS)


def jpeg_of_size(height, width):
  """Return a JPEG of a few hundred bytes with this size in its header."""
  encoded = bytearray(simplejpeg.encode_jpeg(np.zeros((16, 16, 3), np.uint8)))
  place = encoded.index(b"\xff\xc0")
  encoded[place + 5 : place + 9] = struct.pack(">HH", height, width)
  return bytes(encoded)


def png_of_size(height, width):
  header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
  return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", zlib.compress(b"\0" * 99))


BOMBS = {
  "JPEG": jpeg_of_size(65000, 65000),
  "smaller JPEG": jpeg_of_size(20000, 20000),
  "PNG": png_of_size(20000, 20000),
  "GIF": b"GIF89a" + struct.pack("<HH", 60000, 60000) + encode(COLOURS, "GIF")[10:],
  "GIF, large frame": encode(COLOURS, "GIF").replace(
    b"," + struct.pack("<HHHH", 0, 0, 4, 5), b"," + struct.pack("<HHHH", 0, 0, 60000, 60000)
  ),
  "BMP": encode(COLOURS, "BMP")[:18] + struct.pack("<ii", 60000, 60000) + encode(COLOURS, "BMP")[26:],
  "PPM": b"P6 60000 60000 255\n",
  "TIFF": tiff(DEEP, 1, t256=60000, t257=60000),
  "TIFF of OpenCV": tiff(np.zeros((4, 4, 3), np.float32), 3, 2, t256=60000, t257=60000),
}


@pytest.mark.parametrize("kind", BOMBS)
def test_a_header_of_too_many_pixels_is_refused_before_they_are_decoded(kind):
  message = (
    r"(65000x65000 = 4225000000|20000x20000|60000x60000) .* at most 200000000 .*data\.view\.max_pixels"
  )
  with pytest.raises(CorruptImageError, match=message):
    decode(BOMBS[kind])
  with pytest.raises(CorruptImageError, match=r"x\.png.*max_pixels"):
    label_maps.MapCoding(3).decode(BOMBS["PNG"], "x.png")


def test_the_limit_on_pixels_is_an_option():
  for kind in ("JPEG", "PNG", "TIFF"):
    encoded = encode(smooth(), kind)
    assert decode(encoded, max_pixels=48 * 64).shape == (48, 64, 3)
    with pytest.raises(
      CorruptImageError, match=r"48x64 = 3072 pixels, and at most 3071 are read.*max_pixels"
    ):
      decode(encoded, max_pixels=48 * 64 - 1)
  example = {"image": encode(smooth(), "JPEG"), "label": 0, "name": "photo"}
  dataset = data.Dataset("photos", 1, None, [example])
  options = dict(batch_size=1, image_size=8, num_threads=1, process_index=0, process_count=1)
  with pytest.raises(CorruptImageError, match="photo"):
    next(data.train_batches(dataset, seed=0, max_pixels=100, **options))
  assert not next(data.eval_batches(dataset, max_pixels=100, **options))["valid"].any()


@pytest.mark.filterwarnings("error")
def test_photos_of_100_megapixels_are_read_without_pillows_warning():
  picture = Image.new("1", (10_000, 10_000))
  with image_decoding.open_picture(encode(picture, "PNG")) as (opened, _, _):
    assert opened.size == (10_000, 10_000)


def test_no_file_starts_another_program():
  with pytest.raises(CorruptImageError):
    decode(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP", "GIF", "BMP", "PPM"])
def test_cut_headers_are_corrupt_and_damaged_ones_raise_no_other_error(kind):
  encoded = encode(smooth(), kind)
  for length in (*range(0, 60, 7), len(encoded) // 3):
    with pytest.raises(CorruptImageError):
      decode(encoded[:length])
  for place in range(2, 40, 3):  # whatever the bytes say, it is an image or corrupt
    damaged = encoded[:place] + b"\xff" + encoded[place + 1 :]
    with contextlib.suppress(CorruptImageError):
      assert decode(damaged).dtype == np.uint8


@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "lanczos"])
def test_the_view_of_a_long_image_is_the_centre_of_the_resized_image(interpolation, antialias):
  """Pillow agrees exactly. OpenCV's fixed-point weights differ by one grey level."""
  rng, computed_in_part = np.random.default_rng(1), 0
  for _ in range(60):
    short, image_size = int(rng.integers(1, 50)), int(rng.integers(4, 30))
    shape = short, int(short * rng.uniform(1, 50)) + 1
    image = (255 * rng.integers(0, 2, (*shape, 3))).astype(np.uint8)
    for pixels in (image, image.swapaxes(0, 1)):
      view = EvalView(image_size, int(image_size * rng.uniform(1, 1.5)), interpolation, antialias)
      factor = view.resize / short
      size = [max(image_size, int(side * factor)) for side in pixels.shape[:2]]
      if antialias:
        whole = np.asarray(Image.fromarray(pixels).resize(size[::-1], resampling.PIL_FILTERS[interpolation]))
      else:
        whole = cv2.resize(pixels, size[::-1], interpolation=resampling.CV2_FILTERS[interpolation])
      top, left = (round((side - image_size) / 2) for side in size)
      expected = whole[top : top + image_size, left : left + image_size].astype(int)
      in_part = size[0] * size[1] > resampling.WIDE * image_size**2
      computed_in_part += in_part
      difference = np.abs(view(pixels) - expected).max()
      assert difference <= (in_part and not antialias), (pixels.shape, size)
  assert computed_in_part > 30


PEAK = """
import resource
import numpy as np
from dtm_jax.data import views
from dtm_jax.evaluators import _sliding_windows
for shape in ((1, 4000), (4000, 1), (2, 65535), (65535, 2)):
  image, rng = np.zeros((*shape, 3), np.uint8), np.random.default_rng(0)
  before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  for antialias in (False, True):
    views.EvalView(224, 256, antialias=antialias)(image)
    for crop in views.CROPS:
      views.TrainView(224, crop, antialias=antialias, rand_augment="rand-m9-mstd0.5-inc1")(image, rng)
    views.JointView(224, antialias=antialias)(image, image[..., 0], rng)
    windows, layout = _sliding_windows.SlidingWindows(512, 512, 341, antialias=antialias).cut(image)
    layout.classes([np.zeros((32, 32, 20), np.float32)] * len(windows))
  print(shape, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


def test_no_view_of_a_long_image_takes_200_megabytes():
  lines = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True).stdout
  assert len(lines.splitlines()) == 4
  for line in lines.splitlines():
    assert float(line.split()[-1]) < 100, line


def released_view(image_size):
  options = vitb16_released.get_config().data.view.to_dict()
  assert options.pop("max_pixels") == image_decoding.MAX_PIXELS
  return TrainView(image_size, **options)


@pytest.mark.parametrize("shape", [(375, 500), (90, 60), (1200, 900), (224, 224), (40, 400)])
def test_the_released_config_crops_as_pillow_crops_and_resizes(shape):
  view = released_view(224)
  for seed in range(8):
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (*shape, 3), dtype=np.uint8)
    if seed % 2:  # a photo's spectrum, with edges
      image = cv2.GaussianBlur(image, (0, 0), 3)
      image[image > 128] = 250
    box = views.random_resized_box(np.random.default_rng(seed), *shape, view.scale, view.ratio)
    top, left, h, w = box
    crop = Image.fromarray(image).crop((left, top, left + w, top + h))
    expected = np.asarray(crop.resize((224, 224), Image.Resampling.BICUBIC), int)
    assert np.abs(view(image, np.random.default_rng(seed)) - expected).max() <= 1
    mirrored = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)  # the released code mirrors before it resizes
    expected = np.asarray(mirrored.resize((224, 224), Image.Resampling.BICUBIC), int)
    assert np.abs(view(image, np.random.default_rng(seed))[:, ::-1] - expected).max() <= 1


@pytest.mark.parametrize("antialias", [True, False])
def test_pixels_outside_of_a_crop_have_no_influence(antialias):
  image = RNG.integers(0, 256, (60, 80, 3), dtype=np.uint8)
  other = 255 - image
  other[10:40, 20:60] = image[10:40, 20:60]
  for size in ((16, 16), (64, 64)):
    views = [resampling.resize(each, size, "bicubic", antialias, (10, 20, 30, 40)) for each in (image, other)]
    np.testing.assert_array_equal(*views)


def test_statistics_of_a_data_set_use_the_scaled_values():
  examples = [{"image": png(DEEP, 0), "label": 0, "name": "deep"}]
  mean, _ = settings.measure(data.Dataset("deep", 1, None, examples))
  np.testing.assert_allclose(mean, 0.5, atol=1e-3)


class TestLabelMaps:
  coding = label_maps.MapCoding(3)

  def example(self, image, label_map):
    return {"image": image, "map": label_map, "name": "x.jpg", "map_name": "x.png"}

  @pytest.mark.parametrize("turn", TURNS)
  @pytest.mark.parametrize("shape", [(32, 32), (24, 40)])
  def test_a_map_drawn_on_the_displayed_image_matches_its_image(self, turn, shape):
    stored = np.zeros((*shape, 3), np.uint8)
    stored[:8, :16] = 255
    encoded = encode(stored, "JPEG", quality=95, exif=exif_of(turn))
    shown = orientation.turn((stored[..., 0] > 0).astype(np.uint8), turn)
    image, label_map = label_maps.decode_pair(self.example(encoded, encode(shown, "PNG")), self.coding)
    np.testing.assert_array_equal(image[..., 0] > 128, label_map == 1)

  @pytest.mark.parametrize("turn", TURNS)
  @pytest.mark.parametrize("kind", ["PNG", "TIFF", "array"])
  def test_a_map_is_turned_by_its_own_orientation(self, turn, kind):
    stored = np.arange(24, dtype=np.uint8).reshape(4, 6) % 3
    image = encode(np.zeros((4, 6, 3), np.uint8), "JPEG", exif=exif_of(turn))
    shown = orientation.turn(stored, turn)
    label_map = shown if kind == "array" else encode(stored, kind, exif=exif_of(turn))
    _, decoded = label_maps.decode_pair(self.example(image, label_map), self.coding)
    np.testing.assert_array_equal(decoded, shown)

  def test_a_map_of_the_stored_pixels_is_refused_with_the_reason(self):
    image = encode(np.zeros((20, 40, 3), np.uint8), "JPEG", exif=exif_of(6))
    message = r"x\.png has 20x40 pixels, but its image x\.jpg has 40x20 after .* EXIF orientation 6"
    with pytest.raises(ValueError, match=message):
      label_maps.decode_pair(self.example(image, encode(np.zeros((20, 40), np.uint8), "PNG")), self.coding)

  def test_values_of_deep_maps_are_not_scaled(self):
    raw = np.array([[0, 1, 255]], np.uint16)
    np.testing.assert_array_equal(self.coding.decode(encode(raw, "PNG"), "x"), raw)
