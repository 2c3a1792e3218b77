"""The classifier for fine-tuning, and the transfer of parameters from a pre-trained student."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_vit import apply

from dtm_jax.models import positions
from dtm_jax.models.vit import classifier as vit_classifier
from dtm_jax.models.vit import config as vit_config
from dtm_jax.models.vit import model as vit
from dtm_jax.models.vit import transfer as vit_transfer

TINY = {"patch_size": 4, "width": 24, "depth": 2, "num_heads": 3}


def image(batch_size=2, side=20):
  return jnp.asarray(np.random.default_rng(1).standard_normal((batch_size, side, side, 3), np.float32))


def random_params(model, grid=(5, 5), seed=0):
  rng = np.random.default_rng(seed)
  shapes = vit_config.param_shapes(model, grid)
  return jax.tree.map(lambda leaf: 0.3 * rng.standard_normal(leaf.shape, np.float32), shapes)


def fresh_params(model, side=20):
  """Return other parameters, in place of initial ones, which would have to be compiled."""
  return random_params(model, (side // model.patch_size,) * 2, seed=7)


def init(model, side):
  return jax.jit(partial(vit.init, model, image_size=side))(jax.random.key(7))


def layer_norm(x, p):
  x = np.asarray(x, np.float64)
  x = x - x.mean(-1, keepdims=True)
  return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * p["scale"] + p["bias"]


@pytest.mark.parametrize(("pooling", "norm"), [("mean", "fc_norm"), ("cls", "norm")])
def test_classifier_head_matches_numpy(pooling, norm):
  """Takes the residual stream from the student and computes pooling, LayerNorm and head with NumPy."""
  student = vit.VisionTransformer(**TINY)
  model = vit_classifier.Classifier(**TINY, num_classes=7, pooling=pooling, shared_rel_pos_bias=True)
  params = random_params(model)
  assert {"fc_norm", "norm"} & set(params) == {norm}
  trunk = {name: part for name, part in params.items() if name not in ("head", "fc_norm")}
  rest = random_params(student)
  tokens = apply(student, {**rest, **trunk}, image())["tokens"]
  outputs = apply(model, params, image())
  np.testing.assert_allclose(outputs["tokens"], tokens, atol=1e-5)
  pooled = tokens[:, 1:].mean(axis=1) if pooling == "mean" else tokens[:, 0]
  features = layer_norm(pooled, params[norm])
  np.testing.assert_allclose(outputs["features"], features, atol=1e-5)
  logits = features @ params["head"]["kernel"] + params["head"]["bias"]
  np.testing.assert_allclose(outputs["logits"], logits, atol=1e-5)


@pytest.mark.parametrize(("variant", "count"), [("B", 86_530_984)])
def test_parameter_counts(variant, count):
  shapes = vit_config.param_shapes(vit_classifier.build(variant, num_classes=1000), (14, 14))
  assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)) == count


def test_initial_values():
  model = vit_classifier.build("Ti", depth=2, num_classes=500, layer_scale_init=1e-5)
  params = init(model, side=32)
  np.testing.assert_allclose(np.std(params["head"]["kernel"]), 2e-5, rtol=0.02)
  np.testing.assert_array_equal(params["head"]["bias"], 0)
  np.testing.assert_array_equal(params["fc_norm"]["scale"], 1)
  np.testing.assert_allclose(np.std(params["cls_token"]), 0.02, rtol=0.2)
  assert np.abs(params["blocks"]["attn"]["qkv"]["kernel"]).max() > 0.06  # not cut, as pre-training's is
  for leaf in params["patch_embed"]["proj"].values():  # U(-1/16/sqrt(3), 1/16/sqrt(3))
    bound = (3 * 16 * 16) ** -0.5
    assert 0.95 * bound < np.abs(leaf).max() <= bound
    np.testing.assert_allclose(np.std(leaf), bound / math.sqrt(3), rtol=0.1)
  first, second = params["blocks"]["mlp"]["fc2"]["kernel"]
  np.testing.assert_allclose(np.std(first) / np.std(second), math.sqrt(2), rtol=0.02)
  np.testing.assert_array_equal(params["blocks"]["layer_scale1"], np.full((2, 192), 1e-5, np.float32))
  doubled = init(model.clone(head_init_scale=0.002), side=32)
  np.testing.assert_allclose(doubled["head"]["kernel"], 2 * params["head"]["kernel"], rtol=1e-6)


def test_drop_path_acts_in_training_only():
  model = vit_classifier.Classifier(**TINY, num_classes=7, drop_path=0.5)
  params = random_params(model)

  @jax.jit
  def train(seed):
    rngs = {"drop_path": jax.random.key(seed)}
    return model.apply({"params": params}, image(8), train=True, rngs=rngs)["logits"]

  assert np.abs(train(0) - train(1)).max() > 1e-3
  evaluated = apply(model, params, image(8))["logits"]
  np.testing.assert_array_equal(evaluated, apply(model.clone(drop_path=0.0), params, image(8))["logits"])


def test_wrong_options_are_named():
  with pytest.raises(ValueError, match=r"'max'.*mean, cls"):
    vit_classifier.build("B", pooling="max")
  with pytest.raises(ValueError, match=r"'H'.*Ti, S, B, L"):
    vit_classifier.build("H")
  with pytest.raises(ValueError, match=r"Width 24 .* 5 heads"):
    vit_classifier.Classifier(**TINY | {"num_heads": 5})


# From the student.


@pytest.fixture(scope="module")
def student():
  model = vit.VisionTransformer(**TINY, out_dim=7)
  return model, random_params(model)


@pytest.fixture(scope="module")
def classifier():
  model = vit_classifier.Classifier(**TINY, num_classes=7)
  return model, fresh_params(model)


def test_both_tables_keep_the_students_outputs(student, classifier):
  (model, params), (target, fresh) = student, classifier
  start = vit_transfer.to_finetune(params, fresh, grid=(5, 5))
  assert jax.tree.structure(start) == jax.tree.structure(fresh)
  expected = apply(model, params, image())["tokens"]
  np.testing.assert_allclose(apply(target, start, image())["tokens"], expected, atol=1e-4)
  for name in ("fc_norm", "head"):  # a head of 7 outputs is still the teacher's, not of 7 classes
    jax.tree.map(np.testing.assert_array_equal, start[name], fresh[name])


def test_rel_pos_chooses_the_tables(student, classifier):
  (_, params), (_, fresh) = student, classifier
  table = lambda rel_pos: vit_transfer.to_finetune(params, fresh, grid=(5, 5), rel_pos=rel_pos)["blocks"][
    "attn"
  ]["rel_pos_bias"]["table"]
  own = params["blocks"]["attn"]["rel_pos_bias"]["table"]
  shared = np.broadcast_to(params["rel_pos_bias"]["table"], own.shape)
  np.testing.assert_array_equal(table("own"), own)
  np.testing.assert_array_equal(table("shared"), shared)
  np.testing.assert_array_equal(table("both"), own + shared)


def test_missing_tables_are_refused(student, classifier):
  fresh = classifier[1]
  own_only = random_params(vit.VisionTransformer(**TINY, shared_rel_pos_bias=False))
  shared_only = random_params(vit.VisionTransformer(**TINY, rel_pos_bias=False))
  for params, rel_pos in ((own_only, "shared"), (shared_only, "own")):
    with pytest.raises(ValueError, match=f"rel_pos='{rel_pos}': the parameters have no such table"):
      vit_transfer.to_finetune(params, fresh, grid=(5, 5), rel_pos=rel_pos)
    vit_transfer.to_finetune(params, fresh, grid=(5, 5), rel_pos="both")
  with pytest.raises(ValueError, match=r"'none'.*both, own, shared"):
    vit_transfer.to_finetune(own_only, fresh, grid=(5, 5), rel_pos="none")


def test_cls_pooling_takes_the_students_norm(student):
  _, params = student
  fresh = fresh_params(vit_classifier.Classifier(**TINY, num_classes=7, pooling="cls"))
  start = vit_transfer.to_finetune(params, fresh, grid=(5, 5))
  jax.tree.map(np.testing.assert_array_equal, start["norm"], params["norm"])


@pytest.mark.parametrize("resize", positions.BIAS_RESIZES)
def test_positions_are_resized_to_another_grid(resize):
  """The summed tables and the positions are resized, and nothing else changes."""
  params = random_params(vit.VisionTransformer(**TINY, abs_pos_emb=True))
  fresh = fresh_params(vit_classifier.Classifier(**TINY, abs_pos_emb=True, num_classes=7), side=28)
  start = vit_transfer.to_finetune(params, fresh, grid=(7, 7), resize=resize)
  summed = params["blocks"]["attn"]["rel_pos_bias"]["table"] + params["rel_pos_bias"]["table"][None]
  expected = positions.resize_bias_table(summed, (5, 5), (7, 7), method=resize)
  np.testing.assert_array_equal(start["blocks"]["attn"]["rel_pos_bias"]["table"], expected)
  expected = positions.resize_positions(jnp.asarray(params["pos_embed"]), (7, 7), slack=0.0)
  np.testing.assert_array_equal(start["pos_embed"], expected)
  jax.tree.map(np.testing.assert_array_equal, start["blocks"]["mlp"], params["blocks"]["mlp"])
  with pytest.raises(ValueError, match="do not fit the classifier") as error:
    vit_transfer.to_finetune(params, fresh, grid=(6, 6), resize=resize)
  assert "blocks/attn/rel_pos_bias/table: (2, 124, 3), the classifier wants (2, 172, 3)" in str(error.value)
  assert "pos_embed: (37, 24), the classifier wants (50, 24)" in str(error.value)


def test_a_classifier_starts_from_a_classifier(classifier):
  """Another image size keeps the head. Other classes get a new head."""
  model = classifier[0]
  params = random_params(model)
  larger = vit_transfer.to_finetune(params, fresh_params(model, side=28), grid=(7, 7))
  for name in ("head", "fc_norm"):
    jax.tree.map(np.testing.assert_array_equal, larger[name], params[name])
  other = fresh_params(vit_classifier.Classifier(**TINY, num_classes=9))
  start = vit_transfer.to_finetune(params, other, grid=(5, 5))
  np.testing.assert_array_equal(start["head"]["kernel"], other["head"]["kernel"])
  np.testing.assert_array_equal(start["fc_norm"]["scale"], params["fc_norm"]["scale"])


def test_mismatched_shapes_are_listed(student):
  _, params = student
  deeper = fresh_params(vit_classifier.Classifier(**TINY | {"depth": 3}, num_classes=7))
  with pytest.raises(ValueError, match=r"blocks/ln1/scale: \(2, 24\), the classifier wants \(3, 24\)"):
    vit_transfer.to_finetune(params, deeper, grid=(5, 5))


# To another student.


def test_a_student_starts_from_a_student(student):
  """The same grid keeps the outputs, another teacher gets a new head, and a finer grid is resized."""
  model, params = student
  same = vit_transfer.to_student(params, fresh_params(model), grid=(5, 5))
  jax.tree.map(np.testing.assert_array_equal, same, params)
  wider = model.clone(out_dim=9)
  fresh = fresh_params(wider)
  start = vit_transfer.to_student(params, fresh, grid=(5, 5))
  jax.tree.map(np.testing.assert_array_equal, start, params | {"head": fresh["head"]})
  finer = vit_transfer.to_student(params, fresh_params(model, side=28), grid=(7, 7))
  expected = positions.resize_bias_table(params["rel_pos_bias"]["table"], (5, 5), (7, 7))
  np.testing.assert_array_equal(finer["rel_pos_bias"]["table"], expected)


def test_a_student_may_gain_tables_but_never_loses_one(student):
  model, params = student
  beit = random_params(model.clone(rel_pos_bias=False))  # BEiT v2 has the shared table alone
  start = vit_transfer.to_student(beit, init(model, side=20), grid=(5, 5))
  expected = apply(model.clone(rel_pos_bias=False), beit, image())["prediction"]
  np.testing.assert_allclose(apply(model, start, image())["prediction"], expected, atol=1e-5)
  fresh = fresh_params(model.clone(rel_pos_bias=False))
  with pytest.raises(ValueError, match="no place for blocks/attn/rel_pos_bias/table: set its rel_pos_bias"):
    vit_transfer.to_student(params, fresh, grid=(5, 5))


def test_a_student_starts_from_a_classifier(student, classifier):
  """The student does not take the classifier's head and fc_norm."""
  model = student[0].clone(shared_rel_pos_bias=False)
  fresh = fresh_params(model)
  params = random_params(classifier[0])
  start = vit_transfer.to_student(params, fresh, grid=(5, 5))
  for name in ("head", "mask_token", "norm"):
    jax.tree.map(np.testing.assert_array_equal, start[name], fresh[name])
  jax.tree.map(np.testing.assert_array_equal, start["blocks"], params["blocks"])
