"""Find CLIP's configuration from the shapes of OpenAI's tensors, and check what the shapes do not give.

Shapes do not give the number of heads and the activation. Without a configuration file, we know:

| fact | known for | the user must give it for |
|---|---|---|
| heads | towers of the sizes in HEADS, which OpenAI and open_clip published | every other size |
| activation | OpenAI's archives, which have the entry `input_resolution`: QuickGELU | every other file |

The sizes do not give the activation, because open_clip trained the same sizes with the exact GELU.
"""

import dataclasses
import math
from typing import TypeVar

from dtm_jax.errors import OptionError
from dtm_jax.models.clip.config import openai_text_config
from dtm_jax.models.clip.model import CLIPConfig, ImageConfig, TextConfig, Tower
from dtm_jax.models.files.weight_names import check_ranks
from dtm_jax.models.layers import ACTIVATIONS

HEADS = {
  "image": {(768, 12): 12, (1024, 24): 16, (1280, 32): 16, (1408, 40): 16, (1664, 48): 16},
  "text": {(512, 12): 8, (768, 12): 12, (1024, 24): 16, (1280, 32): 20},
}
"""(width, depth) -> heads of the published models: ViT-B, L (OpenAI), H, g and bigG (open_clip)."""

Heads = int | tuple[int, int]
"""Heads of the image tower, or of the image and the text tower."""

TowerConfig = TypeVar("TowerConfig", ImageConfig, TextConfig)


def from_openai(
  shapes: dict[str, tuple[int, ...]],
  *,
  source: str,
  heads: Heads | None = None,
  activation: str | None = None,
) -> CLIPConfig:
  """Return the configuration of a model whose tensors have these shapes under OpenAI's names.

  Args:
    source: the file of the tensors, for messages.
    heads: None takes the heads of the published sizes. A tower of another size then has heads of None.
    activation: None stays None.

  Raises:
    UnreadableFileError: tensors that give the sizes are missing; the message lists them.
  """
  is_clip = any(name.startswith(("token_embedding.", "transformer.resblocks.")) for name in shapes)
  mlp, trunk = "transformer.resblocks.0.mlp.c_fc.weight", "visual."
  ranks = {trunk + "conv1.weight": 4, trunk + "positional_embedding": 2, trunk + mlp: 2}
  if is_clip:
    ranks |= {"token_embedding.weight": 2, "positional_embedding": 2, mlp: 2, "text_projection": 2}
  check_ranks(shapes, ranks, source=source)
  given = dict(zip(("image", "text"), _pair(heads), strict=False))

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
  return CLIPConfig(image, openai_text_config(tower("text", ""), vocab_size, context_length), embed_dim)


def _pair(heads: Heads | None) -> tuple[int | None, ...]:
  return tuple(heads) if isinstance(heads, tuple | list) else (heads,)


def check_agrees(config: CLIPConfig, heads: Heads | None, activation: str | None, source: str) -> None:
  """Check that the options `heads` and `activation` do not contradict a configuration.

  Raises:
    OptionError: they do; the message names the option, both values and the file.
  """
  towers = [config.image.tower] + ([config.text.tower] if config.text else [])
  for number, tower in zip(_pair(heads), towers, strict=False):
    if number is not None and number != tower.num_heads:
      raise OptionError(f"heads={number}, but {source} says {tower.num_heads}.")
  for tower in towers:
    if activation is not None and activation != tower.activation:
      raise OptionError(f"activation={activation!r}, but {source} says {tower.activation!r}.")


def check_known(config: CLIPConfig, source: str, *, text: bool = False, options: dict[str, str]) -> None:
  """Check that the heads and the activation of the image tower are known, and with `text` of both towers.

  Args:
    source: the file of the weights, for messages.
    options: how the user gives "heads" and "activation".

  Raises:
    OptionError: they are unknown; the message names the options that give them.
  """
  towers: dict[str, Tower] = {"image": config.image.tower}
  if text and config.text:
    towers["text"] = config.text.tower
  unknown = {name: tower.unknown() for name, tower in towers.items() if tower.unknown()}
  if not unknown:
    return
  facts = sorted({fact for missing in unknown.values() for fact in missing}, reverse=True)
  wanted = " and ".join(options.get(fact, fact) for fact in facts)
  sizes = " and of the ".join(f"{name} tower of width {towers[name].width}" for name in unknown)
  raise OptionError(
    f"{source} does not give {' and '.join(facts)} of the {sizes}. Give {wanted}, or put the model's "
    f"open_clip_config.json beside it. Activations: {', '.join(ACTIVATIONS)}."
  )


def flags(section: str) -> dict[str, str]:
  """Return the flags of --config.`section` that give heads and activation, for `check_known`."""
  return {fact: f"--config.{section}.{fact}=..." for fact in ("heads", "activation")}


def without_unknowns(config: CLIPConfig) -> CLIPConfig:
  """Return a configuration with placeholders for unknown facts, which change no shape of a parameter."""

  def filled(part: TowerConfig) -> TowerConfig:
    tower = dataclasses.replace(
      part.tower, num_heads=part.tower.num_heads or 1, activation=part.tower.activation or "quick_gelu"
    )
    return dataclasses.replace(part, tower=tower)

  text = filled(config.text) if config.text else None
  return dataclasses.replace(config, image=filled(config.image), text=text)
