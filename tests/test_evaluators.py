"""kNN and zero-shot against answers that are known, whatever padding and devices do."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_world
from PIL import Image

from configs import zeroshot_cifar10
from dtm_jax import loop, plugins
from dtm_jax.datasets import cifar10
from dtm_jax.errors import OptionError
from dtm_jax.evaluators import Context, best_head, classification, knn, zeroshot
from dtm_jax.models.clip import model as clip
from dtm_jax.models.clip import prompts
from dtm_jax.models.clip import tokenizer as clip_tokenizer
from dtm_jax.models.clip import weights as clip_weights
from dtm_jax.normalizations import NORMALIZATIONS
from dtm_jax.tasks import Run, frozen_clip
from dtm_jax.training import mesh as meshes

RNG = np.random.default_rng(0)


def slow_knn(bank, bank_labels, queries, num_classes, k, temperature):
  """The definition: each query, each neighbour, one vote after another."""
  unit = lambda x: x / np.linalg.norm(x)
  predicted = []
  for query in queries:
    cosine = np.array([unit(query) @ unit(example) for example in bank])
    votes = np.zeros(num_classes)
    for nearest in np.argsort(-cosine)[:k]:
      votes[bank_labels[nearest]] += np.exp(cosine[nearest] / temperature)
    predicted.append(votes.argmax())
  return predicted


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (5, 0.07), (20, 1.0)])
def test_knn_is_its_definition(k, temperature):
  bank, queries = (RNG.normal(size=(size, 6)).astype(np.float32) for size in (40, 13))
  labels = RNG.integers(0, 4, 40)
  options = dict(num_classes=4, k=k, temperature=temperature)
  expected = slow_knn(bank, labels, queries, **options)
  # 13 queries in blocks of 5: the last one is padded.
  np.testing.assert_array_equal(knn.knn_predict(bank, labels, queries, block=5, **options), expected)
  scaled = knn.knn_predict(3 * bank, labels, 0.1 * queries, **options)
  np.testing.assert_array_equal(scaled, expected)  # only directions count


def test_knn_needs_k_examples():
  bank = np.ones((3, 2), np.float32)
  with pytest.raises(ValueError, match=r"k = 5 .* has 3"):
    knn.knn_predict(bank, np.zeros(3, int), bank, num_classes=1, k=5, temperature=0.07)


def test_an_unknown_predict_function_names_the_choices():
  with pytest.raises(ValueError, match=r"'studnt'.*student, teacher"):
    Context({"teacher": mean_colour, "student": mean_colour}, meshes.make_mesh(8, 1)).function("studnt")


@pytest.fixture
def colours(tmp_path):
  """A data set of 32x32 images whose mean colour says the class, a fifth of them labelled wrongly."""
  label = np.arange(50) % 3
  image = np.zeros((50, 32, 32, 3), np.uint8)
  image[np.arange(50), :, :, label] = RNG.integers(100, 255, (50, 1, 1))
  said = np.where(np.arange(50) % 5 == 0, (label + 1) % 3, label).astype(np.int32)
  folder = tmp_path / "cifar10" / "arrays"
  folder.mkdir(parents=True)
  for split in ("train", "test"):
    np.save(folder / f"{split}_images.npy", image)
    np.save(folder / f"{split}_labels.npy", label.astype(np.int32) if split == "train" else said)
  return {"name": "cifar10", "data_dir": str(tmp_path)}


def mean_colour(state, batch):
  return jnp.asarray(batch["image"], jnp.float32).mean((1, 2)) / 255


@pytest.mark.parametrize("batch_size", [8, 16, 56])
def test_knn_counts_every_query_once(colours, batch_size):
  mesh = meshes.make_mesh(8, 1)
  context = Context({"student": mean_colour}, mesh)
  evaluator = knn.Evaluator(context, dataset=colours, k=3, image_size=32, batch_size=batch_size)
  assert dict(evaluator.run({})) == {"student_accuracy": pytest.approx(40 / 50, abs=1e-9)}


@pytest.mark.parametrize("batch_size", [8, 16])
def test_zeroshot_counts_every_image_once(colours, batch_size):
  """The text of class g is the colour g, whatever the template says of it."""
  names = ("airplane", "automobile", "bird")
  tokenize = lambda captions: np.array(
    [[next((i for i, name in enumerate(names) if name in caption), 3)] for caption in captions]
  )
  predict = {
    "image": mean_colour,
    "text": lambda state, batch: jnp.eye(4, 3)[batch["tokens"][:, 0]] + jnp.array([[0.0, 0.0, 1e-3]]),
  }
  context = Context(predict, meshes.make_mesh(8, 1), tokenize=tokenize)
  evaluator = zeroshot.Evaluator(
    context, dataset=colours, prompts="cifar10", image_size=32, batch_size=batch_size
  )
  # Of the ten wrong labels three say 0 of a blue image, to which classes 2 to 9 are all nearer.
  assert dict(evaluator.run({})) == {"accuracy": 40 / 50, "top5": 47 / 50}


def test_the_same_accuracy_on_one_device_and_on_eight(colours):
  one = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("data", "fsdp"))
  options = dict(dataset=colours, k=3, image_size=32, batch_size=8)
  results = [
    dict(knn.Evaluator(Context({"student": mean_colour}, mesh), **options).run({}))
    for mesh in (one, meshes.make_mesh(8, 1))
  ]
  assert results[0] == results[1]


def test_a_frozen_clip_is_evaluated_through_the_loop(tmp_path):
  """Zero steps of configs/zeroshot_cifar10.py on the CLIP of this repository and 32 random images."""
  small_world.write_cifar10(tmp_path)
  config = zeroshot_cifar10.get_config()
  config.data.dataset.data_dir = config.evals.zeroshot.dataset.data_dir = str(tmp_path)
  loop.train(config, str(tmp_path / "run"))
  (line,) = small_world.metrics(tmp_path / "run")

  clip_config, params = clip_weights.load(config.clip.path)
  tokenize, model = clip_tokenizer.load_tokenizer(config.clip.path), clip.CLIP(clip_config)
  image = np.load(tmp_path / "cifar10" / "arrays" / "test_images.npy") / np.float32(255)
  pixels = (image - np.float32(NORMALIZATIONS["clip"][0])) / np.float32(NORMALIZATIONS["clip"][1])
  image_BP = np.asarray(model.apply({"params": params}, jnp.asarray(pixels), method="encode_image"))
  class_GP = []
  for captions in prompts.captions(cifar10.CLASS_NAMES, "cifar10"):
    text = np.asarray(model.apply({"params": params}, jnp.asarray(tokenize(captions)), method="encode_text"))
    mean = np.mean([row / np.linalg.norm(row) for row in text], axis=0)
    class_GP.append(mean / np.linalg.norm(mean))
  order = np.argsort(-image_BP @ np.transpose(class_GP), axis=1)
  right = [order[i, :count].tolist().count(i % 10) for count in (1, 5) for i in range(len(order))]
  accuracy, top5 = np.reshape(right, (2, -1)).mean(axis=1)
  assert line == {"step": 0, "zeroshot/accuracy": accuracy, "zeroshot/top5": top5}


def test_a_frozen_clip_is_not_trained(tmp_path):
  with pytest.raises(ValueError, match=r"total_steps must be 0, not 3"):
    frozen_clip.build(zeroshot_cifar10.get_config(), Run(3, 1.0, 8))


# kNN: order and sharding -------------------------------------------------------------------------------

MESHES = {"1": lambda: meshes.make_mesh(devices=jax.devices()[:1]), "4x2": lambda: meshes.make_mesh(4, 2)}


@pytest.mark.parametrize("block", [8, 64])
@pytest.mark.parametrize("devices", MESHES)
def test_of_equal_similarities_the_first_example_is_the_nearer_one(devices, block, monkeypatch):
  """Features along the axes: cosines are exactly 0 or 1, nearly all of them ties."""
  monkeypatch.setattr(knn, "BLOCK", block)
  rng = np.random.default_rng(2)
  bank, queries = (np.eye(5, dtype=np.float32)[rng.integers(0, 5, size)] for size in (77, 21))
  labels = rng.integers(0, 4, 77)
  options = dict(num_classes=4, k=9, temperature=0.5)
  order = np.argsort(-queries @ bank.T, axis=1, kind="stable")[:, :9]
  votes = np.zeros((21, 4), np.float32)
  for query, neighbours in enumerate(order):
    for place in neighbours:
      votes[query, labels[place]] += np.exp(np.float32((queries[query] @ bank[place] - 1) / 0.5))
  predicted = knn.knn_predict(bank, labels, queries, mesh=MESHES[devices](), block=8, **options)
  np.testing.assert_array_equal(predicted, votes.argmax(axis=1))


def test_neighbours_and_similarities_are_the_same_bits_on_one_device_and_on_eight(monkeypatch):
  monkeypatch.setattr(knn, "BLOCK", 64)
  rng = np.random.default_rng(3)
  bank, queries = (rng.normal(size=(size, 96)).astype(np.float32) for size in (700, 32))
  found = []
  for make in MESHES.values():
    mesh = make()
    search = jax.jit(functools.partial(knn.nearest, mesh=mesh, k=30))
    found.append(search(knn.bank_of(bank, np.arange(700), mesh), jnp.asarray(queries)))
  for one, many in zip(*found, strict=True):
    np.testing.assert_array_equal(one, many)
  np.testing.assert_array_equal(found[0].index, found[0].label)
  unit = lambda x: x / np.linalg.norm(x, axis=1, keepdims=True)
  cosine = unit(queries.astype(np.float64)) @ unit(bank.astype(np.float64)).T
  np.testing.assert_array_equal(found[0].index, np.argsort(-cosine, axis=1)[:, :30])


def test_padding_never_votes_and_no_temperature_is_too_low():
  """All of the bank lies opposite to the queries: rows of zeros would be nearer."""
  bank = -np.ones((9, 4), np.float32) - 0.1 * RNG.random((9, 4), np.float32)
  queries = np.ones((3, 4), np.float32)
  queries[1, 2] = np.nan
  options = dict(num_classes=3, k=9, temperature=1e-4, mesh=meshes.make_mesh(8, 1))
  predicted = knn.knn_predict(bank, np.full(9, 2), queries, **options)
  assert predicted.tolist() == [2, -1, 2]  # of features that are no numbers there is no answer
  near = np.concatenate([queries[:1], bank[1:]])
  assert knn.knn_predict(near, np.array([1] + [2] * 8), queries[:1], **options).tolist() == [1]


def test_several_k_in_one_pass_are_each_k_alone(colours):
  options = dict(dataset=colours, image_size=32, batch_size=16, temperature=1.0)

  def noisy(state, batch):
    angle = 1.7 * batch["index"].astype(jnp.float32)
    return mean_colour(state, batch) + jnp.stack([jnp.sin(angle), jnp.cos(angle), jnp.sin(3 * angle)], axis=1)

  context = Context({"student": noisy}, meshes.make_mesh(8, 1))
  make = lambda k: knn.Evaluator(context, k=k, **options)
  together = dict(make((40, 1, 7)).run({}))
  assert together == {f"student_accuracy_k{k}": dict(make(k).run({}))["student_accuracy"] for k in (1, 7, 40)}
  assert len(set(together.values())) > 1


def test_limits_count_examples_and_a_short_bank_is_named(colours):
  options = dict(dataset=colours, image_size=32, batch_size=16)
  context = Context({"student": mean_colour}, meshes.make_mesh(8, 1))
  make = lambda **more: knn.Evaluator(context, **options, **more)
  # Of the first 11 queries numbers 0, 5 and 10 are labelled wrongly.
  assert dict(make(k=3, max_bank=21, max_queries=11).run({})) == {"student_accuracy": 8 / 11}
  with pytest.raises(ValueError, match=r"k = 20 .* data set 'cifar10', which has 19"):
    dict(make(k=20, max_bank=19).run({}))
  with pytest.raises(ValueError, match="at least one neighbour"):
    make(k=())


def write_colours(root, splits=("train", "val"), classes=("a", "b", "c", "d"), count=12):
  """Folders of pictures in one colour a class; c and d have the same."""
  for split in splits:
    for label, name in enumerate(classes):
      for i in range(count):
        path = root / split / name / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), [(200, 0, i), (0, 200, i), (0, i, 200), (0, i, 200)][label]).save(path)
  return {"name": "folder", "data_dir": str(root)}


def make_knn(dataset, **options):
  options = dict(k=1, image_size=8, batch_size=8) | options
  context = Context({"student": mean_colour}, meshes.make_mesh(8, 1))
  return knn.Evaluator(context, dataset=dataset, **options)


def test_a_quick_look_at_a_folder_sees_all_classes(tmp_path):
  """The first 24 of 48 would be the classes that are easy to tell apart: an accuracy of 1."""
  dataset = write_colours(tmp_path)
  whole = dict(make_knn(dataset).run({}))
  assert whole == {"student_accuracy": 0.75}
  assert dict(make_knn(dataset, max_bank=24, max_queries=24).run({})) == whole


def test_a_sorted_set_that_is_read_in_sequence_is_told(tmp_path, caplog):
  """tfrecord files give nothing but their first examples."""

  class Stream:
    def __init__(self, source):
      self._source = source

    def num_local(self, process_index, process_count):
      return len(self._source)

    def read(self, process_index, process_count, seed, skip):
      return iter([self._source[i] | {"index": i} for i in range(skip, len(self._source))])

  made = make_knn(write_colours(tmp_path), max_bank=24)
  made._bank = plugins.build("datasets", write_colours(tmp_path), split="train")
  made._bank = dataclasses.replace(made._bank, source=Stream(made._bank.source))
  dict(made.run({}))
  assert "its first 24 examples show this process 2: it seems to be sorted" in caplog.text


class TestClassesOfTwoSplits:
  def test_classes_that_the_bank_lacks_are_named(self, tmp_path):
    dataset = write_colours(tmp_path)
    write_colours(tmp_path, splits=("val",), classes=("eel", "fox"), count=1)
    with pytest.raises(
      OptionError, match=rf"'{tmp_path}/val' has 2 classes \(eel, fox\) that '{tmp_path}/train'"
    ):
      make_knn(dataset)

  def test_images_that_are_no_class(self, tmp_path):
    write_colours(tmp_path, splits=("train",))
    dataset = write_colours(tmp_path, splits=("val",), classes=("images",), count=8)
    with pytest.raises(OptionError, match=r"has 1 class \(images\) that .*4 classes \(a, b, c, d\)"):
      make_knn(dataset)
    rows = "".join(f"{i:02d}.png a 0 0 8 8\n" for i in range(8))
    (tmp_path / "val" / "val_annotations.txt").write_text(rows)
    assert dict(make_knn(dataset).run({})) == {"student_accuracy": 1.0}

  def test_classes_that_the_evaluated_split_lacks_are_one_line(self, tmp_path, caplog):
    caplog.set_level("INFO")
    write_colours(tmp_path, splits=("train",))
    dataset = write_colours(tmp_path, splits=("val",), classes=("a", "b"))
    assert dict(make_knn(dataset).run({})) == {"student_accuracy": 1.0}
    assert f"'{tmp_path}/val' has no example of 2 classes (c, d) of '{tmp_path}/train'" in caplog.text

  @pytest.mark.parametrize("name", ["classification", "best_head"])
  def test_a_classifier_is_compared_with_what_it_was_trained_on(self, tmp_path, name):
    """Two data sets: of the same names in another place, of fewer, and of the labels for names."""
    module, more = {"classification": (classification, {}), "best_head": (best_head, {"held_out": "val"})}[
      name
    ]
    predict = {key: mean_colour for key in ("logits", "rates")}
    training = plugins.build("datasets", write_colours(tmp_path / "train"), split="train")
    context = Context(predict, meshes.make_mesh(8, 1), training=training)
    make = lambda dataset: module.Evaluator(context, dataset=dataset, image_size=8, batch_size=8, **more)
    make(write_colours(tmp_path / "same", splits=("val",)))
    make(write_colours(tmp_path / "numbers", splits=("val",), classes=("0", "1", "2", "3")))
    with pytest.raises(
      OptionError, match=r"in two ways: 'b' is 0 of 3 in the first and 1 of 4 in the second"
    ):
      make(write_colours(tmp_path / "fewer", splits=("val",), classes=("b", "c", "d")))
    with pytest.raises(OptionError, match=r"2 classes \(cat, dog\) that .*/train/train' does not have"):
      make(write_colours(tmp_path / "others", splits=("val",), classes=("cat", "dog")))

  def test_a_part_may_lack_classes(self, tmp_path, caplog):
    dataset = write_colours(tmp_path)
    assert dict(make_knn(dataset, bank="train[:2]").run({}))["student_accuracy"] <= 0.5
    assert "/train[:2]' has no example of " in caplog.text


def test_captions_are_embedded_in_batches_of_one_shape(colours):
  """180 captions, 16 at a time on eight devices: the same accuracies, and one compilation."""
  shapes = []

  def text(state, batch):
    shapes.append(batch["tokens"].shape)
    return jnp.eye(10)[batch["tokens"][:, 0]]

  names = cifar10.CLASS_NAMES
  tokenize = lambda captions: np.array([[names.index(text.split()[-1][:-1])] for text in captions])
  context = Context({"text": text}, meshes.make_mesh(8, 1), tokenize=tokenize)
  dataset = plugins.build("datasets", colours, split="test")
  make = lambda size: zeroshot.ClassEmbeddings(context, dataset, "cifar10", batch_size=size)
  np.testing.assert_array_equal(make(15)({}), np.eye(10))
  assert shapes == [(16, 1)] * 12
  np.testing.assert_array_equal(make(1000)({}), np.eye(10))
  assert shapes[12:] == [(184, 1)]
