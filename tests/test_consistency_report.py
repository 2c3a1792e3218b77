"""The page of scripts/consistency_report.py about a small study, against its metrics and its model."""

import base64
import io
import json
import re
import shutil
from html.parser import HTMLParser

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_world
from PIL import Image

from configs import consistency as study_config
from dtm_jax import loop
from dtm_jax.augment import normalize, to_float
from dtm_jax.datasets.cifar10 import CLASS_NAMES
from dtm_jax.models.clip import model as clip
from dtm_jax.models.clip import prompts
from dtm_jax.models.clip import weights as clip_weights
from dtm_jax.models.clip.tokenizer import special_ids, word_tokenizer
from dtm_jax.normalizations import NORMALIZATIONS
from scripts.reports import consistency_report

pytestmark = pytest.mark.slow
NUM_TEST, NUM_TOKENS = 32, 16


class Page(HTMLParser):
  """The values of the table by id, the counts in order, and all links, images and drawings."""

  def __init__(self, text: str):
    super().__init__()
    self.values, self.counts, self.links, self.squares, self.unlabelled, self.titles = {}, [], [], [], 0, []
    self.feed(text)

  def handle_starttag(self, tag, attrs):
    attrs = dict(attrs)
    self.links += [value for key, value in attrs.items() if key in ("href", "src", "srcset", "action")]
    if tag == "data" and "id" in attrs:
      self.values[attrs["id"]] = float(attrs["value"])
    if tag == "data" and attrs.get("class") == "count":
      self.counts.append(int(attrs["value"]))
    if tag == "svg" and attrs.get("role") == "img":
      self.unlabelled += not attrs.get("aria-label")
      self.titles += [int(n) for n in re.findall(r"test image (\d+)", attrs["aria-label"])]
    if tag == "path" and attrs.get("class") in ("right", "wrong") and "style" not in attrs:
      self.squares.append(attrs["d"].count("z"))


@pytest.fixture(scope="module")
def report():
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(consistency_report.drawing, "SHARES", (1 / 2,))  # each number of groups is compiled
    yield consistency_report


@pytest.fixture(scope="module")
def world(tmp_path_factory):
  """Write random images in the shape of CIFAR-10 and a random CLIP with both towers, and run the study."""
  world = tmp_path_factory.mktemp("world")
  small_world.write_cifar10(world)
  captions = [caption for several in prompts.captions(CLASS_NAMES, "cifar10") for caption in several]
  tokenize = word_tokenizer(captions, context_length=16)
  tower = clip.Tower(32, 1, 2, 64)
  config = clip.CLIPConfig(
    clip.ImageConfig(tower, image_size=32, patch_size=8), clip.TextConfig(tower, **special_ids(tokenize)), 16
  )
  tokens = jnp.asarray(tokenize(captions[:1]))
  params = jax.jit(clip.CLIP(config).init)(jax.random.key(1), jnp.zeros((1, 32, 32, 3)), tokens)["params"]
  clip_weights.save(world / "clip", config, params)
  tokenize.save(world / "clip")

  config = study_config.get_config()
  config.clip.path = str(world / "clip")
  study = config.evals.consistency
  config.data.dataset.data_dir = study.dataset.data_dir = str(world)
  study.update(batch_size=24, max_fit=24)
  study.morphers = dict(
    bipartite=dict(name="bipartite", min_groups=8, max_groups=8), random=dict(name="random", groups=8)
  )
  loop.train(config, str(world / "run"))
  return world


@pytest.fixture(scope="module")
def page(world, report):
  return report.make_page(str(world / "run"), NUM_TEST)


def test_the_numbers_of_the_table_are_the_metrics(world, page):
  (line,) = small_world.metrics(world / "run")
  expected = {name.removeprefix("consistency/"): x for name, x in line.items() if name != "step"}
  assert Page(page).values == expected
  assert f"{100 * expected['bipartite_linear']:.1f} %" in page


def test_the_page_loads_no_file_and_every_image_decodes(page):
  found = Page(page)
  assert {link for link in found.links if not link.startswith(("#", "data:"))} == {
    "https://arxiv.org/abs/2401.00254"
  }
  assert not re.search(r"url\(|@import|<script|<link|\$[a-z]", page)
  uris = [link for link in found.links if link.startswith("data:")]
  assert len(uris) == NUM_TEST
  for uri in uris:
    picture = Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2], validate=True)))
    assert np.asarray(picture).shape == (128, 128, 3)
  assert found.unlabelled == 0


def test_the_counts_of_all_images_add_up_to_the_table(world, page):
  """Every test image is shown, so the counts beside the drawings add up to the table in each way."""
  found, (line,) = Page(page), small_world.metrics(world / "run")
  counts = np.reshape(found.counts, (NUM_TEST, 3))
  for way, column in zip(("tokens", "bipartite", "random"), counts.T, strict=True):
    share = column.sum() / (NUM_TEST * NUM_TOKENS)
    assert share == pytest.approx(line[f"consistency/{way}_zeroshot"], abs=1e-6)
  squares = np.reshape(found.squares, (NUM_TEST, 3, 2))  # right, wrong
  np.testing.assert_array_equal(squares[..., 0], counts)
  np.testing.assert_array_equal(squares.sum(axis=2), NUM_TOKENS)


def test_the_right_unmorphed_tokens_are_those_of_the_model(world, page):
  """The right tokens are counted from the towers and the arrays only."""
  config, params = clip_weights.load(world / "clip")
  model = clip.CLIP(config)
  images, labels = (np.load(world / "cifar10" / "arrays" / f"test_{x}.npy") for x in ("images", "labels"))
  pixels = normalize(to_float(images), *NORMALIZATIONS["clip"])
  encode = lambda method: jax.jit(lambda x: model.apply({"params": params}, x, method=method))
  encode_text = encode("encode_text")
  patches = np.asarray(encode("encode_patches")(pixels), np.float64)
  captions = prompts.captions(CLASS_NAMES, "cifar10")
  tokenize = word_tokenizer([c for several in captions for c in several], context_length=16)
  texts = [encode_text(jnp.asarray(tokenize(several))) for several in captions]
  unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)
  classes = np.stack([unit(unit(np.asarray(text, np.float64)).mean(axis=0)) for text in texts])
  right = ((patches @ classes.T).argmax(-1) == labels[:, None]).sum(axis=1)
  found = Page(page)
  indices = list(dict.fromkeys(found.titles))
  assert indices[:10] == list(range(10))  # one of each class
  np.testing.assert_array_equal(np.reshape(found.counts, (NUM_TEST, 3))[:, 0], right[indices])


def test_the_error_names_a_run_that_is_missing_or_not_finished(world, report, tmp_path):
  with pytest.raises(FileNotFoundError, match=r"no run .*nowhere"):
    report.make_page(str(tmp_path / "nowhere"), 2)
  broken = tmp_path / "broken"
  broken.mkdir()
  with pytest.raises(FileNotFoundError, match=r"broken has no config.json and no metrics.jsonl"):
    report.make_page(str(broken), 2)
  shutil.copy(world / "run" / "config.json", broken)
  with pytest.raises(FileNotFoundError, match=r"broken has no metrics.jsonl"):
    report.make_page(str(broken), 2)
  (broken / "metrics.jsonl").write_text('{"step": 0, "loss": 1.0}\n')
  with pytest.raises(ValueError, match=r"no consistency/tokens_zeroshot: the run has not ended"):
    report.make_page(str(broken), 2)
  config = json.loads((broken / "config.json").read_text())
  config["evals"]["consistency"]["prompts"] = None
  (broken / "config.json").write_text(json.dumps(config))
  with pytest.raises(ValueError, match=r"prompts=None in evals.consistency"):
    report.make_page(str(broken), 2)
  config["evals"] = {"knn": {}}
  (broken / "config.json").write_text(json.dumps(config))
  with pytest.raises(ValueError, match="0 evaluators of that kind, not 1"):
    report.make_page(str(broken), 2)


def test_class_names_are_those_of_the_captions(report, monkeypatch):
  assert report.said_names(CLASS_NAMES, "cifar10") == list(CLASS_NAMES)
  monkeypatch.setattr(prompts, "captions", lambda names, templates: [["a tench."], ["a great white shark."]])
  assert report.said_names(("n01440764", "n01484850"), "imagenet") == ["tench", "great white shark"]


@pytest.mark.parametrize("num_tokens", [16, 49, 64, 196, 256, 576])
@pytest.mark.parametrize("share", [3 / 4, 1 / 2, 1 / 4, 1 / 8, 1 / 16])
def test_the_rounds_reach_the_number_of_groups(report, num_tokens, share):
  """Follows the schedule. A round merges at most half of the live tokens."""
  num_groups = max(1, round(share * num_tokens))
  merges = report.drawing.merges_a_round(num_tokens, num_groups)
  rounds, live = -(-(num_tokens - num_groups) // merges), num_tokens
  each = (num_tokens - num_groups) // rounds
  for wanted in [each] * (rounds - 1) + [num_tokens - num_groups - (rounds - 1) * each]:
    live -= min(wanted, live // 2)
  assert live == num_groups
