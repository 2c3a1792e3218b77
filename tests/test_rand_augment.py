"""RandAugment: operations against timm's, known pixels, the draws of a policy, and reproducible batches."""

import numpy as np
import pytest
from PIL import Image
from timm_without_torchvision import import_timm

from dtm_jax import data
from dtm_jax.data import rand_augment
from dtm_jax.data.rand_augment import OPERATIONS, RandAugment
from dtm_jax.data.views import TrainView

RNG = np.random.default_rng(0)
PICTURE = Image.fromarray(RNG.integers(0, 256, (24, 32, 3), np.uint8))
STRENGTHS = (0.0, 0.33, 0.9, 1.0)
# Our name -> timm's.
NAMES = {
  "auto_contrast": "AutoContrast", "equalize": "Equalize", "invert": "Invert", "rotate": "Rotate",
  "posterize": "PosterizeIncreasing", "solarize": "SolarizeIncreasing", "solarize_add": "SolarizeAdd",
  "color": "ColorIncreasing", "contrast": "ContrastIncreasing", "brightness": "BrightnessIncreasing",
  "sharpness": "SharpnessIncreasing", "shear_x": "ShearX", "shear_y": "ShearY",
  "translate_x": "TranslateXRel", "translate_y": "TranslateYRel",
}  # fmt: skip


@pytest.mark.parametrize("strength", STRENGTHS)
@pytest.mark.parametrize("name", sorted(OPERATIONS))
def test_every_operation_equals_timms(name, strength, monkeypatch):
  """Compare both signs, by a replaced coin. timm fails with newer Pillows if posterize leaves no bit."""
  if (name, strength) == ("posterize", 1.0):
    assert not np.any(OPERATIONS[name](PICTURE, strength, 1))
    return
  pytest.importorskip("torch")
  import_timm()
  from timm.data import auto_augment as timm_ops

  results = []
  for coin in (0.9, 0.1):
    monkeypatch.setattr(timm_ops.random, "random", lambda coin=coin: coin)
    level_fn, op = timm_ops.LEVEL_TO_ARG[NAMES[name]], timm_ops.NAME_TO_OP[NAMES[name]]
    hparams = {"img_mean": rand_augment.FILL}
    arguments = level_fn(strength * 10, hparams) if level_fn else ()
    fill = {"fillcolor": rand_augment.FILL, "resample": Image.Resampling.BICUBIC}
    results.append(np.asarray(op(PICTURE, *arguments, **fill)))
  ours = [np.asarray(OPERATIONS[name](PICTURE, strength, sign)) for sign in (1, -1)]
  assert {x.tobytes() for x in ours} == {x.tobytes() for x in results}


def test_operations_give_known_pixels():
  grey = Image.fromarray(np.full((4, 4, 3), 100, np.uint8))
  value = lambda name, a, sign=1: int(np.asarray(OPERATIONS[name](grey, a, sign))[1, 1, 0])
  assert value("invert", 0.5) == 155
  assert value("solarize", 0.9) == 155  # the threshold is 26
  assert value("solarize_add", 0.5) == 155
  assert value("posterize", 0.9) == 0  # one bit is left
  assert value("brightness", 0.5) == 145
  assert value("brightness", 0.5, -1) == 55
  moved = np.asarray(OPERATIONS["translate_x"](grey, 1.0, 1))
  assert tuple(moved[0, -1]) == rand_augment.FILL


def test_a_policy_draws_operations_strengths_and_signs(monkeypatch):
  calls = []
  record = lambda name: lambda image, a, sign: calls.append((name, a, sign)) or image
  monkeypatch.setattr(rand_augment, "OPERATIONS", {name: record(name) for name in OPERATIONS})
  policy, rng, image = (
    rand_augment.parse("rand-m9-mstd0.5-inc1"),
    np.random.default_rng(1),
    np.asarray(PICTURE),
  )
  for _ in range(4000):
    policy(image, rng)
  names, strengths, signs = zip(*calls, strict=True)
  assert len(calls) == pytest.approx(4000, abs=150)  # two of them, each with one half
  counts = [names.count(name) for name in OPERATIONS]
  assert np.min(counts) > 200 < 340 > np.max(counts)
  assert np.mean(strengths) == pytest.approx(0.9, abs=0.005)
  assert np.std(strengths) == pytest.approx(0.05, abs=0.005)  # a little less: cut at 1
  assert np.max(strengths) == 1.0
  assert np.mean(signs) == pytest.approx(0, abs=0.06)


def test_policies_are_parsed_from_their_names():
  assert rand_augment.parse("rand-m9-mstd0.5-inc1") == RandAugment()
  assert rand_augment.parse("rand-m7-n3-p0.8-mstd1-inc1") == RandAugment(7.0, 1.0, 3, 0.8)
  for wrong in ("rand-m9", "augmix-m9-inc1", "rand-x9-inc1", "rand-m-inc1"):
    with pytest.raises(ValueError, match=f"{wrong}.*rand-m9-mstd0.5-inc1"):
      rand_augment.parse(wrong)
  with pytest.raises(ValueError, match="Unknown RandAugment"):
    TrainView(32, rand_augment="rand")


class _Pictures:
  def __init__(self):
    self.images = RNG.integers(0, 256, (20, 16, 16, 3), np.uint8)

  def __len__(self):
    return 20

  def __getitem__(self, index):
    return {"image": self.images[index], "label": 0, "name": str(index)}


def test_batches_are_a_function_of_seed_and_step():
  dataset = data.Dataset("pictures", 20, ("one",), _Pictures())
  options = dict(batch_size=8, image_size=16, seed=3, crop="none", num_threads=2)
  with_policy = dict(options, rand_augment="rand-m9-mstd0.5-inc1")
  batches = data.train_batches(dataset, **with_policy)
  first, second = next(batches), next(batches)
  again = next(data.train_batches(dataset, **with_policy, start=8))
  np.testing.assert_array_equal(second["image"], again["image"])
  plain = next(data.train_batches(dataset, **options))
  changed = np.any(first["image"] != plain["image"], axis=(1, 2, 3))
  assert 0 < changed.sum() <= 8
  np.testing.assert_array_equal(first["index"], plain["index"])
