"""The kNN evaluator against its definition, on any number of devices and with any padding."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from coloured_images import mean_colour, write_cifar10, write_folder

from dtm_jax import plugins
from dtm_jax.evaluators import Context, _knn_bank, knn
from dtm_jax.evaluators._knn_bank import add_batch, empty_bank, require_neighbours
from dtm_jax.evaluators._knn_search import classify, nearest
from dtm_jax.training import mesh as meshes

MESHES = {"1": lambda: meshes.make_mesh(devices=jax.devices()[:1]), "4x2": lambda: meshes.make_mesh(4, 2)}


@pytest.fixture(scope="module")
def colours(tmp_path_factory):
  return write_cifar10(tmp_path_factory.mktemp("colours"))


def make(dataset, mesh=None, features=mean_colour, **options):
  context = Context({"student": jax.jit(features)}, mesh or meshes.make_mesh(8, 1))
  return knn.Evaluator(context, dataset=dataset, **dict(image_size=32, batch_size=16) | options)


def make_for_folder(dataset, **options):
  return make(dataset, MESHES["1"](), **dict(k=1, image_size=8, batch_size=8) | options)


def padded(x, size):
  return np.pad(x, ((0, size - len(x)), *((0, 0),) * (x.ndim - 1)))


def bank_of(features, labels, mesh):
  """Return a bank with these features [M, D], in as few batches as a block allows."""
  count, width = features.shape
  size = math.ceil(min(count, _knn_bank.BLOCK) / mesh.size) * mesh.size
  bank = empty_bank(mesh, count, size, width)
  for place, start in enumerate(range(0, count, size)):
    index = np.arange(start, start + size)
    rows = (padded(np.asarray(x)[start : start + size], size) for x in (features, labels))
    bank = add_batch(bank, place, *rows, index, index < count)
  return bank


def predict(bank, labels, queries, *, num_classes, k, temperature, mesh=None, block=512):
  """Return the class of each query, `block` queries at a time."""
  require_neighbours((k,), len(bank), "arrays")
  mesh = mesh or meshes.make_mesh(devices=jax.local_devices()[:1])
  on_devices = bank_of(bank, labels, mesh)
  classes = [
    classify(
      on_devices, padded(queries[start : start + block], block),
      mesh=mesh, num_classes=num_classes, ks=(k,), temperature=temperature,
    )[0]
    for start in range(0, len(queries), block)
  ]  # fmt: skip
  return np.concatenate([np.asarray(part) for part in classes])[: len(queries)]


def slow_knn(bank, bank_labels, queries, num_classes, k, temperature):
  """The definition: each query, each neighbour, one vote after another."""
  unit = lambda x: x / np.linalg.norm(x)
  predicted = []
  for query in queries:
    cosine = np.array([unit(query) @ unit(example) for example in bank])
    votes = np.zeros(num_classes)
    for neighbour in np.argsort(-cosine)[:k]:
      votes[bank_labels[neighbour]] += np.exp(cosine[neighbour] / temperature)
    predicted.append(votes.argmax())
  return predicted


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (5, 0.07), (20, 1.0)])
def test_knn_is_its_definition(k, temperature):
  rng = np.random.default_rng(0)
  bank, queries = (rng.normal(size=(size, 6)).astype(np.float32) for size in (40, 13))
  labels = rng.integers(0, 4, 40)
  options = dict(num_classes=4, k=k, temperature=temperature)
  expected = slow_knn(bank, labels, queries, **options)
  # There are 13 queries in blocks of 5, so the last block is padded.
  np.testing.assert_array_equal(predict(bank, labels, queries, block=5, **options), expected)
  scaled = predict(3 * bank, labels, 0.1 * queries, block=5, **options)
  np.testing.assert_array_equal(scaled, expected)  # only directions count


def test_knn_needs_k_examples():
  bank = np.ones((3, 2), np.float32)
  with pytest.raises(ValueError, match=r"k = 5 .* has 3"):
    predict(bank, np.zeros(3, int), bank, num_classes=1, k=5, temperature=0.07)


# Of 50 queries, 8 and 56 leave a part of the last batch empty, as 16 do.
@pytest.mark.parametrize("batch_size", [8, 56, pytest.param(16, marks=pytest.mark.long)])
def test_every_query_counts_once(colours, batch_size):
  evaluator = make(colours, k=3, batch_size=batch_size)
  assert dict(evaluator.run({})) == {"student_accuracy": pytest.approx(40 / 50, abs=1e-9)}


def test_the_same_accuracy_on_one_device_and_on_eight(colours):
  one = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("data", "fsdp"))
  results = [dict(make(colours, mesh, k=3, batch_size=8).run({})) for mesh in (one, meshes.make_mesh(8, 1))]
  assert results[0] == results[1]


@pytest.mark.parametrize("block", [8, 64])
@pytest.mark.parametrize("devices", MESHES)
def test_the_first_of_equally_similar_examples_is_the_nearer_one(devices, block, monkeypatch):
  """The features lie along the axes, so cosines are exactly 0 or 1 and nearly all of them are ties."""
  monkeypatch.setattr(_knn_bank, "BLOCK", block)
  rng = np.random.default_rng(2)
  bank, queries = (np.eye(5, dtype=np.float32)[rng.integers(0, 5, size)] for size in (77, 21))
  labels = rng.integers(0, 4, 77)
  options = dict(num_classes=4, k=9, temperature=0.5)
  order = np.argsort(-queries @ bank.T, axis=1, kind="stable")[:, :9]
  votes = np.zeros((21, 4), np.float32)
  for query, neighbours in enumerate(order):
    for place in neighbours:
      votes[query, labels[place]] += np.exp(np.float32((queries[query] @ bank[place] - 1) / 0.5))
  predicted = predict(bank, labels, queries, mesh=MESHES[devices](), block=8, **options)
  np.testing.assert_array_equal(predicted, votes.argmax(axis=1))


def test_neighbours_and_similarities_are_the_same_bits_on_one_device_and_on_eight(monkeypatch):
  monkeypatch.setattr(_knn_bank, "BLOCK", 64)
  rng = np.random.default_rng(3)
  bank, queries = (rng.normal(size=(size, 96)).astype(np.float32) for size in (700, 32))
  found = []
  for make_mesh in MESHES.values():
    mesh = make_mesh()
    search = jax.jit(functools.partial(nearest, mesh=mesh, k=30))
    found.append(search(bank_of(bank, np.arange(700), mesh), jnp.asarray(queries)))
  for one, many in zip(*found, strict=True):
    np.testing.assert_array_equal(one, many)
  np.testing.assert_array_equal(found[0].index, found[0].label)
  unit = lambda x: x / np.linalg.norm(x, axis=1, keepdims=True)
  cosine = unit(queries.astype(np.float64)) @ unit(bank.astype(np.float64)).T
  np.testing.assert_array_equal(found[0].index, np.argsort(-cosine, axis=1)[:, :30])


def test_padding_never_votes_and_no_temperature_is_too_low():
  """The whole bank lies opposite to the queries, so rows of zeros would be nearer."""
  bank = -np.ones((9, 4), np.float32) - 0.1 * np.random.default_rng(0).random((9, 4), np.float32)
  queries = np.ones((3, 4), np.float32)
  queries[1, 2] = np.nan
  options = dict(num_classes=3, k=9, temperature=1e-4, mesh=meshes.make_mesh(8, 1))
  predicted = predict(bank, np.full(9, 2), queries, **options)
  assert predicted.tolist() == [2, -1, 2]  # NaN features have no class
  near = np.concatenate([queries[:1], bank[1:]])
  assert predict(near, np.array([1] + [2] * 8), queries[:1], **options).tolist() == [1]


def test_several_k_in_one_pass_are_each_k_alone(colours):
  def noisy(state, batch):
    angle = 1.7 * batch["index"].astype(jnp.float32)
    return mean_colour(state, batch) + jnp.stack([jnp.sin(angle), jnp.cos(angle), jnp.sin(3 * angle)], axis=1)

  mesh = MESHES["1"]()
  accuracies = lambda k: dict(make(colours, mesh, noisy, k=k, temperature=1.0).run({}))
  together = accuracies((40, 1, 7))
  assert together == {f"student_accuracy_k{k}": accuracies(k)["student_accuracy"] for k in (1, 7, 40)}
  assert len(set(together.values())) > 1


def test_limits_count_examples_and_the_error_of_a_small_bank_names_its_data_set(colours):
  # Numbers 0, 5 and 10 of the first 11 queries have wrong labels.
  assert dict(make(colours, k=3, max_bank=21, max_queries=11).run({})) == {"student_accuracy": 8 / 11}
  with pytest.raises(ValueError, match=r"k = 20 .* data set 'cifar10', which has 19"):
    dict(make(colours, k=20, max_bank=19).run({}))
  with pytest.raises(ValueError, match="at least one neighbour"):
    make(colours, k=())


def test_a_limited_number_of_images_of_a_folder_shows_all_classes(tmp_path):
  """The first 24 of 48 images have classes that are easy to tell apart and would give an accuracy of 1."""
  dataset = write_folder(tmp_path)
  whole = dict(make_for_folder(dataset).run({}))
  assert whole == {"student_accuracy": 0.75}
  assert dict(make_for_folder(dataset, max_bank=24, max_queries=24).run({})) == whole


def test_the_log_names_a_sorted_data_set_that_is_read_in_sequence(tmp_path, caplog):
  """A tfrecord file gives only its first examples."""

  class Stream:
    def __init__(self, source):
      self._source = source

    def num_local(self, process_index, process_count):
      return len(self._source)

    def read(self, process_index, process_count, seed, skip):
      return iter([self._source[i] | {"index": i} for i in range(skip, len(self._source))])

  dataset = write_folder(tmp_path)
  evaluator = make_for_folder(dataset, max_bank=24)
  whole = plugins.build("datasets", dataset, split="train")
  evaluator._bank = dataclasses.replace(whole, source=Stream(whole.source))
  dict(evaluator.run({}))
  assert "Its first 24 examples show this process 2 of them, so it seems to be sorted" in caplog.text
