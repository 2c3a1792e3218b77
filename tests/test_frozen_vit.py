"""The frozen towers against transformers in PyTorch, stage by stage, on random weights."""

import importlib
import json

import jax
import numpy as np
import pytest
from ml_collections import config_dict

from dtm_jax.errors import NotThereError, OptionError
from dtm_jax.models.files.file_checks import UnreadableFileError
from dtm_jax.models.frozen_vit import author_files as frozen_vit_authors
from dtm_jax.models.frozen_vit import model as frozen_vit
from dtm_jax.models.frozen_vit import weights as frozen_vit_weights
from dtm_jax.tasks import build_teacher

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")

SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
IMAGE = {"image_size": 32, "patch_size": 8}
HIDDEN = {"intermediate_size": 48}
STAGE, TOWER = 1e-5, 1e-4


def siglip():
  return transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**SIZES, **IMAGE, **HIDDEN))


def siglip_with_remainder():
  config = transformers.SiglipVisionConfig(**SIZES, **HIDDEN, image_size=37, patch_size=8)
  return transformers.SiglipVisionModel(config)


def siglip_with_texts():
  text = {**SIZES, **HIDDEN, "vocab_size": 9, "bos_token_id": 1, "eos_token_id": 2, "num_hidden_layers": 1}
  config = transformers.SiglipConfig(vision_config={**SIZES, **IMAGE, **HIDDEN}, text_config=text)
  return transformers.SiglipModel(config)


def siglip_naflex():
  config = transformers.Siglip2VisionConfig(**SIZES, **HIDDEN, patch_size=8, num_patches=16)
  return transformers.Siglip2VisionModel(config)


def dinov2(**options):
  return transformers.Dinov2Model(transformers.Dinov2Config(**SIZES, **IMAGE, **options))


def dinov2_swiglu():
  return dinov2(use_swiglu_ffn=True)


def dinov2_registers():
  config = transformers.Dinov2WithRegistersConfig(**SIZES, **IMAGE, num_register_tokens=3)
  return transformers.Dinov2WithRegistersModel(config)


def dinov2_classifier():
  return transformers.Dinov2ForImageClassification(transformers.Dinov2Config(**SIZES, **IMAGE))


def mae():
  return transformers.ViTMAEModel(transformers.ViTMAEConfig(**SIZES, **IMAGE, **HIDDEN, mask_ratio=0.0))


def mae_with_decoder():
  decoder = {"decoder_hidden_size": 16, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2}
  config = transformers.ViTMAEConfig(**SIZES, **IMAGE, **HIDDEN, **decoder, mask_ratio=0.0)
  return transformers.ViTMAEForPreTraining(config)


def vit():
  return transformers.ViTModel(transformers.ViTConfig(**SIZES, **IMAGE, **HIDDEN))


MODELS = (
  siglip, siglip_with_texts, siglip_naflex, dinov2, dinov2_swiglu, dinov2_registers, dinov2_classifier,
  mae, mae_with_decoder, vit,
)  # fmt: skip


def randomized(make):
  """Return a model with parameters from N(0, 0.3²), because zeros and ones would hide mistakes."""
  torch.manual_seed(0)
  model = make().eval()
  with torch.no_grad():
    for parameter in model.parameters():
      parameter.normal_(0.0, 0.3)
  return model


def tower_of(model):
  for name in ("vision_model", "dinov2", "vit"):
    model = getattr(model, name, model)
  return model


def their_stages(model, image):
  """Return [input of the first block, output of each block..., final LayerNorm of the patches]."""
  pixels = torch.from_numpy(np.array(image)).permute(0, 3, 1, 2)
  tower, kind = tower_of(model), tower_of(model).config.model_type
  grid = (image.shape[1] // 8, image.shape[2] // 8)
  resized = {"interpolate_pos_encoding": True}
  if kind == "siglip2_vision_model":
    patches = image.reshape(len(image), grid[0], 8, grid[1], 8, 3).transpose(0, 1, 3, 2, 4, 5)
    patches = torch.from_numpy(np.array(patches.reshape(len(image), grid[0] * grid[1], -1)))
    shapes = torch.tensor([grid] * len(image))
    mask = torch.ones(patches.shape[:2], dtype=torch.int32)
    arguments = {"pixel_values": patches, "pixel_attention_mask": mask, "spatial_shapes": shapes}
  elif kind.startswith("dinov2"):
    arguments = {"pixel_values": pixels}
  elif kind == "vit_mae":
    order = torch.arange(grid[0] * grid[1], dtype=torch.float32).expand(len(image), -1)
    arguments = {"pixel_values": pixels, "noise": order, **resized}
  else:
    arguments = {"pixel_values": pixels, **resized}
  blocks = tower.encoder if hasattr(tower, "encoder") else tower
  blocks = blocks.layers if hasattr(blocks, "layers") else blocks.layer
  stages = []
  keep = lambda value: stages.append((value[0] if isinstance(value, tuple) else value).numpy())
  hooks = [blocks[0].register_forward_pre_hook(lambda module, inputs: keep(inputs[0]))]
  hooks += [block.register_forward_hook(lambda module, inputs, output: keep(output)) for block in blocks]
  with torch.no_grad():
    final = tower(**arguments).last_hidden_state.numpy()
  for hook in hooks:
    hook.remove()
  return [*stages, final[:, -grid[0] * grid[1] :]]


def our_stages(config, params, image):
  tower = frozen_vit.FrozenViT(config)
  apply = jax.jit(lambda params, image: tower.apply({"params": params}, image, mutable="intermediates"))
  outputs, sown = apply(params, image)
  (blocks,) = sown["intermediates"]["blocks"]["output"]
  return [outputs["pre"], *blocks, outputs["patch_tokens"]]


def relative(ours, theirs):
  assert ours.shape == theirs.shape
  return np.abs(ours - theirs).max() / np.abs(theirs).max()


def saved(model, folder):
  model.save_pretrained(folder)
  return frozen_vit_weights.load(folder, list(frozen_vit_weights.FAMILIES))


def picture(height, width):
  return np.random.default_rng(1).standard_normal((2, height, width, 3), np.float32)


@pytest.fixture(scope="module")
def random_model(request, tmp_path_factory):
  """Return a model of transformers, and the config and parameters that we read from its files."""
  model = randomized(request.param)
  return model, *saved(model, tmp_path_factory.mktemp("saved"))


STORED, OTHERS = (32, 32), [(40, 56), (24, 16)]
POSITIONS_OF_ANOTHER = (siglip_with_texts, dinov2_swiglu, dinov2_classifier, mae_with_decoder)
"""Their positions are those of `siglip`, `dinov2` and `mae`. So the stored grid is enough."""


def case(make, size):
  long = make in POSITIONS_OF_ANOTHER and size != STORED
  return pytest.param(make, size, id=f"{make.__name__}-{size}", marks=pytest.mark.long if long else ())


@pytest.mark.parametrize(
  ("random_model", "size"),
  [case(make, size) for make in MODELS for size in (STORED, *OTHERS)],
  indirect=["random_model"],
)
def test_stages_match_transformers(random_model, size):
  """Compares the tokens before the blocks and after each, at the stored grid, a larger and a smaller one."""
  model, config, params = random_model
  assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(params))
  differences = [
    relative(ours, theirs)
    for ours, theirs in zip(
      our_stages(config, params, picture(*size)), their_stages(model, picture(*size)), strict=True
    )
  ]
  print(f"\n{type(model).__name__} {size}: " + " ".join(f"{each:.1e}" for each in differences))
  assert max(differences[:-1]) < STAGE
  assert differences[-1] < TOWER


def test_siglip_ignores_a_remainder_of_pixels_at_its_own_size(tmp_path):
  """SigLIP so400m has 27 patches of 14 pixels in an image of 384; here 4 patches of 8 pixels in 37."""
  model = randomized(siglip_with_remainder)
  config, params = saved(model, tmp_path)
  for size in ((37, 37), (40, 56), (32, 32)):
    pairs = zip(our_stages(config, params, picture(*size)), their_stages(model, picture(*size)), strict=True)
    differences = [relative(ours, theirs) for ours, theirs in pairs]
    print(f"\nsiglip with a remainder, {size}: " + " ".join(f"{each:.1e}" for each in differences))
    assert max(differences[:-1]) < STAGE
    assert differences[-1] < TOWER
  teacher = importlib.import_module("dtm_jax.teachers.siglip").build(str(tmp_path))
  assert (teacher.image_size, teacher.grid) == (37, (4, 4))
  with pytest.raises(OptionError, match=r"41x41 .*patch size 8"):
    teacher.resized(41)
  sections = {"teacher": {"name": "siglip", "path": str(tmp_path)}, "data": {"image_size": 32}}
  beside_a_student = build_teacher(config_dict.ConfigDict(sections), patch_size=8)
  assert (beside_a_student.image_size, beside_a_student.grid) == (37, (4, 4))


# The authors' own files --------------------------------------------------------------------------------


def authors_names(folder):
  """Rename tensors that transformers saved to the names of DINOv2's and MAE's authors, with rules by hand."""
  saved = safetensors.load_file(folder / "model.safetensors")
  theirs = {name.removeprefix("vit."): tensor for name, tensor in saved.items()}
  names = {
    "embeddings.cls_token": "cls_token", "embeddings.mask_token": "mask_token",
    "embeddings.position_embeddings": "pos_embed", "embeddings.register_tokens": "register_tokens",
    "embeddings.patch_embeddings.projection.": "patch_embed.proj.", "layernorm.": "norm.",
    "encoder.layer.": "blocks.", ".layernorm_before.": ".norm1.", ".layernorm_after.": ".norm2.",
    ".attention.output.dense.": ".attn.proj.", ".layer_scale1.lambda1": ".ls1.gamma",
    ".layer_scale2.lambda1": ".ls2.gamma", ".intermediate.dense.": ".mlp.fc1.", ".output.dense.": ".mlp.fc2.",
    ".mlp.weights_in.": ".mlp.w12.", ".mlp.weights_out.": ".mlp.w3.",
    "decoder.decoder_": "decoder_", "decoder.mask_token": "mask_token",
  }  # fmt: skip
  tensors = {}
  for name, tensor in theirs.items():
    if ".attention.attention." in name:
      continue
    for old, new in names.items():
      name = name.replace(old, new)
    tensors[name] = tensor
  for layer in range(SIZES["num_hidden_layers"]):
    for leaf in ("weight", "bias"):
      attention = f"encoder.layer.{layer}.attention.attention"
      parts = [theirs[f"{attention}.{part}.{leaf}"] for part in ("query", "key", "value")]
      tensors[f"blocks.{layer}.attn.qkv.{leaf}"] = torch.cat(parts)
  return tensors


def published_mae():
  """Return an MAE with the epsilon of the authors' code."""
  config = transformers.ViTMAEConfig(**SIZES, **IMAGE, **HIDDEN, mask_ratio=0.0, layer_norm_eps=1e-6)
  return transformers.ViTMAEModel(config)


def published_mae_with_decoder():
  decoder = {"decoder_hidden_size": 16, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2}
  sizes = SIZES | IMAGE | HIDDEN | decoder
  config = transformers.ViTMAEConfig(**sizes, mask_ratio=0.0, layer_norm_eps=1e-6)
  return transformers.ViTMAEForPreTraining(config)


AUTHORS = {
  "dinov2": dinov2, "dinov2, registers": dinov2_registers, "dinov2, SwiGLU": dinov2_swiglu,
  "mae": published_mae, "mae, decoder": published_mae_with_decoder,
}  # fmt: skip


def chunked(tensors):
  """Rename blocks to chunks of two, blocks.CHUNK.LAYER, as in DINOv2's training."""
  parts = {name: name.split(".") for name in tensors}
  return {
    ".".join(["blocks", str(int(part[1]) // 2), *part[1:]]) if part[0] == "blocks" else name: tensors[name]
    for name, part in parts.items()
  }


@pytest.mark.parametrize("kind", AUTHORS)
def test_the_authors_files_match_transformers(kind, tmp_path):
  model = randomized(AUTHORS[kind])
  model.save_pretrained(tmp_path / "theirs")
  tensors = authors_names(tmp_path / "theirs")
  teacher = importlib.import_module(f"dtm_jax.teachers.{kind.partition(',')[0]}")
  image = picture(32, 32)
  expected = their_stages(model, image)[-1]
  contents = {"plain.pth": tensors, "model.pth": {"model": tensors, "epoch": 3}}
  contents |= {"chunked.pth": chunked(tensors)} if kind.startswith("dinov2") else {}
  contents |= {"trained.pth": {"teacher": {f"backbone.{name}": t for name, t in tensors.items()}}}
  for name, content in contents.items():
    torch.save(content, tmp_path / name)
    unknown = teacher.build(str(tmp_path / name))
    assert "does not give the heads of its 3 layers of width 32" in unknown.missing
    with pytest.raises(OptionError, match="do not give heads"):
      jax.eval_shape(unknown.apply, unknown.params, image)
    options = {"name": kind.partition(",")[0], "path": str(tmp_path / name)}
    with pytest.raises(OptionError, match=r"does not give the heads .* give --config\.teacher\.heads"):
      build_teacher(config_dict.ConfigDict({"teacher": options, "data": {"image_size": 32}}))
    built = teacher.build(str(tmp_path / name), heads=4)
    assert built.missing is None
    difference = relative(jax.jit(built.apply)(built.params, image), expected)
    print(f"\n{kind}, {name}: {difference:.1e}")
    assert difference < TOWER
  folder = teacher.build(str(tmp_path / "theirs"))
  jax.tree.map(np.testing.assert_array_equal, built.params, folder.params)
  larger = teacher.build(str(tmp_path / "plain.pth"), heads=4, image_size=48)
  same = teacher.build(str(tmp_path / "theirs"), image_size=48)
  np.testing.assert_array_equal(
    jax.jit(larger.apply)(larger.params, picture(48, 48)), jax.jit(same.apply)(same.params, picture(48, 48))
  )


def test_published_sizes_need_no_heads():
  assert frozen_vit_authors.HEADS["dinov2"] == {
    (width, depth): width // 64 for width, depth in ((384, 12), (768, 12), (1024, 24), (1536, 40))
  }
  assert frozen_vit_authors.HEADS["mae"] == {(768, 12): 12, (1024, 24): 16, (1280, 32): 16}


def test_the_authors_files_of_another_teacher_are_refused(tmp_path):
  dinov2().save_pretrained(tmp_path / "dinov2")
  torch.save(authors_names(tmp_path / "dinov2"), tmp_path / "dinov2.pth")
  for name in ("mae", "siglip"):
    with pytest.raises(
      UnreadableFileError, match=r"DINOV2's authors, but the teacher needs one of: (vit_mae|siglip)"
    ):
      importlib.import_module(f"dtm_jax.teachers.{name}").build(str(tmp_path / "dinov2.pth"))
  siglip().save_pretrained(tmp_path / "siglip")
  (tmp_path / "siglip" / "config.json").unlink()
  with pytest.raises(NotThereError, match=r"No config\.json beside .*siglip.*transformers' names"):
    importlib.import_module("dtm_jax.teachers.siglip").build(str(tmp_path / "siglip" / "model.safetensors"))


def test_a_timm_folder_gives_heads_and_normalisation(tmp_path):
  timm = pytest.importorskip("timm_without_torchvision").import_timm()
  torch.manual_seed(0)
  options = {"depth": 2, "embed_dim": 32, "num_heads": 4, "img_size": 28}
  for name, kind in (("vit_small_patch14_dinov2", "dinov2"), ("vit_small_patch14_reg4_dinov2", "dinov2"),
                     ("vit_base_patch16_224.mae", "mae")):  # fmt: skip
    size = 28 if kind == "dinov2" else 32
    model = timm.create_model(name, **options | {"img_size": size}).eval()
    with torch.no_grad():
      for parameter in model.parameters():
        parameter.normal_(0.0, 0.3)
      expected = model.forward_features(torch.from_numpy(picture(size, size)).permute(0, 3, 1, 2))
      expected = expected[:, model.num_prefix_tokens :].numpy()
    folder = tmp_path / name
    folder.mkdir()
    safetensors.save_file(model.state_dict(), folder / "model.safetensors")
    config = {"architecture": name, "model_args": {"num_heads": 4}}
    config |= {"pretrained_cfg": {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}}
    (folder / "config.json").write_text(json.dumps(config))
    teacher = importlib.import_module(f"dtm_jax.teachers.{kind}").build(str(folder))
    assert (teacher.mean, teacher.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    difference = relative(jax.jit(teacher.apply)(teacher.params, picture(size, size)), expected)
    print(f"\ntimm's {name}: {difference:.1e}")
    assert difference < TOWER
