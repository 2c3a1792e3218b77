"""The weights of students and classifiers under the authors', timm's and transformers' names.

`python tests/test_vit_weights.py` prints the largest difference of each round trip.
"""

import importlib.util
import json
import operator
import tempfile
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from test_vit import apply
from timm_without_torchvision import import_timm

from dtm_jax.models.vit import classifier as vit_classifier
from dtm_jax.models.vit import config as vit_config
from dtm_jax.models.vit import model as vit
from dtm_jax.models.vit import transfer as vit_transfer
from dtm_jax.models.vit import weights as vit_weights
from dtm_jax.models.vit.attention import relative_position_index

TINY = {"patch_size": 4, "width": 24, "depth": 2, "num_heads": 3, "mlp_ratio": 2.0}
SIDE = 20
needs_timm = pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="timm is not installed")


def image(batch_size=2, side=SIDE):
  return np.random.default_rng(1).standard_normal((batch_size, side, side, 3), np.float32)


def random_params(model, side=SIDE):
  """Return parameters far from the zeros and ones of initialisation, so that every parameter matters."""
  shapes = vit_config.param_shapes(model, (side // model.patch_size,) * 2)
  rng = np.random.default_rng(0)
  return jax.tree.map(lambda leaf: 0.3 * rng.standard_normal(leaf.shape, np.float32), shapes)


def student(**options):
  return vit.VisionTransformer(**{"out_dim": 10, **TINY, **options})


def classifier(**options):
  return vit_classifier.Classifier(**{"num_classes": 7, **TINY, **options})


def assert_same(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  jax.tree.map(np.testing.assert_array_equal, a, b)


def torch_image(side=SIDE):
  import torch

  return torch.from_numpy(image(side=side)).permute(0, 3, 1, 2)


STUDENTS = {
  "both tables": {},
  "shared table": {"rel_pos_bias": False},
  "own tables": {"shared_rel_pos_bias": False},
  "positions, no layer scale": {"abs_pos_emb": True, "layer_scale_init": None},
  "no head": {"out_dim": None},
}
CLASSIFIERS = {
  "mean": {},
  "cls": {"pooling": "cls"},
  "positions": {"abs_pos_emb": True, "layer_scale_init": None},
}
MODELS = {f"student, {name}": student(**options) for name, options in STUDENTS.items()}
MODELS |= {f"classifier, {name}": classifier(**options) for name, options in CLASSIFIERS.items()}


@pytest.mark.parametrize("name", MODELS)
def test_authors_names_round_trip(name):
  model = MODELS[name]
  params = random_params(model)
  tensors = vit_weights.to_authors(params)
  index = relative_position_index(5, 5)
  buffers = {f"blocks.{layer}.attn.relative_position_index": index for layer in range(2)}
  assert_same(vit_weights.from_authors({**tensors, **buffers}, source="memory"), params)
  told, grid = vit_config.describe({name: tensor.shape for name, tensor in tensors.items()})
  assert grid == (5, 5)
  assert vit_config.options(told) == vit_config.options(model)


@pytest.mark.parametrize(
  ("model", "expected"),
  [
    (student(abs_pos_emb=True), {
      "cls_token": (1, 1, 24), "mask_token": (1, 1, 24), "pos_embed": (1, 26, 24),
      "patch_embed.proj.weight": (24, 3, 4, 4), "patch_embed.proj.bias": (24,),
      "rel_pos_bias.relative_position_bias_table": (84, 3),
      "norm.weight": (24,), "norm.bias": (24,), "lm_head.weight": (10, 24), "lm_head.bias": (10,),
    }),
    (classifier(), {
      "cls_token": (1, 1, 24), "patch_embed.proj.weight": (24, 3, 4, 4), "patch_embed.proj.bias": (24,),
      "fc_norm.weight": (24,), "fc_norm.bias": (24,), "head.weight": (7, 24), "head.bias": (7,),
    }),
  ],
)  # fmt: skip
def test_the_names_match_the_authors(model, expected):
  block = {
    "norm1.weight": (24,), "norm1.bias": (24,), "attn.qkv.weight": (72, 24), "attn.q_bias": (24,),
    "attn.v_bias": (24,), "attn.relative_position_bias_table": (84, 3), "attn.proj.weight": (24, 24),
    "attn.proj.bias": (24,), "gamma_1": (24,), "gamma_2": (24,), "norm2.weight": (24,), "norm2.bias": (24,),
    "mlp.fc1.weight": (48, 24), "mlp.fc1.bias": (48,), "mlp.fc2.weight": (24, 48), "mlp.fc2.bias": (24,),
  }  # fmt: skip
  blocks = {f"blocks.{i}.{name}": shape for i in range(2) for name, shape in block.items()}
  shapes = {name: tensor.shape for name, tensor in vit_weights.to_authors(random_params(model)).items()}
  assert shapes == expected | blocks


def test_extra_layers_of_beit_v2_are_ignored(caplog):
  params = random_params(student(rel_pos_bias=False))
  tensors = vit_weights.to_authors(params)
  beside = {f"cls_pt_layers.{i}.attn.qkv.weight": np.ones((72, 24)) for i in range(2)}
  with caplog.at_level("INFO"):
    assert_same(vit_weights.from_authors({**tensors, **beside}, source="beit.pth"), params)
  assert (
    "Ignoring 2 tensors of BEiT v2's extra layers in beit.pth: cls_pt_layers.0.attn.qkv.weight" in caplog.text
  )


def test_all_mismatches_are_listed_at_once():
  tensors = vit_weights.to_authors(random_params(student()))
  del tensors["norm.bias"], tensors["blocks.1.attn.v_bias"]
  tensors["blocks.0.attn.k_bias"] = np.zeros(24)
  tensors["lm_head.bias"] = np.zeros(11)
  with pytest.raises(ValueError, match=r"^a\.pth does not match") as error:
    vit_weights.from_authors(tensors, source="a.pth")
  assert set(str(error.value).split("\n  ")[1:]) == {
    "missing: norm.bias (24,)",
    "missing: blocks.1.attn.v_bias (24,)",
    "unexpected: blocks.0.attn.k_bias (24,)",
    "shape of lm_head.bias: (11,), expected (10,)",
  }


def test_missing_facts_are_asked_for():
  with pytest.raises(ValueError, match=r"b\.pth: No blocks\.0\.mlp\.fc1\.weight and no patch_embed"):
    vit_weights.from_authors({"visual.proj": np.zeros((3, 3))}, source="b.pth")
  bare = student(shared_rel_pos_bias=False, rel_pos_bias=False)
  params = random_params(bare)
  tensors = vit_weights.to_authors(params)
  with pytest.raises(ValueError, match="give num_heads"):
    vit_weights.from_authors(tensors, source="memory")
  assert_same(vit_weights.from_authors(tensors, source="memory", num_heads=3), params)
  with pytest.raises(ValueError, match="give the grid"):
    vit_weights.save("nowhere", params, "authors", num_heads=3)
  wide = student(shared_rel_pos_bias=False)
  shapes = vit_config.param_shapes(wide, (3, 5))
  tensors = vit_weights.to_authors(jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), shapes))
  with pytest.raises(ValueError, match=r"48 rows are not of a square grid"):
    vit_weights.from_authors(tensors, source="memory")
  vit_weights.from_authors(tensors, source="memory", grid=(3, 5))


@pytest.mark.parametrize("name", MODELS)
def test_summed_tables_change_no_output(name):
  model = MODELS[name]
  params = random_params(model)
  summed = vit_transfer.sum_tables(params)
  assert "rel_pos_bias" not in summed
  own = model.clone(shared_rel_pos_bias=False, rel_pos_bias=True)
  found = apply(own, summed, image())
  for key, expected in apply(model, params, image()).items():
    np.testing.assert_allclose(found[key], expected, atol=1e-4, err_msg=key)


# Other libraries.


def timm_difference(model, folder, side=SIDE):
  """Return the largest difference of tokens or logits to the model that timm makes of the folder."""
  import torch

  params = random_params(model, side)
  vit_weights.save(folder, params, "timm")
  theirs = import_timm().create_model(f"local-dir:{folder}", pretrained=True).eval()
  ours = apply(model, params, image(side=side))
  with torch.no_grad():
    if isinstance(model, vit_classifier.Classifier):
      return np.abs(theirs(torch_image(side)).numpy() - ours["logits"]).max()
    tokens = theirs.forward_features(torch_image(side)).numpy()
  return np.abs(tokens - jnp.concatenate([ours["cls"][:, None], ours["patches"]], axis=1)).max()


def transformers_difference(model, folder, side=SIDE):
  """Return the largest difference to transformers' BeitModel, with a mask, or BeitForImageClassification."""
  import torch
  import transformers

  params = random_params(model, side)
  vit_weights.save(folder, params, "transformers")
  is_classifier = isinstance(model, vit_classifier.Classifier)
  if is_classifier:
    kind, options = transformers.BeitForImageClassification, {}
  else:
    kind, options = transformers.BeitModel, {"add_pooling_layer": False}
  theirs, info = kind.from_pretrained(folder, output_loading_info=True, **options)
  assert not any(info[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
  with torch.no_grad():
    if is_classifier:
      ours = apply(model, params, image(side=side))["logits"]
      return np.abs(theirs.eval()(torch_image(side)).logits.numpy() - ours).max()
    mask = np.random.default_rng(2).random((2, (side // model.patch_size) ** 2)) < 0.4
    ours = apply(model, params, image(side=side), jnp.asarray(mask))
    tokens = theirs.eval()(torch_image(side), bool_masked_pos=torch.from_numpy(mask)).last_hidden_state
  return np.abs(tokens.numpy() - jnp.concatenate([ours["cls"][:, None], ours["patches"]], axis=1)).max()


@needs_timm
@pytest.mark.parametrize("name", MODELS)
def test_timm_matches_on_saved_weights(name, tmp_path):
  pytest.importorskip("torch")
  assert timm_difference(MODELS[name], tmp_path) < 1e-4


@pytest.mark.parametrize("name", MODELS)
def test_transformers_matches_on_saved_weights(name, tmp_path):
  pytest.importorskip("torch")
  assert transformers_difference(MODELS[name], tmp_path) < 1e-4


def test_every_block_matches_transformers(tmp_path):
  """Students with 1, 2 and 3 blocks match BeitModel's hidden states to 1e-5 of the largest value."""
  torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
  model = student(depth=3)
  params = random_params(model)
  vit_weights.save(tmp_path, params, "transformers")
  theirs = transformers.BeitModel.from_pretrained(tmp_path, add_pooling_layer=False).eval()
  with torch.no_grad():
    hidden = theirs(torch_image(), output_hidden_states=True).hidden_states
  assert len(hidden) == 1 + 3
  for depth in (1, 2, 3):
    first = jax.tree.map(operator.itemgetter(slice(depth)), params["blocks"])
    tokens = apply(model.clone(depth=depth), params | {"blocks": first}, image())["tokens"]
    expected = hidden[depth].numpy()
    assert np.abs(tokens - expected).max() < 1e-5 * np.abs(expected).max(), depth


@pytest.mark.parametrize("layout", vit_weights.LAYOUTS)
@pytest.mark.parametrize("name", ["student, both tables", "classifier, mean", "classifier, cls"])
def test_a_saved_folder_is_loaded(name, layout, tmp_path):
  params = random_params(MODELS[name])
  vit_weights.save(tmp_path, params, layout)
  expected = dict(params)
  if layout != "authors" and "mask_token" in params:
    del expected["head"]
  if layout == "timm":
    expected = vit_transfer.sum_tables(expected)
    if "mask_token" in params:
      expected["mask_token"] = np.zeros_like(params["mask_token"])
  assert_same(vit_weights.load(tmp_path), expected)


KINDS = ("BeitModel", "BeitForImageClassification", "BeitForMaskedImageModeling")


def from_transformers_difference(kind, folder):
  """Return the largest difference of outputs on weights that transformers saved."""
  import torch
  import transformers

  config = transformers.BeitConfig(
    hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=48, image_size=SIDE,
    patch_size=4, vocab_size=10, num_labels=7, use_mask_token=kind != "BeitForImageClassification",
    use_relative_position_bias=True, use_shared_relative_position_bias=True, layer_norm_eps=1e-6,
    use_mean_pooling=kind != "BeitModel",
  )  # fmt: skip
  options = {"add_pooling_layer": False} if kind == "BeitModel" else {}
  theirs = getattr(transformers, kind)(config, **options).eval()
  with torch.no_grad():
    for parameter in theirs.parameters():
      parameter.normal_(0, 0.3)
    theirs.save_pretrained(folder)
    output = theirs(torch_image())
  params = vit_weights.load(folder)
  if kind == "BeitForImageClassification":
    ours, expected = apply(classifier(shared_rel_pos_bias=True), params, image())["logits"], output.logits
  elif kind == "BeitModel":
    ours, expected = apply(student(out_dim=None), params, image())["patches"], output.last_hidden_state[:, 1:]
  else:
    ours = apply(student(), params, image())["prediction"]
    expected = theirs.lm_head(theirs.layernorm(theirs.beit(torch_image()).last_hidden_state[:, 1:])).detach()
  return np.abs(ours - expected.numpy()).max()


def from_timm_difference(folder):
  """Return the same for a classifier of timm with both kinds of table."""
  import torch

  theirs = import_timm().create_model(
    "beit_base_patch16_224", img_size=SIDE, patch_size=4, embed_dim=24, depth=2, num_heads=3, mlp_ratio=2,
    num_classes=7, use_shared_rel_pos_bias=True,
  ).eval()  # fmt: skip
  with torch.no_grad():
    for parameter in theirs.parameters():
      parameter.normal_(0, 0.3)
    expected = theirs(torch_image())
  save_file(
    {name: tensor.numpy() for name, tensor in theirs.state_dict().items()}, folder / "model.safetensors"
  )
  (folder / "config.json").write_text("{}")
  params = vit_weights.load(folder)
  logits = apply(classifier(shared_rel_pos_bias=True), params, image())["logits"]
  return np.abs(logits - expected.numpy()).max()


@pytest.mark.parametrize("kind", KINDS)
def test_loads_what_transformers_saved(kind, tmp_path):
  pytest.importorskip("torch")
  pytest.importorskip("transformers")
  assert from_transformers_difference(kind, tmp_path) < 1e-4


@needs_timm
def test_loads_what_timm_saved(tmp_path):
  pytest.importorskip("torch")
  assert from_timm_difference(tmp_path) < 1e-4


def test_saved_configurations_describe_the_model(tmp_path):
  params = random_params(classifier())
  vit_weights.save(tmp_path, params, "transformers", mean=(0.5,) * 3, std=(0.25,) * 3)
  preprocessor = json.loads((tmp_path / "preprocessor_config.json").read_text())
  assert preprocessor["image_mean"] == [0.5] * 3
  assert preprocessor["size"] == {"height": SIDE, "width": SIDE}
  vit_weights.save(tmp_path, params, "authors")
  config = json.loads((tmp_path / "config.json").read_text())
  assert (config["width"], config["num_classes"], config["image_size"]) == (24, 7, [SIDE, SIDE])
  assert load_file(tmp_path / "model.safetensors")["head.weight"].shape == (7, 24)
  with pytest.raises(ValueError, match=r"'onnx'.*authors, timm, transformers"):
    vit_weights.save(tmp_path, params, "onnx")
  (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}))
  save_file({"embeddings.cls_token": np.zeros((1, 1, 4))}, tmp_path / "model.safetensors")
  with pytest.raises(ValueError, match=r"'vit'.*beit"):
    vit_weights.load(tmp_path)


@pytest.mark.slow
@pytest.mark.long  # small students match transformers above
def test_a_base_student_through_the_authors_names_to_transformers(tmp_path):
  """Uses 86 M random weights and one image of 224 pixels; more images would test nothing new."""
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  model = vit.build("B", out_dim=512)
  rng = np.random.default_rng(0)
  shapes = vit_config.param_shapes(model, (14, 14))
  drawn = jax.tree.map(lambda leaf: 0.05 * rng.standard_normal(leaf.shape, np.float32), shapes)
  drawn["norm"]["scale"] += 1  # so that the features are of size one
  params = vit_weights.from_authors(vit_weights.to_authors(drawn), source="memory")
  vit_weights.save(tmp_path, params, "transformers")
  theirs = transformers.BeitModel.from_pretrained(tmp_path, add_pooling_layer=False).eval()
  pixels = rng.standard_normal((1, 224, 224, 3), np.float32)
  with torch.no_grad():
    tokens = theirs(torch.from_numpy(pixels).permute(0, 3, 1, 2)).last_hidden_state.numpy()
  ours = apply(model, params, jnp.asarray(pixels))
  difference = np.abs(tokens[:, 1:] - ours["patches"]).max()
  print(f"ViT-B, authors -> ours -> transformers: {difference:.1e} of {np.abs(tokens).max():.1f}")
  assert difference < 1e-4


def _print_table():
  rows = {(name, "ours -> timm"): partial(timm_difference, model) for name, model in MODELS.items()}
  rows |= {(name, "ours -> transformers"): partial(transformers_difference, m) for name, m in MODELS.items()}
  rows |= {(kind, "transformers -> ours"): partial(from_transformers_difference, kind) for kind in KINDS}
  rows |= {("classifier, both tables", "timm -> ours"): from_timm_difference}
  for (name, direction), difference in rows.items():
    with tempfile.TemporaryDirectory() as folder:
      print(f"| {name} | {direction} | {difference(Path(folder)):.1e} |")


if __name__ == "__main__":
  jax.config.update("jax_default_matmul_precision", "highest")
  _print_table()


@needs_timm
@pytest.mark.parametrize("layer_scale", [False, True])
def test_a_plain_vit_or_mae_loads_without_its_key_bias(layer_scale, tmp_path):
  """The key bias adds the same number to all scores of a query, so no output changes."""
  torch = pytest.importorskip("torch")
  options = {"init_values": 0.1 if layer_scale else None, "depth": 2, "embed_dim": 24, "num_heads": 3}
  theirs = import_timm().create_model(
    "vit_base_patch16_224", img_size=SIDE, patch_size=4, mlp_ratio=2, num_classes=7, **options
  )
  with torch.no_grad():
    for parameter in theirs.parameters():
      parameter.normal_(0, 0.3)
    logits = theirs.eval()(torch_image()).numpy()
    features = theirs.forward_features(torch_image())[:, 1:].numpy()
  state = theirs.state_dict()
  torch.save({"model": state}, tmp_path / "vit.pth")
  plain = {"abs_pos_emb": True, "rel_pos_bias": False, "layer_scale_init": 0.1 if layer_scale else None}
  plain["shared_rel_pos_bias"] = False
  params = vit_weights.load(tmp_path / "vit.pth", num_heads=3)
  ours = apply(classifier(pooling="cls", **plain), params, image())["logits"]
  assert np.abs(ours - logits).max() < 1e-4
  encoder = {name: tensor for name, tensor in state.items() if not name.startswith("head.")}
  decoder = {"mask_token": torch.zeros(1, 1, 8), "decoder_embed.weight": torch.zeros(8, 24)}
  torch.save({"model": encoder | decoder}, tmp_path / "mae.pth")
  params = vit_weights.load(tmp_path / "mae.pth", num_heads=3)
  patches = apply(student(out_dim=None, **plain), params, image())["patches"]
  print(f"\nlayer scale {layer_scale}: {np.abs(patches - features).max():.1e}")
  assert np.abs(patches - features).max() < 1e-4
  with pytest.raises(ValueError, match=r"mae\.pth: The number of heads is unknown.*give num_heads"):
    vit_weights.load(tmp_path / "mae.pth")
