"""CLIP's configuration from and to the config.json of `transformers`, which supplies the defaults."""

import json
from pathlib import Path

import transformers

from dtm_jax.models.clip import CLIPConfig, ImageConfig, TextConfig, Tower

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
