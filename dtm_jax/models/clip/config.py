"""Read and write CLIP's configuration: config.json of `transformers`, and open_clip_config.json of open_clip.

`clip.shapes` finds the configuration of a file of weights that stands alone.
"""

from pathlib import Path
from typing import Any

from dtm_jax.models.clip.model import LEGACY_EOS, CLIPConfig, ImageConfig, TextConfig, Tower
from dtm_jax.models.files.file_checks import UnreadableFileError, blaming, read_json

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
_TOWER: dict[str, Any] = {
  "num_hidden_layers": 12,
  "hidden_act": "quick_gelu",
  "layer_norm_eps": 1e-5,
  "projection_dim": 512,
}
DEFAULTS: dict[str, dict[str, Any]] = {
  "vision": _TOWER | {
    "hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "image_size": 224,
    "patch_size": 32,
  },
  "text": _TOWER | {
    "hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8, "vocab_size": 49408,
    "max_position_embeddings": 77, "pad_token_id": 1, "bos_token_id": 49406, "eos_token_id": 49407,
  },
  "both": {"projection_dim": 512, "logit_scale_init_value": 2.6592},
}  # fmt: skip
"""The defaults of `transformers` for the image tower, the text tower and both."""

OPENAI_TEXT = {"pad_token_id": 0, "eos_token_id": LEGACY_EOS}
"""Special tokens of OpenAI's and open_clip's text towers: a text ends at its largest id."""

OPEN_CLIP_HEAD_WIDTH = 64
"""open_clip's default for head_width."""

_OPEN_CLIP_TOWER = {"layers", "width", "head_width", "mlp_ratio"}
_OPEN_CLIP_KEYS = {
  "model": {"embed_dim", "quick_gelu", "vision_cfg", "text_cfg", "custom_text"},
  "vision": {"image_size", "patch_size", "patch_dropout"} | _OPEN_CLIP_TOWER,
  "text": {"context_length", "vocab_size", "heads"} | _OPEN_CLIP_TOWER,
}


def read(path: Path) -> CLIPConfig:
  """Return the configuration in a config.json of `transformers`, whose defaults fill missing values.

  Raises:
    UnreadableFileError: the file holds no JSON object, no CLIP, or a value of a wrong type.
  """
  content = read_json(path)
  kinds = ("clip", "clip_vision_model")
  kind = content.get("model_type")
  if kind not in kinds:
    raise UnreadableFileError(f"model_type {kind!r} in {path} is not a CLIP. Available: {', '.join(kinds)}.")
  with blaming(path):
    return _from_transformers(content)


def _from_transformers(content: dict[str, Any]) -> CLIPConfig:
  """Return what `transformers` reads. Its import takes four seconds if PyTorch is installed."""
  if content["model_type"] == "clip":
    image, text = (_filled(_section(content, name), DEFAULTS[name]) for name in ("vision", "text"))
    both = _filled(content, DEFAULTS["both"])
    return CLIPConfig(
      _image_config(image),
      TextConfig(_tower(text), **_our_fields(TEXT, text)),
      both["projection_dim"],
      both["logit_scale_init_value"],
    )
  image = _filled(content, DEFAULTS["vision"])
  projected = WITHOUT_PROJECTION not in (content.get("architectures") or ())
  return CLIPConfig(_image_config(image), text=None, embed_dim=image["projection_dim"] if projected else None)


def _section(content: dict[str, Any], name: str) -> dict[str, Any]:
  """Return the options of a tower. Old files have them twice, and the second place counts."""
  found = [content.get(f"{name}_config{suffix}") for suffix in ("_dict", "")]
  return next((section for section in found if section is not None), {})


def _filled(section: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
  """Return the values of the options in `defaults`. An option that is missing or null has its default."""
  filled = {}
  for name, default in defaults.items():
    value, kind = section.get(name), type(default)
    if value is None:
      value = default
    if kind is float and type(value) is int:
      value = float(value)
    if type(value) is not kind:
      raise ValueError(f"{name} is {value!r}, but must be of type {kind.__name__}.")
    filled[name] = value
  return filled


def _image_config(section: dict[str, Any]) -> ImageConfig:
  return ImageConfig(_tower(section), **_our_fields(IMAGE, section))


def _tower(section: dict[str, Any]) -> Tower:
  return Tower(**_our_fields(TOWER, section))


def _our_fields(names: dict[str, str], section: dict[str, Any]) -> dict[str, Any]:
  return {ours: section[name] for ours, name in names.items()}


def read_open_clip(path: Path) -> CLIPConfig:
  """Return the configuration in an open_clip_config.json. The activation is GELU unless it sets quick_gelu.

  Raises:
    UnreadableFileError: the file is damaged, or it sets options that our CLIP does not have; the message
      lists them.
  """
  content = read_json(path)
  with blaming(path, " is not as open_clip writes it"):
    return _from_open_clip(content["model_cfg"], path)


def _from_open_clip(model: dict[str, Any], path: Path) -> CLIPConfig:
  image, text = model["vision_cfg"], model["text_cfg"]
  unsupported = [
    f"{part} {name}={value!r}"
    for part, section in (("model", model), ("vision", image), ("text", text))
    for name, value in section.items()
    if (name not in _OPEN_CLIP_KEYS[part] and value)
    or (name in ("image_size", "layers") and not isinstance(value, int))
  ]
  if unsupported:
    raise UnreadableFileError(f"{path} asks for what this CLIP does not have: {', '.join(unsupported)}.")
  activation = "quick_gelu" if model.get("quick_gelu") else "gelu"

  def tower(section: dict[str, Any], num_heads: int) -> Tower:
    width = section["width"]
    return Tower(width, section["layers"], num_heads, int(width * section.get("mlp_ratio", 4.0)), activation)

  image_heads = image["width"] // image.get("head_width", OPEN_CLIP_HEAD_WIDTH)
  return CLIPConfig(
    ImageConfig(tower(image, image_heads), image["image_size"], image["patch_size"]),
    openai_text_config(
      tower(text, text["heads"]), text.get("vocab_size", 49408), text.get("context_length", 77)
    ),
    model["embed_dim"],
  )


def openai_text_config(tower: Tower, vocab_size: int, context_length: int) -> TextConfig:
  """Return the configuration of a text tower with OpenAI's special tokens."""
  return TextConfig(tower, vocab_size, context_length, bos_token_id=vocab_size - 2, **OPENAI_TEXT)


def write(path: Path, config: CLIPConfig) -> None:
  """Write a configuration as the config.json of a CLIPModel, or of a CLIPVisionModel without a text tower."""
  import transformers  # takes a second, and other models do not need it

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


def _their_fields(config: ImageConfig | TextConfig, names: dict[str, str]) -> dict[str, Any]:
  tower = {theirs: getattr(config.tower, ours) for ours, theirs in TOWER.items()}
  return tower | {theirs: getattr(config, ours) for ours, theirs in names.items()}
