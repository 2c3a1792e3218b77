"""CLIP's weights: round trips through files, transformers as another reader, and complete error messages."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file, save_file

from dtm_jax.models.clip import config as clip_config
from dtm_jax.models.clip import model as clip
from dtm_jax.models.clip import tokenizer as clip_tokenizer
from dtm_jax.models.clip import weights as clip_weights
from dtm_jax.models.files import weight_files
from dtm_jax.models.files.file_checks import UnreadableFileError

CONFIG = clip.CLIPConfig(
  clip.ImageConfig(clip.Tower(32, 3, 4, 64), image_size=32, patch_size=8),
  clip.TextConfig(clip.Tower(24, 2, 3, 48, "gelu"), 60, 10, pad_token_id=0, bos_token_id=2, eos_token_id=3),
  embed_dim=16,
  init_logit_scale=2.5,
)
TEXT = [[2, 9, 41, 30, 3, 0, 0, 0, 0, 0], [2, 5, 6, 7, 8, 9, 10, 11, 12, 3]]


@pytest.fixture(scope="module")
def params():
  """Return random parameters, so a test sees if two tensors of one shape are exchanged."""
  rng = np.random.default_rng(0)
  token = jnp.zeros((1, 10), int)
  shapes = jax.eval_shape(clip.CLIP(CONFIG).init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)), token)[
    "params"
  ]
  return jax.tree.map(lambda leaf: 0.3 * rng.standard_normal(leaf.shape, np.float32), shapes)


@pytest.fixture
def folder(tmp_path, params):
  clip_weights.save(tmp_path, CONFIG, params)
  return tmp_path


def assert_same(ours, theirs):
  ours, theirs = flatten_dict(ours, sep="/"), flatten_dict(theirs, sep="/")
  assert ours.keys() == theirs.keys()
  for name in ours:
    np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)


def test_save_and_load_round_trip(folder, params):
  config, loaded = clip_weights.load(folder)
  assert config == CONFIG
  assert_same(loaded, params)
  assert all(isinstance(leaf, np.ndarray) and leaf.dtype == np.float32 for leaf in jax.tree.leaves(loaded))


def test_every_rule_is_used_and_every_name_is_unique(params):
  assert flatten_dict(params, sep="/").keys() == clip_weights.RULES.keys()
  names = [name for name, _ in clip_weights.RULES.values()]
  assert len(names) == len(set(names))


def test_half_precision_on_disk(tmp_path, params):
  clip_weights.save(tmp_path, CONFIG, params, dtype="float16")
  assert {tensor.dtype for tensor in load_file(tmp_path / "model.safetensors").values()} == {
    np.dtype("float16")
  }
  _, loaded = clip_weights.load(tmp_path)
  assert_same(loaded, jax.tree.map(lambda leaf: leaf.astype(np.float16).astype(np.float32), params))


def test_transformers_reads_what_we_save(folder, params):
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  model, report = transformers.CLIPModel.from_pretrained(folder, output_loading_info=True)
  assert not report["missing_keys"]
  assert not report["unexpected_keys"]
  assert not report["mismatched_keys"]
  pixels = jax.random.normal(jax.random.key(1), (2, 32, 32, 3))
  with torch.no_grad():
    theirs = model.eval()(
      input_ids=torch.tensor(TEXT), pixel_values=torch.from_numpy(np.array(pixels)).permute(0, 3, 1, 2)
    )
  image, text, logit_scale = jax.jit(clip.CLIP(CONFIG).apply)({"params": params}, pixels, jnp.array(TEXT))
  unit = lambda x: x / jnp.linalg.norm(x, axis=-1, keepdims=True)
  np.testing.assert_allclose(unit(image), theirs.image_embeds, atol=1e-5)
  np.testing.assert_allclose(unit(text), theirs.text_embeds, atol=1e-5)
  np.testing.assert_allclose(
    jnp.exp(logit_scale) * unit(image) @ unit(text).T, theirs.logits_per_image, atol=1e-5
  )


def test_a_vision_model_has_only_the_image_tower(tmp_path, params):
  config = clip.CLIPConfig(CONFIG.image, text=None, embed_dim=16)
  clip_weights.save(tmp_path, config, {"image": params["image"]})
  loaded_config, loaded = clip_weights.load(tmp_path)
  assert (loaded_config.image, loaded_config.text, loaded_config.embed_dim) == (CONFIG.image, None, 16)
  assert_same(loaded, {"image": params["image"]})


@pytest.mark.parametrize("projection", [True, False])
def test_vision_models_of_transformers(tmp_path, projection):
  """transformers 5 writes a CLIPVisionModel without the prefix "vision_model."."""
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  kind = transformers.CLIPVisionModelWithProjection if projection else transformers.CLIPVisionModel
  options = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
  config = transformers.CLIPVisionConfig(**options, image_size=32, patch_size=8, projection_dim=16)
  model = kind(config).eval()
  model.save_pretrained(tmp_path)
  names = load_file(tmp_path / "model.safetensors").keys()
  assert any(name.startswith("vision_model.") for name in names) == projection
  config, params = clip_weights.load(tmp_path)
  assert config.embed_dim == (16 if projection else None)
  pixels = jax.random.normal(jax.random.key(1), (2, 32, 32, 3))
  tower = clip.ImageTower(config.image, config.embed_dim)
  outputs = jax.jit(tower.apply)({"params": params["image"]}, pixels)
  with torch.no_grad():
    theirs = model(pixel_values=torch.from_numpy(np.array(pixels)).permute(0, 3, 1, 2))
  post = model.vision_model.post_layernorm if projection else model.post_layernorm
  expected = post(theirs.last_hidden_state)[:, 1:].detach()
  np.testing.assert_allclose(outputs["patch_tokens"], expected, atol=1e-5)
  if projection:
    np.testing.assert_allclose(outputs["cls_embedding"], theirs.image_embeds, atol=1e-5)


def test_position_ids_of_old_files_are_ignored(folder, params):
  file = folder / "model.safetensors"
  tensors = load_file(file) | {"vision_model.embeddings.position_ids": np.arange(17)[None]}
  save_file(tensors, file)
  assert_same(clip_weights.load(folder)[1], params)


def test_all_mismatches_are_listed_at_once(folder):
  file = folder / "model.safetensors"
  tensors = load_file(file)
  del tensors["vision_model.pre_layrnorm.bias"], tensors["text_model.encoder.layers.1.mlp.fc1.weight"]
  tensors["vision_model.encoder.layers.3.layer_norm1.bias"] = np.zeros(32, np.float32)
  tensors["visual_projection.weight"] = tensors["visual_projection.weight"].T.copy()
  save_file(tensors, file)
  with pytest.raises(ValueError, match="does not match its configuration") as error:
    clip_weights.load(folder)
  message = str(error.value)
  assert str(file) in message
  assert len(message.splitlines()) == 5
  for line in (
    "missing: vision_model.pre_layrnorm.bias (32,)",
    "missing: text_model.encoder.layers.1.mlp.fc1.weight (48, 24)",
    "unexpected: vision_model.encoder.layers.3.layer_norm1.bias (32,)",
    "shape of visual_projection.weight: (32, 16), expected (16, 32)",
  ):
    assert line in message


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_file_is_named_with_its_folder(folder, name):
  (folder / name).unlink()
  with pytest.raises(FileNotFoundError, match=name) as error:
    clip_weights.load(folder)
  assert str(folder) in str(error.value)
  assert "hf download" in str(error.value)


def test_a_path_that_is_neither_folder_nor_repository_is_refused(tmp_path):
  with pytest.raises(FileNotFoundError, match=r"no folder .*nowhere"):
    clip_weights.load(tmp_path / "nowhere")


@pytest.fixture
def offline_hub(tmp_path, monkeypatch):
  monkeypatch.setattr(weight_files.constants, "HF_HUB_OFFLINE", True)
  monkeypatch.setattr(weight_files.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
  repository = tmp_path / "hub" / "models--owner--tiny-clip"
  (repository / "refs").mkdir(parents=True)
  (repository / "refs" / "main").write_text("a" * 40)
  return repository / "snapshots" / ("a" * 40)


def test_the_hub_cache_serves_without_network(offline_hub, params, monkeypatch):
  clip_weights.save(offline_hub, CONFIG, params)
  download = weight_files.snapshot_download
  cache = str(offline_hub.parents[2])
  monkeypatch.setattr(weight_files, "snapshot_download", lambda *a, **k: download(*a, cache_dir=cache, **k))
  config, loaded = clip_weights.load("owner/tiny-clip")
  assert config == CONFIG
  assert_same(loaded, params)


def test_a_repository_outside_the_cache_is_refused_offline(offline_hub):
  with pytest.raises(FileNotFoundError, match=r"'owner/other' .*HF_HUB_OFFLINE is set") as error:
    clip_weights.load("owner/other")
  assert str(offline_hub.parents[2]) in str(error.value)
  assert "hf download owner/other" in str(error.value)
  assert f"There is no folder {Path.cwd() / 'owner/other'}. " in str(error.value)  # the other reading


def test_a_file_of_another_model_is_refused(folder):
  (folder / "config.json").write_text(json.dumps({"model_type": "bert"}))
  with pytest.raises(ValueError, match=r"'bert'.*clip, clip_vision_model"):
    clip_config.read(folder / "config.json")


@pytest.mark.parametrize(
  "content",
  [
    {"model_type": "clip"},
    {"model_type": "clip", "vision_config": None, "text_config": {"hidden_size": 64}, "projection_dim": 16},
    {
      "model_type": "clip",
      "vision_config": {"patch_size": 14, "layer_norm_eps": 1e-6},
      "vision_config_dict": {"patch_size": 16, "hidden_act": "gelu"},
      "text_config": {"vocab_size": 100},
      "text_config_dict": None,
      "logit_scale_init_value": 3,
    },
    {"model_type": "clip_vision_model", "image_size": 32, "num_hidden_layers": 2, "projection_dim": 64},
  ],
)
def test_a_configuration_is_read_as_transformers_reads_it(tmp_path, content):
  """We read it ourselves, because the import of transformers takes seconds."""
  transformers = pytest.importorskip("transformers")
  path = tmp_path / "config.json"
  path.write_text(json.dumps(content))
  ours = clip_config.read(path)
  both = content["model_type"] == "clip"
  theirs = (transformers.CLIPConfig if both else transformers.CLIPVisionConfig).from_pretrained(path)
  towers = [(ours.image, theirs.vision_config if both else theirs, clip_config.IMAGE)]
  towers += [(ours.text, theirs.text_config, clip_config.TEXT)] if both else []
  for config, expected, names in towers:
    for part, fields in ((config, names), (config.tower, clip_config.TOWER)):
      found = {name: getattr(part, own) for own, name in fields.items()}
      assert found == {name: getattr(expected, name) for name in found}
  assert ours.embed_dim == theirs.projection_dim
  assert not both or ours.init_logit_scale == theirs.logit_scale_init_value


def test_a_value_of_a_wrong_type_is_named(tmp_path):
  path = tmp_path / "config.json"
  path.write_text('{"model_type": "clip_vision_model", "image_size": "224"}')
  with pytest.raises(UnreadableFileError, match=r"json: image_size is '224', but must be of type int"):
    clip_config.read(path)


CAPTIONS = ["A photo of a cat.", "a drawing of a dog", "a photo of two dogs!"]


def test_word_tokenizer_adds_start_end_and_padding():
  tokenizer = clip_tokenizer.word_tokenizer(CAPTIONS, context_length=8)
  ids = clip_tokenizer.special_ids(tokenizer)
  assert (ids["pad_token_id"], ids["bos_token_id"], ids["eos_token_id"]) == (0, 2, 3)
  assert ids["eos_token_id"] != clip.LEGACY_EOS
  config = clip.TextConfig(**ids)
  assert config.vocab_size == 4 + len({"a", "photo", "of", "cat", ".", "drawing", "dog", "two", "dogs", "!"})
  token_BT = tokenizer(["A PHOTO, of: cat", "a a a a a a a a a a", "dog"])
  assert token_BT.shape == (3, 8)
  assert token_BT.dtype == np.int32
  back = [[tokenizer.encoder.id_to_token(token) for token in row] for row in token_BT]
  assert back[0] == ["<start>", "a", "photo", "<unk>", "of", "<unk>", "cat", "<end>"]
  assert back[1] == ["<start>"] + 6 * ["a"] + ["<end>"]
  assert back[2] == ["<start>", "dog", "<end>"] + 5 * ["<pad>"]


def test_a_saved_tokenizer_is_loaded(folder):
  tokenizer = clip_tokenizer.word_tokenizer(CAPTIONS, CONFIG.text.context_length)
  tokenizer.save(folder)
  np.testing.assert_array_equal(clip_tokenizer.load_tokenizer(folder)(CAPTIONS), tokenizer(CAPTIONS))


def test_a_missing_tokenizer_is_refused(folder, params):
  with pytest.raises(FileNotFoundError, match=r"tokenizer\.json"):
    clip_tokenizer.load_tokenizer(folder)
  clip_tokenizer.word_tokenizer(CAPTIONS, 10).save(folder)
  clip_weights.save(folder, clip.CLIPConfig(CONFIG.image, None, 16), {"image": params["image"]})
  with pytest.raises(ValueError, match="no text tower"):
    clip_tokenizer.load_tokenizer(folder)
