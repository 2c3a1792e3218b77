"""CLIP's configuration from and to the config.json of `transformers`, which supplies the defaults.

Also from open_clip's open_clip_config.json, and from the shapes of OpenAI's tensors. The shapes tell neither
the heads nor the activation; what is known of them without a configuration:

| fact | known | asked for |
|---|---|---|
| heads | towers of the sizes in HEADS, which OpenAI and open_clip published | every other size |
| activation | OpenAI's own archives, which have the entry `input_resolution`: QuickGELU | every other file |

open_clip trained the same sizes with the exact GELU, so sizes do not tell the activation.
"""

import dataclasses
import math
from pathlib import Path
from typing import Any

import transformers

from dtm_jax.errors import OptionError
from dtm_jax.models.clip.model import LEGACY_EOS, CLIPConfig, ImageConfig, TextConfig, Tower
from dtm_jax.models.files.file_checks import UnreadableFileError, blaming, read_json
from dtm_jax.models.layers import ACTIVATIONS

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
OPEN_CLIP_HEAD_WIDTH = 64
"""What open_clip's configurations mean where they say no head_width."""

HEADS = {
  "image": {(768, 12): 12, (1024, 24): 16, (1280, 32): 16, (1408, 40): 16, (1664, 48): 16},
  "text": {(512, 12): 8, (768, 12): 12, (1024, 24): 16, (1280, 32): 20},
}
"""(width, depth) -> heads of the published models: ViT-B, L (OpenAI), H, g and bigG (open_clip)."""


def read(path: Path) -> CLIPConfig:
  """Return the configuration in the file `path`.

  Raises:
    UnreadableFileError: it is no JSON object, not of a CLIP, or has a value of a wrong kind.
  """
  content = read_json(path)
  kinds = {"clip": transformers.CLIPConfig, "clip_vision_model": transformers.CLIPVisionConfig}
  kind = content.get("model_type")
  if kind not in kinds:
    raise UnreadableFileError(f"model_type {kind!r} in {path} is not a CLIP. Available: {', '.join(kinds)}.")
  with blaming(path):
    return _from_transformers(content, kinds[kind])


def _from_transformers(content: dict[str, Any], library: type) -> CLIPConfig:
  kind, theirs = content["model_type"], library.from_dict(content)
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
  shapes: dict[str, tuple[int, ...]],
  *,
  source: str,
  heads: int | tuple[int, int] | None = None,
  activation: str | None = None,
) -> CLIPConfig:
  """Return the configuration of a model with tensors of these shapes under OpenAI's names.

  Args:
    heads: of the image tower, or of image and text tower; None where nobody tells. Then the published sizes
      have theirs, and a tower of another size has None.
    activation: likewise; None stays None.

  Raises:
    UnreadableFileError: lists the tensors that would tell the sizes and are not there.
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
    raise UnreadableFileError(
      f"{source} does not tell its sizes. Missing or of a wrong rank: {', '.join(wrong)}."
    )
  given = dict(zip(("image", "text"), heads if isinstance(heads, tuple | list) else (heads,), strict=False))

  def tower(kind: str, prefix: str) -> Tower:
    mlp_width, width = shapes[prefix + mlp]
    blocks = prefix + "transformer.resblocks."
    depth = len({name.removeprefix(blocks).split(".")[0] for name in shapes if name.startswith(blocks)})
    num_heads = given.get(kind) or HEADS[kind].get((width, depth))
    return Tower(width, depth, num_heads, mlp_width, activation)

  patch_size = shapes[trunk + "conv1.weight"][-1]
  grid = math.isqrt(max(0, shapes[trunk + "positional_embedding"][0] - 1))
  image = ImageConfig(tower("image", trunk), grid * patch_size, patch_size)
  projection = shapes.get("text_projection") or shapes.get(trunk + "proj")
  embed_dim = projection[1] if projection else None
  if not is_clip:
    return CLIPConfig(image, None, embed_dim)
  vocab_size, context_length = shapes["token_embedding.weight"][0], shapes["positional_embedding"][0]
  text = TextConfig(tower("text", ""), vocab_size, context_length, bos_token_id=vocab_size - 2, **OPENAI_TEXT)
  return CLIPConfig(image, text, embed_dim)


def check_agrees(
  config: CLIPConfig, heads: int | tuple[int, int] | None, activation: str | None, source: str
) -> None:
  """Check that options which repeat what a configuration says do not differ from it.

  Raises:
    OptionError: names the option, both values and the file.
  """
  given = heads if isinstance(heads, tuple | list) else (heads,)
  towers = [config.image.tower] + ([config.text.tower] if config.text else [])
  for number, tower in zip(given, towers, strict=False):
    if number is not None and number != tower.num_heads:
      raise OptionError(f"heads={number}, but {source} says {tower.num_heads}.")
  for tower in towers:
    if activation is not None and activation != tower.activation:
      raise OptionError(f"activation={activation!r}, but {source} says {tower.activation!r}.")


def check_known(config: CLIPConfig, source: str, *, text: bool = False, options: dict[str, str]) -> None:
  """Check that heads and activation of the image tower, or with `text` of both towers, are known.

  Args:
    options: how the user gives "heads" and "activation".

  Raises:
    OptionError: names the options that tell them.
  """
  towers = {"image": config.image} | ({"text": config.text} if text and config.text else {})
  unknown = {name: part.tower.unknown() for name, part in towers.items() if part.tower.unknown()}
  if not unknown:
    return
  facts = sorted({fact for missing in unknown.values() for fact in missing}, reverse=True)
  wanted = " and ".join(options.get(fact, fact) for fact in facts)
  sizes = " and of the ".join(f"{name} tower of width {towers[name].tower.width}" for name in unknown)
  raise OptionError(
    f"{source} does not tell {' and '.join(facts)} of the {sizes}. Give {wanted}, or put the model's "
    f"open_clip_config.json beside it. Activations: {', '.join(ACTIVATIONS)}."
  )


def flags(section: str) -> dict[str, str]:
  """Return how a user gives heads and activation to a run, below --config.`section`."""
  return {fact: f"--config.{section}.{fact}=..." for fact in ("heads", "activation")}


def without_unknowns(config: CLIPConfig) -> CLIPConfig:
  """Return a configuration of the same shapes that can be applied: its unknown facts are placeholders."""

  def filled(part):
    tower = part.tower
    tower = dataclasses.replace(
      tower, num_heads=tower.num_heads or 1, activation=tower.activation or "quick_gelu"
    )
    return dataclasses.replace(part, tower=tower)

  return dataclasses.replace(config, image=filled(config.image), text=config.text and filled(config.text))


def read_open_clip(path: Path) -> CLIPConfig:
  """Return the configuration in an open_clip_config.json: exact GELU unless it says quick_gelu.

  Raises:
    UnreadableFileError: it is damaged, or lists what it asks for and our CLIP does not have.
  """
  content = read_json(path)
  with blaming(path, " is not as open_clip writes it"):
    return _from_open_clip(content["model_cfg"], path)


def _from_open_clip(model: dict[str, Any], path: Path) -> CLIPConfig:
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
    raise UnreadableFileError(f"{path} asks for what this CLIP does not have: {', '.join(strange)}.")
  activation = "quick_gelu" if model.get("quick_gelu") else "gelu"

  def tower(section: dict[str, Any], num_heads: int) -> Tower:
    width = section["width"]
    return Tower(width, section["layers"], num_heads, int(width * section.get("mlp_ratio", 4.0)), activation)

  vocab_size = text.get("vocab_size", 49408)
  return CLIPConfig(
    ImageConfig(
      tower(image, image["width"] // image.get("head_width", OPEN_CLIP_HEAD_WIDTH)),
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
