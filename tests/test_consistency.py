"""The consistency evaluator and its measures against plain loops and known answers."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_world

from dtm_jax.datasets import evenly
from dtm_jax.evaluators import Context
from dtm_jax.evaluators._least_squares import LeastSquares, classify
from dtm_jax.evaluators._token_measures import majority_size, neighbour_cosine
from dtm_jax.evaluators._unit_norm import unit_norm
from dtm_jax.evaluators.consistency import Evaluator
from dtm_jax.training import mesh as meshes

RNG = np.random.default_rng(0)


def test_neighbour_cosine_is_its_definition():
  tokens = RNG.normal(size=(2, 6, 5))
  expected = []
  for image in tokens.reshape(2, 2, 3, 5):
    pairs = [(image[r, q], image[r, q + 1]) for r in range(2) for q in range(2)]
    pairs += [(image[0, q], image[1, q]) for q in range(3)]
    expected.append(np.mean([x @ y / np.linalg.norm(x) / np.linalg.norm(y) for x, y in pairs]))
  np.testing.assert_allclose(neighbour_cosine(tokens, (2, 3)), expected, atol=1e-12)


def test_majority_size_is_its_definition():
  predicted, groups = RNG.integers(0, 4, (3, 12)), RNG.integers(0, 5, (3, 12))
  expected = [
    sum(max(list(p[g == group]).count(c) for c in range(4)) for group in set(g.tolist()))
    for p, g in zip(predicted, groups, strict=True)
  ]
  measure = jax.jit(majority_size)
  np.testing.assert_array_equal(measure(predicted, groups), expected)
  alone = np.broadcast_to(np.arange(12), (3, 12))
  np.testing.assert_array_equal(measure(predicted, alone), [12] * 3)


def test_least_squares_in_parts_is_the_pseudo_inverse_at_once():
  tokens, label = RNG.normal(size=(30, 4, 6)), RNG.integers(0, 3, 30)
  probe = LeastSquares(6, 3, ridge=0.0)
  for part in (slice(0, 7), slice(7, 30)):
    probe.add(tokens[part], label[part])
  x = unit_norm(tokens).reshape(-1, 6)
  x = np.concatenate([x, np.ones((len(x), 1))], axis=1)
  expected = np.linalg.pinv(x) @ np.eye(3)[np.repeat(label, 4)]
  np.testing.assert_allclose(probe.solve(), expected, atol=1e-9)
  np.testing.assert_array_equal(
    classify(tokens, expected), (x @ expected).argmax(1).reshape(30, 4)
  )  # fmt: skip


MORPHERS = {
  "identity": {"name": "identity"},
  "image": {"name": "image"},
  "pairs": {"name": "bipartite", "min_groups": 8, "max_groups": 8},
}


def evaluator(world, mesh, has_text=True, **options):
  """Return an evaluator and its class embeddings. A token is the mean of 8x8 pixels."""

  @jax.jit
  def patches(state, batch):
    blocks = batch["image"].astype(jnp.float32).reshape(-1, 4, 8, 4, 8, 3)
    return blocks.mean(axis=(2, 4)).reshape(-1, 16, 3) - 127.0

  texts = np.random.default_rng(5).normal(size=(10, 3)).astype(np.float32)
  image = lambda state, batch: batch["image"].astype(jnp.float32).mean(axis=(1, 2)) - 127.0
  predict = {
    "image": image,
    "patches": patches,
    "text": lambda state, batch: texts[np.asarray(batch["tokens"])[:, 0]],
  }
  names = iter(range(10))  # the classes are tokenized one after the other
  keywords = dict(
    dataset={"name": "cifar10", "data_dir": str(world)},
    morphers=MORPHERS,
    prompts="cifar10",
    image_size=32,
    batch_size=24,
  )
  tokenize = lambda captions: np.full((len(captions), 1), next(names))
  context = Context(predict, mesh, tokenize=tokenize if has_text else None)
  return Evaluator(context, **keywords | options), texts


@pytest.fixture(scope="module")
def measured(world):
  """Return an evaluator on eight devices, its class embeddings and its numbers."""
  made, texts = evaluator(world, meshes.make_mesh(8, 1))
  return made, texts, dict(made.run({}))


@pytest.fixture
def one(one_device):
  """Return the mesh of one device."""
  return meshes.make_mesh()


def test_numbers_equal_those_of_plain_loops(world, measured):
  _, texts, result = measured
  arrays = world / "cifar10" / "arrays"
  image, label = (np.load(arrays / f"test_{name}.npy") for name in ("images", "labels"))
  tokens = image.astype(np.float64).reshape(-1, 4, 8, 4, 8, 3).mean((2, 4)).reshape(-1, 16, 3) - 127
  texts = unit_norm(texts)
  zeroshot = lambda x: np.mean(
    [[np.argmax(texts @ t) == y for t in row] for row, y in zip(x, label, strict=True)]
  )
  assert result["tokens_zeroshot"] == pytest.approx(zeroshot(tokens), abs=1e-12)
  mean = np.broadcast_to(tokens.mean(1, keepdims=True), tokens.shape)
  assert result["image_zeroshot"] == pytest.approx(zeroshot(mean), abs=1e-12)
  assert result["image_cosine"] == pytest.approx(1.0, abs=1e-6)
  for name in ("zeroshot", "linear", "cosine"):
    assert result[f"identity_{name}"] == pytest.approx(result[f"tokens_{name}"], abs=1e-6)
  assert result["identity_linear_purity"] == result["identity_zeroshot_purity"] == 1.0
  assert result["image_zeroshot_purity"] < result["pairs_zeroshot_purity"] < 1.0


def test_counts_do_not_depend_on_the_number_of_devices(world, measured, one):
  results = measured[2], dict(evaluator(world, one)[0].run({}))
  counted = [{k: v for k, v in r.items() if not k.endswith("cosine")} for r in results]
  assert counted[0] == counted[1]


def test_a_limited_number_of_images_and_a_task_without_text(world, one):
  made, _ = evaluator(world, one, has_text=False, prompts=None, max_images=5, max_fit=30)
  result = dict(made.run({}))
  assert not [name for name in result if "zeroshot" in name]
  assert (5 * 16 * result["tokens_linear"]) % 1 == pytest.approx(0, abs=1e-9)
  with pytest.raises(ValueError, match="prompts='cifar10' need a text tower"):
    evaluator(world, one, has_text=False)


@pytest.mark.usefixtures("one_device")
def test_it_runs_in_pre_training(world, tmp_path):
  """Measures the student's predictions and the teacher's tokens before the first step of the debug config."""
  from dtm_jax import loop

  config = small_world.debug_config(world, total_steps=0, student__width=16, student__depth=1)
  section = importlib.import_module("configs.consistency").get_config().evals.consistency
  section.dataset.data_dir = str(world)
  section.update(prompts=None, batch_size=32, max_fit=32)
  section.morphers = dict(bipartite=section.morphers.bipartite)
  config.evals = {who: section.copy_and_resolve_references() for who in ("student_tokens", "teacher_tokens")}
  for who in config.evals:
    config.evals[who].update(name="consistency", tokens=who)
  loop.train(config, str(tmp_path))
  line = [line for line in small_world.metrics(tmp_path) if "student_tokens/bipartite_linear" in line][-1]
  assert line["teacher_tokens/bipartite_cosine"] > line["teacher_tokens/tokens_cosine"]


def test_majority_size_of_a_thousand_classes_equals_votes_counted_by_class():
  """The largest array is [B, N, N], so it does not grow with the number of classes."""
  predicted, groups = RNG.integers(0, 1000, (6, 49)), RNG.integers(0, 12, (6, 49))
  predicted[3:] = RNG.choice([0, 7, 999], (3, 49))  # three of the classes, so that there are majorities
  votes_BNG = np.zeros((6, 49, 1000), int)
  np.add.at(votes_BNG, (np.arange(6)[:, None], groups, predicted), 1)
  result = jax.jit(majority_size)(predicted, groups)
  np.testing.assert_array_equal(result, votes_BNG.max(axis=2).sum(axis=1))
  largest = jax.make_jaxpr(majority_size)(jnp.asarray(predicted), jnp.asarray(groups))
  assert max(variable.aval.size for e in largest.eqns for variable in e.outvars) == 6 * 49 * 49


def test_classify_on_the_device_is_classify_on_the_host():
  tokens, weights = RNG.normal(size=(5, 9, 16)), RNG.normal(size=(17, 1000))
  on_device = jax.jit(classify)(jnp.asarray(tokens, jnp.float32), jnp.asarray(weights, jnp.float32))
  np.testing.assert_array_equal(on_device, classify(tokens, weights))


def test_evenly_spaced_images_of_a_split():
  from dtm_jax import data

  dataset = data.Dataset("ten", 10, ("a",), [{"label": i} for i in range(10)])
  assert [evenly(dataset, 4).source[i]["label"] for i in range(4)] == [0, 2, 5, 7]
  assert len(evenly(dataset, 99).source) == evenly(dataset, 99).num_examples == 10

  class Sequence:
    def num_local(self, process_index, process_count): ...
    def read(self, process_index, process_count, seed, skip): ...

  with pytest.raises(ValueError, match=r"random access, and 'told' has none"):
    evenly(data.Dataset("told", 10, ("a",), Sequence()), 4)


def test_examples_are_the_first_of_each_class_with_the_groups_of_the_run(measured):
  made, texts, numbers = measured
  found = made.examples({}, 13)  # of ten classes, in batches of 24
  np.testing.assert_array_equal(found.index_B, range(13))  # the labels are 0..9, 0, 1, 2, ...
  np.testing.assert_array_equal(found.label_B, np.arange(13) % 10)
  image_score = (found.image_BHW3.astype(np.float64).mean((1, 2)) - 127) @ unit_norm(texts).T
  np.testing.assert_array_equal(found.predicted_B, image_score.argmax(-1))
  expected = (found.token_BSNC.astype(np.float64) @ unit_norm(texts).T).argmax(-1)
  np.testing.assert_array_equal(found.zeroshot_BSN, expected)
  everyone = made.examples({}, 32)
  right = (everyone.zeroshot_BSN == everyone.label_B[:, None, None]).mean(axis=(0, 2))
  np.testing.assert_allclose(right, [numbers[f"{name}_zeroshot"] for name in made.names], atol=1e-12)
