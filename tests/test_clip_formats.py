"""One random CLIP in every file format: the same parameters to the bit, and the same outputs."""

import dataclasses
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.serialization import msgpack_serialize
from flax.traverse_util import unflatten_dict
from safetensors.numpy import save_file
from test_clip_weights import assert_same

from dtm_jax.errors import OptionError
from dtm_jax.models.clip import config as clip_config
from dtm_jax.models.clip import model as clip
from dtm_jax.models.clip import shapes as clip_shapes
from dtm_jax.models.clip import weights as clip_weights
from dtm_jax.models.clip.layouts import LAYOUTS
from dtm_jax.models.files import weight_files
from dtm_jax.teachers.clip import build
from scripts.weights.convert_clip import convert

TEXT = clip.TextConfig(
  clip.Tower(64, 2, 1, 128), 60, 10, pad_token_id=0, bos_token_id=58, eos_token_id=clip.LEGACY_EOS
)
CONFIG = clip.CLIPConfig(clip.ImageConfig(clip.Tower(128, 3, 2, 256), 32, 8), TEXT, 16)
TOLD = {"heads": (2, 1), "activation": "quick_gelu"}
"""The facts that OpenAI's names do not give of a model of this size."""
MODEL_CFG = {
  "embed_dim": 16,
  "vision_cfg": {"image_size": 32, "layers": 3, "width": 128, "patch_size": 8, "mlp_ratio": 2.0},
  "text_cfg": {
    "context_length": 10, "vocab_size": 60, "width": 64, "heads": 1, "layers": 2, "mlp_ratio": 2.0,
  },
}  # fmt: skip


@pytest.fixture(scope="module")
def params():
  """Return random parameters that half precision holds exactly; no two tensors are equal."""
  rng = np.random.default_rng(0)
  init = clip.CLIP(CONFIG).init
  shapes = jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)), jnp.zeros((1, 10), int))
  draw = lambda leaf: np.asarray(0.1 * rng.standard_normal(leaf.shape), np.float16).astype(np.float32)
  return jax.tree.map(draw, shapes["params"])


def names_of(params, layout="transformers"):
  return {
    name: np.array(tensor, order="C") for name, tensor in clip_weights.to_theirs(params, layout).items()
  }


def write_open_clip(folder, **changes):
  content = {
    "model_cfg": MODEL_CFG | changes,
    "preprocess_cfg": {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]},
  }
  (folder / weight_files.OPEN_CLIP_CONFIG).write_text(json.dumps(content))


def torch_tensors(tensors, dtype="float32"):
  torch = pytest.importorskip("torch")
  return {name: torch.from_numpy(tensor).to(getattr(torch, dtype)) for name, tensor in tensors.items()}


def scripted(tensors):
  """Return a TorchScript module with these tensors in half precision and OpenAI's three size entries."""
  torch = pytest.importorskip("torch")

  def module(part):
    made = torch.nn.Module()
    for name, value in part.items():
      if isinstance(value, dict):
        made.add_module(name, module(value))
      else:
        made.register_parameter(name, torch.nn.Parameter(value))
    return made

  whole = module(unflatten_dict(torch_tensors(tensors, "float16"), sep="."))
  for name in ("input_resolution", "context_length", "vocab_size"):
    whole.register_buffer(name, torch.tensor(7))
  return torch.jit.script(whole)


def transformers_safetensors(folder, params):
  save_file(names_of(params), folder / "model.safetensors")


def transformers_bin(folder, params):
  torch = pytest.importorskip("torch")
  torch.save(torch_tensors(names_of(params)), folder / "pytorch_model.bin")


def transformers_shards(folder, params):
  names = sorted(names_of(params).items())
  files = {"model-1-of-2.safetensors": names[::2], "model-2-of-2.safetensors": names[1::2]}
  for file, part in files.items():
    save_file(dict(part), folder / file)
  index = {name: file for file, part in files.items() for name, _ in part}
  (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


def transformers_flax(folder, params):
  tree = unflatten_dict(names_of(params, "flax"), sep="/")
  (folder / "flax_model.msgpack").write_bytes(msgpack_serialize(tree))


def open_clip_safetensors(folder, params):
  save_file(names_of(params, "openai"), folder / "open_clip_model.safetensors")
  write_open_clip(folder, quick_gelu=True)


def open_clip_custom_text(folder, params):
  torch = pytest.importorskip("torch")
  ours = names_of(params, "openai").items()
  image = lambda name: name.startswith(("visual.", "logit_scale"))
  tensors = {name if image(name) else f"text.{name}": tensor for name, tensor in ours}
  torch.save({"state_dict": torch_tensors(tensors)}, folder / "open_clip_pytorch_model.bin")
  write_open_clip(folder, quick_gelu=True)


def openai_archive(folder, params):
  scripted(names_of(params, "openai")).save(folder / "ViT.pt")
  return folder / "ViT.pt"


def openai_npz(folder, params):
  np.savez(folder / "clip.npz", **names_of(params, "openai"))
  return folder / "clip.npz"


FORMATS = [
  transformers_safetensors, transformers_bin, transformers_shards, transformers_flax,
  open_clip_safetensors, open_clip_custom_text, openai_archive, openai_npz,
]  # fmt: skip


@pytest.mark.parametrize("write", FORMATS, ids=lambda write: write.__name__)
def test_every_format_gives_the_same_parameters(tmp_path, params, write):
  if write.__name__.startswith("transformers"):
    clip_config.write(tmp_path / "config.json", CONFIG)
  untold = TOLD if write.__name__.startswith("openai") else {}
  config, loaded = clip_weights.load(write(tmp_path, params) or tmp_path, **untold)
  assert config == CONFIG
  assert_same(loaded, params)
  assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(loaded))


def test_a_file_loads_like_its_folder(tmp_path, params):
  transformers_flax(tmp_path, params)
  with pytest.raises(FileNotFoundError, match=r"No config\.json beside .*flax_model\.msgpack"):
    clip_weights.load(tmp_path / "flax_model.msgpack")
  clip_config.write(tmp_path / "config.json", CONFIG)
  assert_same(clip_weights.load(tmp_path / "flax_model.msgpack")[1], params)
  (tmp_path / "weights.tar").touch()
  with pytest.raises(ValueError, match=r"weights\.tar has an unknown format.*\.safetensors"):
    clip_weights.load(tmp_path / "weights.tar")


@pytest.mark.parametrize("prefix", ["visual.", ""])
def test_openai_image_tower_alone(params, prefix):
  names = names_of({"image": params["image"]}, "openai")
  tensors = {name.replace("visual.", prefix, 1): tensor for name, tensor in names.items()}
  config, loaded = clip_weights.from_arrays(tensors, heads=2, activation="quick_gelu")
  assert config == clip.CLIPConfig(CONFIG.image, None, 16)
  assert_same(loaded, {"image": params["image"]})
  del tensors[f"{prefix}proj"]
  assert clip_weights.from_arrays(tensors)[0].embed_dim is None


@pytest.mark.parametrize(("changes", "activation"), [({}, "gelu"), ({"quick_gelu": True}, "quick_gelu")])
def test_open_clip_config_sets_the_gelu(tmp_path, params, changes, activation):
  open_clip_safetensors(tmp_path, params)
  write_open_clip(tmp_path, **changes)
  config = clip_weights.load(tmp_path)[0]
  assert config.image.tower.activation == config.text.tower.activation == activation
  teacher = build(str(tmp_path))
  assert (teacher.mean, teacher.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
  assert build(str(tmp_path), normalization="imagenet").mean == (0.485, 0.456, 0.406)


def test_unsupported_open_clip_options_are_listed(tmp_path, params):
  open_clip_safetensors(tmp_path, params)
  image = MODEL_CFG["vision_cfg"] | {"attentional_pool": True, "timm_model_name": "", "layers": [3, 4]}
  write_open_clip(tmp_path, vision_cfg=image, init_logit_bias=-10)
  with pytest.raises(ValueError, match=r"open_clip_config\.json asks") as error:
    clip_weights.load(tmp_path)
  assert str(error.value).endswith(
    "model init_logit_bias=-10, vision layers=[3, 4], vision attentional_pool=True."
  )
  (tmp_path / weight_files.OPEN_CLIP_CONFIG).unlink()
  with pytest.raises(FileNotFoundError, match=r"No open_clip_config\.json beside .*GELU"):
    clip_weights.load(tmp_path / "open_clip_model.safetensors")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_mismatches_are_listed_under_the_files_names(params, layout):
  tensors = names_of(params, layout)
  rules = LAYOUTS[layout].rules
  scale, final = rules["logit_scale"][0], rules["text/ln_final/bias"][0]
  fc1 = rules["image/blocks/mlp/fc1/bias"][0].format(layer=1)
  del tensors[final]
  tensors[fc1] = tensors[fc1][:5]
  tensors[f"{scale}_2"] = np.zeros(3, np.float32)
  with pytest.raises(ValueError, match=r"^the file does not match its configuration") as error:
    clip_weights.from_arrays(tensors, CONFIG, source="the file")
  lines = [f"missing: {final} (64,)", f"unexpected: {scale}_2 (3,)", f"shape of {fc1}: (5,), expected (256,)"]
  assert [line.strip() for line in str(error.value).splitlines()[1:]] == lines


def test_arrays_that_do_not_tell_the_configuration_are_refused(params):
  with pytest.raises(ValueError, match=r"no CLIP .*transformers, openai, flax.*stem\.weight"):
    clip_weights.from_arrays({"stem.weight": np.zeros(3)})
  with pytest.raises(ValueError, match=r"names of flax.*give the config"):
    clip_weights.from_arrays(names_of(params, "flax"))
  tensors = names_of(params, "openai")
  del tensors["visual.conv1.weight"], tensors["text_projection"]
  with pytest.raises(ValueError, match=r"its sizes.*visual\.conv1\.weight .*text_projection"):
    clip_weights.from_arrays(tensors)


@pytest.mark.parametrize(
  "write", [transformers_safetensors, transformers_flax, openai_npz], ids=lambda w: w.__name__
)
def test_a_file_cut_short_is_named(tmp_path, params, write):
  clip_config.write(tmp_path / "config.json", CONFIG)
  write(tmp_path, params)
  file = next(path for path in tmp_path.iterdir() if path.name != "config.json")
  content = file.read_bytes()
  for length in (0, 5, len(content) // 2, len(content) - 10):
    file.write_bytes(content[:length])
    with pytest.raises(ValueError, match=rf"{file.name} is damaged or cut short"):
      clip_weights.load(file)


def test_missing_shards_are_named(tmp_path, params):
  clip_config.write(tmp_path / "config.json", CONFIG)
  transformers_shards(tmp_path, params)
  (tmp_path / "model-2-of-2.safetensors").unlink()
  with pytest.raises(FileNotFoundError, match=r"index\.json names model-2-of-2\.safetensors"):
    clip_weights.load(tmp_path)
  (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../secret.safetensors"}}')
  with pytest.raises(ValueError, match=r"outside its folder: \.\./secret"):
    clip_weights.load(tmp_path)


def test_openai_archive_matches_transformers(tmp_path, params):
  """Compares our tower on OpenAI's archive with transformers' PyTorch module on the same tensors."""
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  config, loaded = clip_weights.load(openai_archive(tmp_path, params), heads=(2, 1))
  clip_weights.save(tmp_path / "theirs", CONFIG, params)
  theirs = transformers.CLIPModel.from_pretrained(tmp_path / "theirs").eval()
  pixels = np.random.default_rng(1).standard_normal((2, 32, 32, 3), np.float32)
  tokens = np.array([[58, 4, 9, 59, 0, 0, 0, 0, 0, 0], [58, 5, 6, 7, 8, 9, 10, 11, 12, 59]])
  image, text, _ = jax.jit(clip.CLIP(config).apply)({"params": loaded}, pixels, jnp.array(tokens))
  with torch.no_grad():
    output = theirs.vision_model(pixel_values=torch.from_numpy(pixels).permute(0, 3, 1, 2))
    pooled = theirs.text_model(input_ids=torch.from_numpy(tokens)).pooler_output
    np.testing.assert_allclose(image, theirs.visual_projection(output.pooler_output), atol=1e-5)
    np.testing.assert_allclose(text, theirs.text_projection(pooled), atol=1e-5)


@pytest.mark.parametrize("size", [32, 48])
def test_projected_patches_of_openai_at_any_size(tmp_path, params, size):
  """The oracle resizes the table by PyTorch's bicubic interpolation with the scale (h0 + 0.1) / g."""
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  config, loaded = clip_weights.from_arrays(names_of({"image": params["image"]}, "openai"), **TOLD)
  table = params["image"]["position_embedding"]
  if size != 32:
    grid = torch.from_numpy(table[1:].reshape(1, 4, 4, 128)).permute(0, 3, 1, 2)
    scale = (size // 8 + 0.1) / 4
    resized = torch.nn.functional.interpolate(grid, scale_factor=(scale, scale), mode="bicubic")
    table = np.concatenate([table[:1], resized.permute(0, 2, 3, 1).reshape(-1, 128).numpy()])
  resized_config = clip.CLIPConfig(dataclasses.replace(CONFIG.image, image_size=size), None, 16)
  clip_weights.save(tmp_path, resized_config, {"image": params["image"] | {"position_embedding": table}})
  theirs = transformers.CLIPVisionModelWithProjection.from_pretrained(tmp_path).eval()
  pixels = np.random.default_rng(1).standard_normal((2, size, size, 3), np.float32)
  tower = jax.jit(clip.ImageTower(config.image, config.embed_dim).apply)
  with torch.no_grad():
    hidden = theirs(pixel_values=torch.from_numpy(pixels).permute(0, 3, 1, 2)).last_hidden_state[:, 1:]
    expected = theirs.visual_projection(theirs.vision_model.post_layernorm(hidden))
  patches = tower({"params": loaded["image"]}, pixels)["patch_embeddings"]
  print(f"largest difference at {size}: {np.abs(patches - expected.numpy()).max():.1e}")
  np.testing.assert_allclose(patches, expected, atol=1e-5)


def test_names_match_transformers_and_openai(params):
  transformers = pytest.importorskip("transformers")
  clip_names = transformers.CLIPModel(transformers.CLIPConfig(
    vision_config={"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3,
                   "num_attention_heads": 2, "image_size": 32, "patch_size": 8},
    text_config={"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
                 "num_attention_heads": 1, "vocab_size": 60, "max_position_embeddings": 10},
    projection_dim=16,
  )).state_dict()  # fmt: skip
  assert {name: tuple(t.shape) for name, t in clip_names.items() if "position_ids" not in name} == {
    name: tensor.shape for name, tensor in names_of(params).items()
  }
  openai = {name: tensor.shape for name, tensor in names_of(params, "openai").items()}
  for name, shape in {
    "visual.class_embedding": (128,), "visual.positional_embedding": (17, 128), "visual.proj": (128, 16),
    "visual.conv1.weight": (128, 3, 8, 8), "visual.ln_pre.weight": (128,), "visual.ln_post.bias": (128,),
    "visual.transformer.resblocks.2.attn.in_proj_weight": (384, 128),
    "visual.transformer.resblocks.2.attn.in_proj_bias": (384,),
    "visual.transformer.resblocks.0.attn.out_proj.weight": (128, 128),
    "visual.transformer.resblocks.0.ln_1.weight": (128,), "visual.transformer.resblocks.0.ln_2.bias": (128,),
    "visual.transformer.resblocks.0.mlp.c_fc.weight": (256, 128),
    "visual.transformer.resblocks.0.mlp.c_proj.weight": (128, 256),
    "transformer.resblocks.1.attn.in_proj_weight": (192, 64), "positional_embedding": (10, 64),
    "token_embedding.weight": (60, 64), "ln_final.weight": (64,), "text_projection": (64, 16),
    "logit_scale": (),
  }.items():  # fmt: skip
    assert openai[name] == shape
  flax = {name: tensor.shape for name, tensor in names_of(params, "flax").items()}
  for name, shape in {
    "vision_model/embeddings/patch_embedding/kernel": (8, 8, 3, 128), "visual_projection/kernel": (128, 16),
    "vision_model/embeddings/position_embedding/embedding": (17, 128), 
    "vision_model/pre_layrnorm/scale": (128,),
    "vision_model/embeddings/class_embedding": (128,), "text_model/final_layer_norm/bias": (64,),
    "text_model/embeddings/token_embedding/embedding": (60, 64),
    "vision_model/encoder/layers/2/mlp/fc1/kernel": (128, 256),
    "text_model/encoder/layers/1/self_attn/q_proj/kernel": (64, 64),
  }.items():  # fmt: skip
    assert flax[name] == shape


def test_fused_attention_has_query_key_value_order(params):
  weight = names_of(params, "openai")["visual.transformer.resblocks.1.attn.in_proj_weight"]
  attention = params["image"]["blocks"]["attn"]
  for part, name in zip(np.split(weight, 3), ("query", "key", "value"), strict=True):
    np.testing.assert_array_equal(part, attention[name]["kernel"][1].T)


def test_convert_clip_script(tmp_path, params):
  (tmp_path / "from").mkdir()
  open_clip_safetensors(tmp_path / "from", params)
  convert(str(tmp_path / "from"), tmp_path / "to")
  config, loaded = clip_weights.load(tmp_path / "to")
  assert config == CONFIG
  assert_same(loaded, params)
  assert build(str(tmp_path / "to")).mean == (0.1, 0.2, 0.3)
  assert (tmp_path / "to" / "SHA256SUMS").exists()


def test_no_torch_is_imported():
  for file in (Path(__file__).parents[1] / "dtm_jax").rglob("*.py"):
    assert not re.search(r"^\s*(import|from) torch\b", file.read_text(), re.MULTILINE), file


def test_only_the_first_weights_of_a_repository_are_fetched(tmp_path, params, monkeypatch):
  asked = []

  def snapshot_download(repo, allow_patterns, local_files_only, revision):
    asked.append([name for name in weight_files.NAMES if name in allow_patterns and not local_files_only])
    if "pytorch_model.bin" in asked[-1]:
      (tmp_path / "pytorch_model.bin").touch()
      (tmp_path / "config.json").touch()
    return str(tmp_path)

  monkeypatch.setattr(weight_files.constants, "HF_HUB_OFFLINE", False)
  monkeypatch.setattr(weight_files, "snapshot_download", snapshot_download)
  assert weight_files.find("owner/name").file == tmp_path / "pytorch_model.bin"
  assert asked == [[], *([name] for name in weight_files.NAMES[:4])]


def trained_by_open_clip(path, params):
  """Write a checkpoint in the form that open_clip's training saves."""
  torch = pytest.importorskip("torch")
  tensors = torch_tensors(names_of(params, "openai"))
  content = {"epoch": 3, "name": "run", "state_dict": {f"module.{name}": t for name, t in tensors.items()}}
  torch.save(content | {"optimizer": {"state": {}, "param_groups": [{"lr": 1e-3}]}}, path)
  return path


def test_unknown_heads_and_activation_are_asked_for(tmp_path, params):
  file = trained_by_open_clip(tmp_path / "epoch_3.pt", params)
  config, loaded = clip_weights.load(file)
  assert (config.image.tower.num_heads, config.image.tower.activation) == (None, None)
  assert_same(loaded, params)
  with pytest.raises(OptionError, match="do not give heads and activation"):
    jax.eval_shape(
      clip.CLIP(config).init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)), jnp.zeros((1, 10), int)
    )
  asked = r"epoch_3\.pt does not give heads and activation of the image tower of width 128\. "
  with pytest.raises(OptionError, match=asked + r"Give --config\.teacher\.heads=.*activation="):
    build(str(file))
  with pytest.raises(OptionError, match=r"activation of the image.*Give --config\.teacher\.activation"):
    build(str(file), heads=2)
  with pytest.raises(OptionError, match="Width 128 is not divisible by 3 heads"):
    build(str(file), heads=3, activation="gelu")
  with pytest.raises(OptionError, match=r"'relu'.*quick_gelu, gelu"):
    build(str(file), heads=2, activation="relu")


@pytest.mark.parametrize(("heads", "activation"), [(2, "gelu"), (8, "quick_gelu")])
def test_given_heads_and_activation_match_transformers(tmp_path, params, heads, activation):
  torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
  tower = dataclasses.replace(CONFIG.image.tower, num_heads=heads, activation=activation)
  config = dataclasses.replace(CONFIG, image=dataclasses.replace(CONFIG.image, tower=tower))
  clip_weights.save(tmp_path / "theirs", config, params)
  theirs = transformers.CLIPModel.from_pretrained(tmp_path / "theirs").eval()
  teacher = build(
    str(trained_by_open_clip(tmp_path / "epoch_3.pt", params)),
    heads=heads,
    activation=activation,
    tokens="normalized",
  )
  pixels = np.random.default_rng(1).standard_normal((2, 32, 32, 3), np.float32)
  with torch.no_grad():
    hidden = theirs.vision_model(torch.from_numpy(pixels).permute(0, 3, 1, 2)).last_hidden_state
    expected = theirs.vision_model.post_layernorm(hidden)[:, 1:].numpy()
  ours = jax.jit(teacher.apply)(teacher.params, pixels)
  difference = np.abs(ours - expected).max() / np.abs(expected).max()
  print(f"\nheads {heads}, {activation}: {difference:.1e}")
  assert difference < 1e-5


def test_options_that_contradict_a_configuration_are_refused(tmp_path, params):
  open_clip_safetensors(tmp_path, params)
  assert clip_weights.load(tmp_path, **TOLD)[0] == CONFIG
  for options, message in (
    ({"heads": 4}, r"heads=4, but .*open_clip_config\.json says 2"),
    ({"heads": (2, 2)}, "heads=2, but .* says 1"),
    ({"activation": "gelu"}, "activation='gelu', but .* says 'quick_gelu'"),
  ):
    with pytest.raises(OptionError, match=message):
      clip_weights.load(tmp_path, **options)


@pytest.mark.parametrize(("width", "depth", "heads"), [(768, 12, 12), (1024, 24, 16), (64, 2, None)])
def test_published_sizes_have_their_heads(width, depth, heads):
  block = "visual.transformer.resblocks"
  shapes = {f"{block}.{i}.mlp.c_fc.weight": (4 * width, width) for i in range(depth)}
  shapes |= {"visual.conv1.weight": (width, 3, 16, 16), "visual.positional_embedding": (197, width)}
  tower = clip_shapes.from_openai(shapes, source="a.pt").image.tower
  assert (tower.width, tower.depth, tower.num_heads, tower.activation) == (width, depth, heads, None)


def test_convert_clip_script_asks_for_unknown_facts(tmp_path, params):
  file = trained_by_open_clip(tmp_path / "epoch_3.pt", params)
  with pytest.raises(OptionError, match=r"image tower of width 128 and of the text tower.*--heads"):
    convert(str(file), tmp_path / "to")
  convert(str(file), tmp_path / "to", **TOLD)
  assert clip_weights.load(tmp_path / "to")[0] == CONFIG
