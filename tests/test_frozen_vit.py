"""The frozen towers against transformers' PyTorch classes, stage by stage, on random weights."""

import jax
import numpy as np
import pytest

from dtm_jax.models import frozen_vit, frozen_vit_weights

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
IMAGE = {"image_size": 32, "patch_size": 8}
HIDDEN = {"intermediate_size": 48}
STAGE, TOWER = 1e-5, 1e-4


def siglip():
  return transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**SIZES, **IMAGE, **HIDDEN))


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
  """Its parameters from N(0, 0.3²), so that no scale, bias or token hides a mistake by being 0 or 1."""
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
  """[what enters the first block, every block's output..., the last LayerNorm of the patches]."""
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


@pytest.mark.parametrize("size", [(32, 32), (40, 56), (24, 16)], ids=str)
@pytest.mark.parametrize("make", MODELS, ids=lambda make: make.__name__)
def test_stages_are_those_of_transformers(make, size, tmp_path):
  """The tokens before the blocks and after each; at the table's own grid, a larger and a smaller one."""
  model = randomized(make)
  config, params = saved(model, tmp_path)
  assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(params))
  differences = [
    relative(ours, theirs)
    for ours, theirs in zip(
      our_stages(config, params, picture(*size)), their_stages(model, picture(*size)), strict=True
    )
  ]
  print(f"\n{make.__name__} {size}: " + " ".join(f"{each:.1e}" for each in differences))
  assert max(differences[:-1]) < STAGE
  assert differences[-1] < TOWER
