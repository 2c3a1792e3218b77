"""CLIP's towers against transformers in PyTorch, stage by stage, and resized positions against NumPy."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dtm_jax.models.clip import model as clip
from dtm_jax.models.clip import weights as clip_weights
from dtm_jax.models.positions import resize_positions

TINY = clip.CLIPConfig(
  clip.ImageConfig(clip.Tower(32, 3, 4, 64), image_size=32, patch_size=8),
  clip.TextConfig(clip.Tower(24, 2, 3, 48), 60, 10, pad_token_id=0, bos_token_id=2, eos_token_id=3),
  embed_dim=16,
)
TEXT = [[2, 9, 41, 30, 3, 0, 0, 0, 0, 0], [2, 59, 3, 3, 3, 3, 3, 3, 3, 3], [2, 5, 6, 7, 8, 9, 10, 11, 12, 3]]


def image(size, batch_size=2, seed=0):
  return jnp.asarray(np.random.default_rng(seed).standard_normal((batch_size, size, size, 3), np.float32))


def initial(model, *inputs):
  return jax.device_get(jax.jit(model.init)(jax.random.key(0), *inputs)["params"])


@pytest.fixture(scope="module")
def tiny_params():
  return initial(clip.CLIP(TINY), image(32), jnp.array(TEXT))


def relative_difference(ours, theirs):
  theirs = theirs.detach().numpy()
  assert ours.shape == theirs.shape
  return np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max()


def torch_clip(**options):
  """Return a CLIPModel of transformers with every parameter far from its initial zeros and ones."""
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  torch.manual_seed(0)
  tower = {"hidden_act": options.pop("hidden_act", "quick_gelu"), "num_hidden_layers": 3}
  config = transformers.CLIPConfig(
    vision_config=tower
    | {
      "hidden_size": 32,
      "intermediate_size": 64,
      "num_attention_heads": 4,
      "image_size": 32,
      "patch_size": 8,
    },
    text_config=tower
    | {"hidden_size": 24, "intermediate_size": 48, "num_attention_heads": 3, "vocab_size": 60}
    | {"max_position_embeddings": 10, "eos_token_id": options.pop("eos_token_id", 3), "bos_token_id": 2}
    | {"pad_token_id": 0},
    projection_dim=16,
  )
  model = transformers.CLIPModel(config).eval()
  with torch.no_grad():
    for parameter in model.parameters():
      parameter.add_(0.2 * torch.randn_like(parameter))
  return model


def tower_stages(tower, params, inputs):
  apply = jax.jit(partial(tower.apply, mutable="intermediates"))
  outputs, state = apply({"params": params}, inputs)
  return outputs, state["intermediates"]["blocks"]["output"][0]


def check_image_tower(model, config, params, pixels):
  torch = pytest.importorskip("torch")
  theirs = torch.from_numpy(np.array(pixels)).permute(0, 3, 1, 2)
  with torch.no_grad():
    vision = model.vision_model(pixel_values=theirs, output_hidden_states=True)
    normed = model.vision_model.post_layernorm(vision.last_hidden_state)
    cls_embedding = model.visual_projection(vision.pooler_output)
    patch_embeddings = model.visual_projection(normed[:, 1:])
  outputs, blocks = tower_stages(clip.ImageTower(config.image, config.embed_dim), params["image"], pixels)
  differences = {
    "pre": relative_difference(outputs["pre"], vision.hidden_states[0]),
    "cls_embedding": relative_difference(outputs["cls_embedding"], cls_embedding),
    "patch_tokens": relative_difference(outputs["patch_tokens"], normed[:, 1:]),
    "patch_embeddings": relative_difference(outputs["patch_embeddings"], patch_embeddings),
  }
  for layer, (ours, hidden) in enumerate(zip(blocks, vision.hidden_states[1:], strict=True)):
    differences[f"block {layer}"] = relative_difference(ours, hidden)
  print(differences)
  assert max(differences.values()) < 1e-5, differences


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_image_tower_matches_transformers(tmp_path, activation):
  model = torch_clip(hidden_act=activation)
  model.save_pretrained(tmp_path)
  config, params = clip_weights.load(tmp_path)
  assert config.image.tower.activation == activation
  check_image_tower(model, config, params, image(32))


# The end token has nothing to do with the activation. So each of them stays once.
@pytest.mark.parametrize(("eos_token_id", "activation"), [
  (3, "quick_gelu"), (2, "gelu"),
  pytest.param(3, "gelu", marks=pytest.mark.long), pytest.param(2, "quick_gelu", marks=pytest.mark.long),
])  # fmt: skip
def test_text_tower_matches_transformers(tmp_path, activation, eos_token_id):
  torch = pytest.importorskip("torch")
  model = torch_clip(hidden_act=activation, eos_token_id=eos_token_id)
  model.save_pretrained(tmp_path)
  config, params = clip_weights.load(tmp_path)
  with torch.no_grad():
    text = model.text_model(input_ids=torch.tensor(TEXT), output_hidden_states=True)
    embedding = model.text_projection(text.pooler_output)
  outputs, blocks = tower_stages(
    clip.TextTower(config.text, config.embed_dim), params["text"], jnp.array(TEXT)
  )
  assert relative_difference(outputs["pre"], text.hidden_states[0]) < 1e-5
  assert relative_difference(outputs["tokens"], text.last_hidden_state) < 1e-5
  assert relative_difference(outputs["embedding"], embedding) < 1e-5
  for layer in range(3):
    theirs = text.hidden_states[layer + 1]
    assert relative_difference(blocks[layer], theirs) < 1e-5


@pytest.mark.slow
@pytest.mark.long  # small towers match transformers above
def test_full_size_image_tower_matches_transformers(tmp_path):
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  torch.manual_seed(0)
  model = transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(patch_size=16)).eval()
  with torch.no_grad():
    for parameter in model.parameters():
      parameter.add_(0.02 * torch.randn_like(parameter))
  model.save_pretrained(tmp_path)
  config, params = clip_weights.load(tmp_path)
  assert config.image == clip.ImageConfig()
  check_image_tower(model, config, params, image(224, batch_size=1))


def test_text_embedding_depends_on_the_end_token_not_on_padding(tiny_params):
  model = clip.CLIP(TINY)
  text = np.array(TEXT)
  other_padding, other_word = text.copy(), text.copy()
  other_padding[:, 5:] = other_word[:, 3] = 17
  embed = jax.jit(lambda text: model.apply({"params": tiny_params}, text, method="encode_text"))
  np.testing.assert_array_equal(embed(text[:1]), embed(other_padding[:1]))
  assert np.abs(embed(text[:1]) - embed(other_word[:1])).max() > 1e-3
  text = jnp.asarray(text)
  np.testing.assert_array_equal(clip.end_of_text(text, 3), [4, 2, 9])
  np.testing.assert_array_equal(clip.end_of_text(text, clip.LEGACY_EOS), [2, 1, 8])


def test_initial_scales():
  config = clip.CLIPConfig(
    clip.ImageConfig(clip.Tower(256, 4, 4, 1024), 32, 8),
    clip.TextConfig(clip.Tower(192, 2, 3, 768), 500),
    128,
  )
  params = initial(clip.CLIP(config), image(32), jnp.zeros((1, 77), int))
  blocks = params["image"]["blocks"]
  spread = {
    256**-0.5: [blocks["attn"]["query"], params["image"]["projection"]],
    (8 * 256) ** -0.5: [blocks["attn"]["out"], blocks["mlp"]["fc2"]],
    512**-0.5: [blocks["mlp"]["fc1"]],
  }
  for std, layers in spread.items():
    for layer in layers:
      np.testing.assert_allclose(layer["kernel"].std(), std, rtol=0.02)
  np.testing.assert_allclose(params["text"]["token_embedding"].std(), 0.02, rtol=0.02)
  np.testing.assert_allclose(params["text"]["position_embedding"].std(), 0.01, rtol=0.03)
  np.testing.assert_allclose(np.exp(params["logit_scale"]), 1 / 0.07, rtol=1e-6)


def cubic_sample(values, position, a=-0.75):
  """Interpolate a sequence by Keys' kernel, clamped at the border, one output at a time."""
  first = int(np.floor(position))
  total = 0.0
  for tap in range(first - 1, first + 3):
    t = abs(position - tap)
    weight = (a + 2) * t**3 - (a + 3) * t**2 + 1 if t <= 1 else a * t**3 - 5 * a * t**2 + 8 * a * t - 4 * a
    total = total + weight * values[min(max(tap, 0), len(values) - 1)]
  return total


@pytest.mark.parametrize("grid", [(6, 6), (3, 5), (9, 4)])
def test_resized_positions_match_the_documented_bicubic(grid):
  side = 4
  table = np.asarray(jax.random.normal(jax.random.key(0), (1 + side**2, 5)))
  place = lambda out, size: (out + 0.5) * side / (size + 0.1) - 0.5
  square = table[1:].reshape(side, side, 5)
  columns = np.stack([cubic_sample(square.swapaxes(0, 1), place(x, grid[1])) for x in range(grid[1])], axis=1)
  expected = np.stack([cubic_sample(columns, place(y, grid[0])) for y in range(grid[0])])
  resized = resize_positions(jnp.asarray(table), grid)
  np.testing.assert_allclose(resized[1:], expected.reshape(-1, 5), atol=1e-6)
  np.testing.assert_array_equal(resized[0], table[0])


def test_resized_positions_match_torch():
  torch = pytest.importorskip("torch")
  table = jax.random.normal(jax.random.key(0), (1 + 49, 4))
  square = torch.from_numpy(np.array(table[1:]).reshape(1, 7, 7, 4)).permute(0, 3, 1, 2)
  scale = (10 + 0.1) / 7, (12 + 0.1) / 7
  theirs = torch.nn.functional.interpolate(
    square, scale_factor=scale, mode="bicubic", recompute_scale_factor=False
  )
  theirs = theirs[0].permute(1, 2, 0).reshape(120, 4).numpy()
  np.testing.assert_allclose(resize_positions(table, (10, 12))[1:], theirs, atol=1e-5)


def test_the_stored_grid_keeps_its_positions_and_other_grids_run(tiny_params):
  tower = clip.ImageTower(TINY.image, TINY.embed_dim)
  params = jax.tree.map(jnp.asarray, tiny_params["image"])
  assert resize_positions(params["position_embedding"], (4, 4)) is params["position_embedding"]
  outputs = jax.eval_shape(tower.apply, {"params": params}, jnp.ones((2, 40, 24, 3)))
  assert outputs["patch_embeddings"].shape == (2, 15, 16)
  with pytest.raises(ValueError, match=r"30x30.*patch size 8"):
    tower.apply({"params": params}, image(30))


def test_patch_dropout_keeps_a_random_subset_in_training_only(tiny_params):
  tower = clip.ImageTower(TINY.image, TINY.embed_dim, patch_dropout=0.75)
  params, rngs = tiny_params["image"], {"patch_dropout": jax.random.key(1)}
  pre = lambda pixels, **options: tower.apply({"params": params}, pixels, **options)["pre"]
  whole = np.asarray(jax.jit(pre)(image(32)))
  kept = np.asarray(jax.jit(partial(pre, train=True, rngs=rngs))(image(32)))
  assert whole.shape == (2, 17, 32)
  assert kept.shape == (2, 5, 32)
  places = [[int(np.abs(row[None] - whole[b]).max(axis=-1).argmin()) for row in kept[b]] for b in range(2)]
  for b in range(2):
    assert places[b][0] == 0
    assert len(set(places[b])) == 5
    np.testing.assert_allclose(kept[b], whole[b][np.array(places[b])], atol=1e-6)
  assert set(places[0]) != set(places[1])


def test_bfloat16_stays_near_float32(tiny_params):
  text = jnp.array(TEXT)
  for inputs, method in ((image(32), "encode_image"), (text, "encode_text")):
    exact, rough = (
      jax.jit(partial(clip.CLIP(TINY, dtype=dtype).apply, method=method))({"params": tiny_params}, inputs)
      for dtype in ("float32", "bfloat16")
    )
    assert rough.dtype == jnp.float32
    assert 1e-6 < np.abs(exact - rough).max() / np.abs(exact).max() < 0.03


def test_wrong_sizes_are_named():
  with pytest.raises(ValueError, match=r"'relu'.*quick_gelu, gelu"):
    clip.Tower(32, 1, 4, 64, activation="relu")
  with pytest.raises(ValueError, match=r"Width 30 .* 4 heads"):
    clip.Tower(30, 1, 4, 64)
  tower = clip.TextTower(TINY.text, 16)
  with pytest.raises(ValueError, match="11 tokens exceed the context length 10"):
    tower.init(jax.random.key(0), jnp.zeros((1, 11), int))
