"""CLIP's configuration from and to the config.json of `transformers`, which supplies the defaults.

Also from open_clip's open_clip_config.json, and from the shapes of OpenAI's tensors.
"""

import json
import math
from pathlib import Path
from typing import Any

import transformers

from dtm_jax.models.clip import LEGACY_EOS, CLIPConfig, ImageConfig, TextConfig, Tower

TOWER = {
  "width": "hidden_size",
  "depth": "num_hidden_layers",
  "num_heads": "num_attention_heads",
  "mlp_width": "intermediate_size",
  "activation": "hidden_act",
  "eps": "layer_norm_eps",
}
IMAGE = {"image_size": "image_size", "patch_size": "patch_size"}
TEXT = {
  "vocab_size": "vocab_size",
  "context_length": "max_position_embeddings",
  "pad_token_id": "pad_token_id",
  "bos_token_id": "bos_token_id",
  "eos_token_id": "eos_token_id",
}
WITHOUT_PROJECTION = "CLIPVisionModel"

# OpenAI's texts end at their largest id, and are padded with 0.
OPENAI_TEXT = {"pad_token_id": 0, "eos_token_id": LEGACY_EOS}
HEAD_WIDTH = 64


def read(path: Path) -> CLIPConfig:
  """The configuration in the file `path`.

  Raises:
    ValueError: it is not of a CLIP.
  """
  content = json.loads(path.read_text())
  kinds = {"clip": transformers.CLIPConfig, "clip_vision_model": transformers.CLIPVisionConfig}
  kind = content.get("model_type")
  if kind not in kinds:
    raise ValueError(f"model_type {kind!r} in {path} is not a CLIP. Available: {', '.join(kinds)}.")
  theirs = kinds[kind].from_dict(content)
  if kind == "clip":
    return CLIPConfig(
      _tower_config(ImageConfig, IMAGE, theirs.vision_config),
      _tower_config(TextConfig, TEXT, theirs.text_config),
      theirs.projection_dim,
      theirs.logit_scale_init_value,
    )
  projected = WITHOUT_PROJECTION not in content.get("architectures", ())
  image = _tower_config(ImageConfig, IMAGE, theirs)
  return CLIPConfig(image, text=None, embed_dim=theirs.projection_dim if projected else None)


def from_openai(
  shapes: dict[str, tuple[int, ...]], *, source: str, head_width: int = HEAD_WIDTH
) -> CLIPConfig:
  """The configuration of a model with tensors of these shapes under OpenAI's names.

  The shapes do not tell the heads, which are `head_width` wide (a narrower model has one), nor the
  activation, which is OpenAI's QuickGELU.

  Raises:
    ValueError: lists the tensors that would tell the sizes and are not there.
  """
  is_clip = any(name.startswith(("token_embedding.", "transformer.resblocks.")) for name in shapes)
  mlp, trunk = "transformer.resblocks.0.mlp.c_fc.weight", "visual."
  telling = {trunk + "conv1.weight": 4, trunk + "positional_embedding": 2, trunk + mlp: 2}
  if is_clip:
    telling |= {"token_embedding.weight": 2, "positional_embedding": 2, mlp: 2, "text_projection": 2}
  wrong = [
    f"{name} {shapes.get(name, '')}" for name, rank in telling.items() if len(shapes.get(name, ())) != rank
  ]
  if wrong:
    raise ValueError(f"{source} does not tell its sizes. Missing or of a wrong rank: {', '.join(wrong)}.")

  def tower(prefix: str) -> Tower:
    mlp_width, width = shapes[prefix + mlp]
    blocks = prefix + "transformer.resblocks."
    depth = len({name.removeprefix(blocks).split(".")[0] for name in shapes if name.startswith(blocks)})
    return Tower(width, depth, max(1, width // head_width), mlp_width)

  patch_size = shapes[trunk + "conv1.weight"][-1]
  grid = math.isqrt(shapes[trunk + "positional_embedding"][0] - 1)
  image = ImageConfig(tower(trunk), grid * patch_size, patch_size)
  projection = shapes.get("text_projection") or shapes.get(trunk + "proj")
  embed_dim = projection[1] if projection else None
  if not is_clip:
    return CLIPConfig(image, None, embed_dim)
  vocab_size, context_length = shapes["token_embedding.weight"][0], shapes["positional_embedding"][0]
  text = TextConfig(tower(""), vocab_size, context_length, bos_token_id=vocab_size - 2, **OPENAI_TEXT)
  return CLIPConfig(image, text, embed_dim)


def read_open_clip(path: Path) -> CLIPConfig:
  """The configuration in an open_clip_config.json: exact GELU unless it says quick_gelu.

  Raises:
    ValueError: lists what it asks for and our CLIP does not have.
  """
  model = json.loads(path.read_text())["model_cfg"]
  image, text = model["vision_cfg"], model["text_cfg"]
  known = {
    "model": {"embed_dim", "quick_gelu", "vision_cfg", "text_cfg", "custom_text"},
    "vision": {"image_size", "patch_size", "patch_dropout"} | _OPEN_CLIP_TOWER,
    "text": {"context_length", "vocab_size", "heads"} | _OPEN_CLIP_TOWER,
  }
  strange = [
    f"{part} {name}={value!r}"
    for part, section in (("model", model), ("vision", image), ("text", text))
    for name, value in section.items()
    if (name not in known[part] and value)
    or (name in ("image_size", "layers") and not isinstance(value, int))
  ]
  if strange:
    raise ValueError(f"{path} asks for what this CLIP does not have: {', '.join(strange)}.")
  activation = "quick_gelu" if model.get("quick_gelu") else "gelu"

  def tower(section: dict[str, Any], num_heads: int) -> Tower:
    width = section["width"]
    return Tower(width, section["layers"], num_heads, int(width * section.get("mlp_ratio", 4.0)), activation)

  vocab_size = text.get("vocab_size", 49408)
  return CLIPConfig(
    ImageConfig(
      tower(image, image["width"] // image.get("head_width", HEAD_WIDTH)),
      image["image_size"],
      image["patch_size"],
    ),
    TextConfig(
      tower(text, text["heads"]),
      vocab_size,
      text.get("context_length", 77),
      bos_token_id=vocab_size - 2,
      **OPENAI_TEXT,
    ),
    model["embed_dim"],
  )


_OPEN_CLIP_TOWER = {"layers", "width", "head_width", "mlp_ratio"}


def write(path: Path, config: CLIPConfig) -> None:
  """Writes `config` to the file `path`."""
  image = _their_fields(config.image, IMAGE)
  if config.text is None:
    projection = {} if config.embed_dim is None else {"projection_dim": config.embed_dim}
    suffix = "" if config.embed_dim is None else "WithProjection"
    theirs = transformers.CLIPVisionConfig(**image, **projection, architectures=[WITHOUT_PROJECTION + suffix])
  else:
    theirs = transformers.CLIPConfig(
      vision_config=image | {"projection_dim": config.embed_dim},
      text_config=_their_fields(config.text, TEXT) | {"projection_dim": config.embed_dim},
      projection_dim=config.embed_dim,
      logit_scale_init_value=config.init_logit_scale,
      architectures=["CLIPModel"],
    )
  theirs.to_json_file(path, use_diff=False)


def _tower_config(kind, fields: dict[str, str], theirs):
  tower = Tower(**{ours: getattr(theirs, name) for ours, name in TOWER.items()})
  return kind(tower, **{ours: getattr(theirs, name) for ours, name in fields.items()})


def _their_fields(config: ImageConfig | TextConfig, fields: dict[str, str]) -> dict:
  tower = {name: getattr(config.tower, ours) for ours, name in TOWER.items()}
  return tower | {name: getattr(config, ours) for ours, name in fields.items()}
