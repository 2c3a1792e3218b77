"""Draws images and their morphed groups: beside each image, a column for each number of groups.

    python scripts/draw_groups.py --run=runs/quickstart
    python scripts/draw_groups.py --teacher=FOLDER --name=dinov2 --folder=PHOTOS --groups=49,12

`--run` takes the teacher, the image size and the data set from the run's config.json; what is given beside it
replaces them. Every patch has the mean colour of its group, and lines run where two groups meet.
"""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from einops import rearrange
from PIL import Image, ImageDraw

from dtm_jax import data, datasets, morphing, plugins
from dtm_jax.augment import normalize, to_float
from dtm_jax.errors import NotThereError, OptionError, UserError
from dtm_jax.storage import paths
from dtm_jax.teachers import Teacher

HEADER = 24
SHARES = (3 / 4, 1 / 2, 1 / 4, 1 / 8, 1 / 16)  # of the number of tokens, for --groups
SIDE = 128  # of a drawn image in pixels, at least


def main(_) -> None:
  try:
    draw()
  except UserError as error:
    sys.exit(str(error))


def draw() -> None:
  """Draws what the flags say."""
  config = read_config(_RUN.value) if _RUN.value else {}
  teacher = build_teacher(config)
  groups = choose_groups(_GROUPS.value, teacher.grid)
  image = load_images(config, teacher.image_size)
  target_BNC = teacher.tokens(teacher.params, normalize(to_float(image), teacher.mean, teacher.std))
  scale = max(1, round(SIDE / teacher.image_size))
  columns = [enlarge(image, scale)]
  for num_groups in groups:
    label_BN = match(target_BNC, num_groups)
    columns.append(paint(image, np.asarray(label_BN).reshape(-1, *teacher.grid), teacher.patch_size, scale))
  titles = [f"{number} group{'s' * (number > 1)}" for number in groups]
  out = paths.resolve(_OUT.value or (f"{_RUN.value}/groups.png" if _RUN.value else "groups.png"))
  out.parent.mkdir(parents=True, exist_ok=True)
  with out.open("wb") as file:
    lay_out(columns, ["image", *titles]).save(file, format="PNG")
  print(f"{len(image)} images in {', '.join(map(str, groups))} groups: {out}")


def read_config(run: str) -> dict:
  """The config of a run, which its workdir keeps."""
  path = paths.resolve(run) / "config.json"
  if not path.exists():
    raise NotThereError(f"--run={run}: no config.json there, so it is not the workdir of a run.")
  return json.loads(path.read_text())


def build_teacher(config: dict) -> Teacher:
  """The teacher of the flags, of the run, or of a run without a teacher its own student."""
  options = dict(config.get("teacher") or {})
  if _TEACHER.value:
    options = {"name": _NAME.value or "clip", "path": _TEACHER.value}
    if options["name"] == "clip":
      options["tokens"] = _TOKENS.value or "normalized"
  elif not config:
    raise OptionError(
      "Name a run (--run=WORKDIR) or a teacher (--teacher=FOLDER, and --name where it is no CLIP)."
    )
  elif not options:
    raise OptionError(
      f"--run={_RUN.value}: the task {config.get('task')!r} has no teacher. Give --teacher and --name."
    )
  size = _IMAGE_SIZE.value or (not _TEACHER.value and config["data"]["image_size"])
  return plugins.build("teachers", options | ({"image_size": size} if size else {}))


def load_images(config: dict, image_size: int) -> np.ndarray:
  """uint8 [B, H, W, 3], centre crops of the first images, spread over the classes of a sorted set."""
  if _FOLDER.value:
    options = {"name": "folder", "data_dir": _FOLDER.value}
  else:
    options = config["data"]["dataset"] if config else {"name": "cifar10"}
  split = _SPLIT.value
  if split is None:
    present = plugins.build("datasets", options, function="splits")
    split = datasets.evaluation_split(options) if {*present} - {"train"} else "train"
  dataset = datasets.spread(plugins.build("datasets", options, split=split), _IMAGES.value)
  batches = data.eval_batches(dataset, batch_size=_IMAGES.value, image_size=image_size, max_batches=1)
  batch = next(iter(batches))
  if not batch["valid"].any():
    raise UserError(f"None of the first {_IMAGES.value} images of {dataset.name!r} can be read.")
  return batch["image"][batch["valid"]]


def choose_groups(given: list[str], grid: tuple[int, int]) -> list[int]:
  """The numbers of groups that are given, or shares of the number of tokens N."""
  num_tokens = grid[0] * grid[1]
  if not given:
    return sorted({max(1, round(share * num_tokens)) for share in SHARES}, reverse=True)
  wrong = [text for text in given if not text.strip().isdigit() or not 1 <= int(text) <= num_tokens]
  if wrong:
    raise OptionError(
      f"--groups={','.join(given)}: {', '.join(wrong)} does not fit. The grid of {grid[0]}x{grid[1]} patches "
      f"has N={num_tokens} tokens, so 1 to {num_tokens} groups are possible."
    )
  return [int(text) for text in given]


def match(target_BNC: jax.Array, num_groups: int, merges: int = 4) -> jax.Array:
  """Labels of exactly `num_groups` groups, in rounds of at most `merges` merges.

  A round can at most halve the tokens.
  """
  left, merges_K = target_BNC.shape[1], []
  while left > num_groups:
    merges_K.append(min(merges, left // 2, left - num_groups))
    left -= merges_K[-1]
  merges_K = jnp.array(merges_K or [0], jnp.int32)
  return morphing.bipartite_match(target_BNC, merges_K, split="random", key=jax.random.key(0))


def lay_out(columns: list[np.ndarray], titles: list[str], halves: int = 2, margin: int = 2) -> Image.Image:
  """Columns of pictures [B, h, w, 3] under their titles, the second half of the images beside the first.

  A place without an image stays white.
  """
  halves = min(halves, len(columns[0]))
  missing = -len(columns[0]) % halves
  columns = [np.pad(x, ((0, missing), (0, 0), (0, 0), (0, 0)), constant_values=255) for x in columns]
  padding = ((0, 0), (margin, margin), (margin, margin), (0, 0))
  tiles = np.stack([np.pad(column, padding, constant_values=255) for column in columns])
  pictures = rearrange(tiles, "c (half b) h w rgb -> (b h) (half c w) rgb", half=halves)
  image = Image.fromarray(np.pad(pictures, ((HEADER, 0), (0, 0), (0, 0)), constant_values=255))
  for place, title in enumerate(titles * halves):
    position = ((place + 0.5) * image.width / len(titles) / halves, HEADER / 2)
    ImageDraw.Draw(image).text(position, title, fill="black", anchor="mm", font_size=HEADER * 0.6)
  return image


def enlarge(image: np.ndarray, scale: int) -> np.ndarray:
  """[B, H, W, ...], every pixel `scale` times as large."""
  return image.repeat(scale, axis=1).repeat(scale, axis=2)


def paint(image: np.ndarray, label: np.ndarray, patch_size: int, scale: int) -> np.ndarray:
  """The images with the mean colour of each group, and its outlines."""
  owner = label.repeat(patch_size, axis=1).repeat(patch_size, axis=2)
  painted = image.astype(np.float64)
  for pixels, groups in zip(painted, owner, strict=True):
    for group in np.unique(groups):
      pixels[groups == group] = pixels[groups == group].mean(axis=0)
  painted, owner = enlarge(painted.astype(np.uint8), scale), enlarge(owner, scale)
  edge = np.zeros(owner.shape, bool)
  edge[:, 1:] |= owner[:, 1:] != owner[:, :-1]
  edge[:, :, 1:] |= owner[:, :, 1:] != owner[:, :, :-1]
  painted[edge] = 255
  return painted


if __name__ == "__main__":  # the flags too: scripts/consistency_drawing.py imports this file
  _RUN = flags.DEFINE_string("run", None, "Workdir of a run, for its teacher, image size and data set.")
  _TEACHER = flags.DEFINE_string("teacher", None, "Path of a teacher, in place of the run's.")
  _NAME = flags.DEFINE_string(
    "name", None, "Name of that teacher: clip (default), siglip, dinov2, checkpoint ..."
  )
  _TOKENS = flags.DEFINE_string("tokens", None, "Tokens of a CLIP: normalized (default) or projected.")
  _FOLDER = flags.DEFINE_string(
    "folder", None, "Folder of images, in place of the run's data set or CIFAR-10."
  )
  _SPLIT = flags.DEFINE_string("split", None, "Split of the images. Default: the one for evaluation.")
  _IMAGE_SIZE = flags.DEFINE_integer(
    "image_size", None, "Side in pixels. Default: the run's, or the teacher's."
  )
  _GROUPS = flags.DEFINE_list(
    "groups", [], "Numbers of groups, one column each. Default: 3/4 to 1/16 of the tokens."
  )
  _IMAGES = flags.DEFINE_integer("images", 12, "How many images.", lower_bound=1)
  _OUT = flags.DEFINE_string(
    "out", None, "The picture. Default: groups.png, in the run's workdir if there is one."
  )
  app.run(main)
