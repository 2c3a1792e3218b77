"""The student against a forward pass in NumPy; its parameter counts, initial scales and random parts."""

import math
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import erf, softmax

from dtm_jax.models.vit import config as vit_config
from dtm_jax.models.vit import model as vit
from dtm_jax.models.vit.attention import relative_position_index

TINY = {"patch_size": 4, "width": 24, "depth": 2, "num_heads": 3, "out_dim": 10}


def image(batch_size=2, height=12, width=8):
  return jnp.asarray(np.random.default_rng(1).standard_normal((batch_size, height, width, 3), np.float32))


def random_params(model, pixels):
  """Return parameters far from the zeros and ones of initialisation, including all biases."""
  grid = tuple(pixels // model.patch_size for pixels in pixels.shape[1:3])
  shapes = vit_config.param_shapes(model, grid)
  rng = np.random.default_rng(0)
  return jax.tree.map(lambda leaf: 0.3 * rng.standard_normal(leaf.shape, np.float32), shapes)


@cache
def compiled(model):
  return jax.jit(model.apply)


def apply(model, params, *args):
  return compiled(model)({"params": params}, *args)


def layer_norm(x, p):
  x = x - x.mean(-1, keepdims=True)
  return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * p["scale"] + p["bias"]


def relative_bias(table, rows, columns):
  """Return the biases [A, 1+N, 1+N], computed one entry at a time."""
  num_tokens = 1 + rows * columns
  bias = np.zeros((table.shape[1], num_tokens, num_tokens))
  for i in range(num_tokens):
    for j in range(num_tokens):
      if i == 0 or j == 0:
        row = len(table) - (1 if i == j else 3 if i == 0 else 2)
      else:
        dy = (i - 1) // columns - (j - 1) // columns
        dx = (i - 1) % columns - (j - 1) % columns
        row = (dy + rows - 1) * (2 * columns - 1) + dx + columns - 1
      bias[:, i, j] = table[row]
  return bias


def numpy_student(params, pixels, mask, num_heads, patch):
  """Compute the forward pass in float64 with loops over images, blocks and heads."""
  params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
  rows, columns = pixels.shape[1] // patch, pixels.shape[2] // patch
  outputs = []
  for picture, hidden in zip(np.asarray(pixels, np.float64), mask, strict=True):
    embed = params["patch_embed"]["proj"]
    x = [params["cls_token"]]
    for place in range(rows * columns):
      y, z = divmod(place, columns)
      crop = picture[y * patch : (y + 1) * patch, z * patch : (z + 1) * patch]
      x.append(params["mask_token"] if hidden[place] else crop.reshape(-1) @ embed["kernel"] + embed["bias"])
    x = np.stack(x)
    if "pos_embed" in params:
      x = x + params["pos_embed"]
    for layer in range(params["blocks"]["layer_scale1"].shape[0]):
      p = jax.tree.map(lambda leaf: leaf[layer], params["blocks"])  # noqa: B023
      q, k, v = np.split(layer_norm(x, p["ln1"]) @ p["attn"]["qkv"]["kernel"], 3, axis=1)
      q, v = q + p["attn"]["q_bias"], v + p["attn"]["v_bias"]
      bias = relative_bias(p["attn"]["rel_pos_bias"]["table"], rows, columns)
      bias = bias + relative_bias(params["rel_pos_bias"]["table"], rows, columns)
      size = x.shape[1] // num_heads
      heads = []
      for a in range(num_heads):
        mine = slice(a * size, (a + 1) * size)
        heads.append(softmax(q[:, mine] @ k[:, mine].T / math.sqrt(size) + bias[a], axis=1) @ v[:, mine])
      attended = np.concatenate(heads, axis=1) @ p["attn"]["proj"]["kernel"] + p["attn"]["proj"]["bias"]
      x = x + p["layer_scale1"] * attended
      fc1, fc2 = p["mlp"]["fc1"], p["mlp"]["fc2"]
      h = layer_norm(x, p["ln2"]) @ fc1["kernel"] + fc1["bias"]
      h = h * 0.5 * (1 + erf(h / math.sqrt(2)))
      x = x + p["layer_scale2"] * (h @ fc2["kernel"] + fc2["bias"])
    normed = layer_norm(x, params["norm"])
    prediction = normed[1:] @ params["head"]["kernel"] + params["head"]["bias"]
    outputs.append({"tokens": x, "cls": normed[0], "patches": normed[1:], "prediction": prediction})
  return {name: np.stack([output[name] for output in outputs]) for name in outputs[0]}


@pytest.mark.parametrize("abs_pos_emb", [False, True])
def test_forward_pass_matches_numpy(abs_pos_emb):
  model = vit.VisionTransformer(**TINY, abs_pos_emb=abs_pos_emb)
  params = random_params(model, image())
  mask = np.array([[True, False, True, False, False, False], [False] * 5 + [True]])
  ours = apply(model, params, image(), mask)
  oracle = numpy_student(params, image(), mask, TINY["num_heads"], TINY["patch_size"])
  assert ours.keys() == oracle.keys()
  for name, expected in oracle.items():
    assert ours[name].shape == expected.shape
    assert np.abs(ours[name] - expected).max() / np.abs(expected).max() < 1e-5, name


def test_outputs_depend_on_visible_pixels_only():
  model = vit.VisionTransformer(**TINY)
  params = random_params(model, image())
  mask, nothing = np.zeros((2, 2, 6), bool)
  mask[:, 3] = True  # row 1, column 1
  changed = np.array(image())
  changed[:, 4:8, 4:8] += 1.0
  predict = lambda *args: apply(model, params, *args)["prediction"]
  np.testing.assert_array_equal(predict(image(), mask), predict(changed, mask))
  assert np.abs(predict(image(), nothing) - predict(changed, nothing)).max() > 1e-2
  np.testing.assert_array_equal(predict(image(), nothing), predict(image()))


@pytest.mark.parametrize(
  ("variant", "both", "shared_only"),
  [("S", 21_849_224, 21_796_520), ("B", 86_165_264, 86_059_856), ("L", 303_943_104, 303_662_016)],
)
def test_parameter_counts(variant, both, shared_only):
  def count(**options):
    model = vit.build(variant, out_dim=512, **options)
    shapes = jax.eval_shape(partial(vit.init, model, image_size=224), jax.random.key(0))
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))

  assert count() == both
  assert count(rel_pos_bias=False) == shared_only


def test_optional_parameters_exist_only_if_their_option_is_set():
  names = lambda **options: set(random_params(vit.VisionTransformer(**TINY | options), image()))
  everything = {"patch_embed", "mask_token", "cls_token", "rel_pos_bias", "blocks", "norm", "head"}
  assert names() == everything
  assert names(out_dim=None, shared_rel_pos_bias=False) == everything - {"head", "rel_pos_bias"}
  assert names(abs_pos_emb=True) == everything | {"pos_embed"}
  for off in (None, 0.0):
    params = random_params(vit.VisionTransformer(**TINY, layer_scale_init=off, rel_pos_bias=False), image())
    assert set(params["blocks"]) == {"ln1", "attn", "ln2", "mlp"}
    assert set(params["blocks"]["attn"]) == {"qkv", "q_bias", "v_bias", "proj"}


def test_initial_values():
  model = vit.build("Ti", depth=3, out_dim=64, abs_pos_emb=True, layer_scale_init=1e-5)
  params = jax.jit(partial(vit.init, model, image_size=32))(jax.random.key(0))
  blocks = params["blocks"]
  drawn = [
    params["patch_embed"]["proj"]["kernel"],
    params["head"]["kernel"],
    blocks["attn"]["qkv"]["kernel"],
    blocks["mlp"]["fc1"]["kernel"],
    *(
      layer["kernel"][i] * np.sqrt(2 * (i + 1))
      for layer in (blocks["attn"]["proj"], blocks["mlp"]["fc2"])
      for i in range(3)
    ),
  ]
  for leaf in drawn:
    np.testing.assert_allclose(np.std(leaf), 0.010793, rtol=0.02)
    assert 0.0199 < np.abs(leaf).max() <= 0.0200001
  for leaf in (params["cls_token"], params["mask_token"], params["pos_embed"]):
    np.testing.assert_allclose(np.std(leaf), 0.010793, rtol=0.15)
    assert np.abs(leaf).max() <= 0.0200001
  zero = [params["rel_pos_bias"]["table"], blocks["attn"]["rel_pos_bias"]["table"], params["head"]["bias"]]
  zero += [blocks["attn"]["q_bias"], blocks["attn"]["v_bias"], blocks["mlp"]["fc1"]["bias"]]
  assert all(not np.any(leaf) for leaf in zero)
  for name in ("layer_scale1", "layer_scale2"):
    np.testing.assert_array_equal(blocks[name], np.full((3, 192), 1e-5, np.float32))
  first, second = blocks["attn"]["qkv"]["kernel"][:2]
  assert np.abs(first - second).max() > 0.01


def test_relative_position_index():
  index = relative_position_index(14, 14)
  assert index.shape == (197, 197)
  assert index.max() == 731
  np.testing.assert_array_equal(np.unique(index), np.arange(732))
  assert (index[0, 1:] == 729).all()
  assert (index[1:, 0] == 730).all()
  assert index[0, 0] == 731
  assert index[1, 2] == 13 * 27 + 12  # the query is one column left of the key


def test_drop_path_drops_whole_examples_and_keeps_the_expectation():
  """With an MLP of zeros in the last block and rate 1/2, its attention is either dropped or doubled."""
  model = vit.VisionTransformer(**TINY | {"depth": 2, "drop_path": 0.5, "rel_pos_bias": False})
  pixels = image(batch_size=8)
  params = random_params(model, pixels)
  params["blocks"]["mlp"]["fc2"] = jax.tree.map(np.zeros_like, params["blocks"]["mlp"]["fc2"])
  off = params["blocks"]["layer_scale1"] * np.float32([[1.0], [0.0]])
  without = apply(model, params | {"blocks": params["blocks"] | {"layer_scale1": off}}, pixels)["tokens"]
  without = np.asarray(without)
  branch = apply(model, params, pixels)["tokens"] - without
  train = lambda key: model.apply({"params": params}, pixels, train=True, rngs={"drop_path": key})["tokens"]
  sampled = jax.jit(jax.vmap(train))(jax.random.split(jax.random.key(3), 200)) - without[None]
  factor = np.einsum("kbtd,btd->kb", sampled, branch) / np.einsum("btd,btd->b", branch, branch)[None]
  np.testing.assert_allclose(sampled, factor[:, :, None, None] * branch[None], atol=1e-4)
  kept = np.asarray(factor) > 1
  np.testing.assert_allclose(factor, np.where(kept, 2.0, 0.0), atol=1e-4)
  assert abs(kept.mean() - 0.5) < 4 * 0.5 / math.sqrt(kept.size)
  assert (kept.any(axis=1) & ~kept.all(axis=1)).any()  # examples are dropped one by one


def test_drop_path_is_off_in_evaluation_and_in_the_first_block():
  model = vit.VisionTransformer(**TINY | {"depth": 1, "drop_path": 0.9})
  params = random_params(model, image())
  evaluated = apply(model, params, image())["tokens"]
  train = lambda key: model.apply({"params": params}, image(), train=True, rngs={"drop_path": key})["tokens"]
  trained = jax.jit(train)(jax.random.key(0))
  np.testing.assert_allclose(trained, evaluated, atol=1e-6)


@cache
def gradient(remat):
  model = vit.VisionTransformer(**TINY, drop_path=0.3, remat=remat)
  mask, rngs = jnp.arange(12).reshape(2, 6) % 3 == 0, {"drop_path": jax.random.key(4)}
  forward = lambda params: model.apply({"params": params}, image(), mask, train=True, rngs=rngs)
  loss = lambda params: jnp.mean(forward(params)["prediction"] ** 2)
  return jax.jit(jax.grad(loss))(random_params(model, image()))


@pytest.mark.parametrize("remat", [
  "activations", "elementwise",
  # "activations" does what "attention" does, and "block" differs from "elementwise" in its policy only.
  pytest.param("attention", marks=pytest.mark.long), pytest.param("block", marks=pytest.mark.long),
])  # fmt: skip
def test_remat_changes_no_gradient(remat):
  plain = gradient("none")
  assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(plain))
  jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), gradient(remat), plain)


def test_remat_of_attention_stores_no_probabilities():
  def residuals(remat):
    model = vit.VisionTransformer(**TINY, remat=remat)
    params = random_params(model, image(height=32, width=32))
    loss = lambda params: model.apply({"params": params}, image(height=32, width=32))["prediction"].sum()
    return {leaf.shape for leaf in jax.tree.leaves(jax.eval_shape(lambda p: jax.vjp(loss, p)[1], params))}

  heads_and_tokens = lambda shape: shape[-2:] == (65, 65) and 2 in shape[1:-2]  # one for each image
  assert any(map(heads_and_tokens, residuals("none")))
  for remat in ("attention", "activations", "elementwise", "block"):
    assert not any(map(heads_and_tokens, residuals(remat)))


def test_remat_of_activations_keeps_one_array_of_the_hidden_layer():
  def hidden(remat):
    model = vit.VisionTransformer(**TINY, remat=remat)
    params = random_params(model, image())
    loss = lambda params: model.apply({"params": params}, image())["prediction"].sum()
    kept = jax.tree.leaves(jax.eval_shape(lambda p: jax.vjp(loss, p)[1], params))
    return sum(leaf.shape[-3:] == (2, 7, 96) for leaf in kept)

  # The input of the GELU, and its output, which is the input of fc2.
  assert hidden("activations") == 2 < hidden("none")


def test_bfloat16_stays_near_float32_and_leaves_float32_parameters():
  params = random_params(vit.VisionTransformer(**TINY), image())
  exact, rough = (
    apply(vit.VisionTransformer(**TINY, dtype=dtype), params, image())["prediction"]
    for dtype in ("float32", "bfloat16")
  )
  assert rough.dtype == jnp.float32
  assert 1e-5 < np.abs(exact - rough).max() / np.abs(exact).max() < 0.05
  model = vit.VisionTransformer(**TINY, dtype="bfloat16")
  loss = lambda params: jnp.mean(model.apply({"params": params}, image())["prediction"] ** 2)
  gradient = jax.jit(jax.grad(loss))(params)
  assert all(leaf.dtype == jnp.float32 and np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_wrong_options_are_named():
  with pytest.raises(ValueError, match=r"'H'.*Ti, S, B, L"):
    vit.build("H")
  with pytest.raises(ValueError, match=r"'all'.*none, attention, activations, elementwise, block"):
    vit.build("Ti", remat="all")
  with pytest.raises(ValueError, match=r"Width 100 .* 3 heads"):
    vit.build("Ti", width=100)
  with pytest.raises(ValueError, match=r"30x32 .*patch size 16"):
    vit.build("Ti").init(jax.random.key(0), jnp.zeros((1, 30, 32, 3)))
