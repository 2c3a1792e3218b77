"""Draw images and their groups of patches: beside each image, a column for each number of groups.

    python scripts/draw_groups.py --run=runs/quickstart
    python scripts/draw_groups.py --teacher=FOLDER --name=dinov2 --folder=PHOTOS --groups=49,12

`--run` takes the teacher, the image size and the data set from the config.json of a run. Other flags replace
them. Each pixel has the mean colour of its group, and white lines separate the groups.
"""

import argparse
import json
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from PIL import Image, ImageDraw

from dtm_jax import data, datasets, morphing, plugins
from dtm_jax.augment import normalize, to_float
from dtm_jax.errors import NotThereError, OptionError, UserError
from dtm_jax.options.command_line import run_script, script_parser
from dtm_jax.storage import paths
from dtm_jax.teachers import Teacher

HEADER = 24
"""Height of the titles in pixels."""
SHARES = (3 / 4, 1 / 2, 1 / 4, 1 / 8, 1 / 16)
"""Default of --groups: shares of the number of tokens."""
SIDE = 128
"""Smallest side of a drawn image in pixels."""


def main(argv: Sequence[str] | None = None) -> None:
  """Run the command line of the module's docstring."""
  args = _parser().parse_args(argv)
  if args.images < 1:
    raise OptionError(f"--images={args.images} must be at least 1.")
  config = read_config(args.run) if args.run else {}
  teacher = build_teacher(config, args)
  groups = choose_groups(args.groups, teacher.grid)
  image = load_images(config, teacher.image_size, args)
  target_BNC = teacher.tokens(teacher.params, normalize(to_float(image), teacher.mean, teacher.std))
  scale = max(1, round(SIDE / teacher.image_size))
  columns = [enlarge(image, scale)]
  for num_groups in groups:
    label_BN = match(target_BNC, num_groups)
    columns.append(paint(image, np.asarray(label_BN).reshape(-1, *teacher.grid), teacher.patch_size, scale))
  titles = [f"{number} group{'s' * (number > 1)}" for number in groups]
  out = paths.resolve(args.out or (f"{args.run}/groups.png" if args.run else "groups.png"))
  out.parent.mkdir(parents=True, exist_ok=True)
  with out.open("wb") as file:
    lay_out(columns, ["image", *titles]).save(file, format="PNG")
  print(f"{len(image)} images in {', '.join(map(str, groups))} groups: {out}")


def read_config(run: str) -> dict:
  """Return the config.json in the workdir of a run.

  Raises:
    NotThereError: there is no such file.
  """
  path = paths.resolve(run) / "config.json"
  if not path.exists():
    raise NotThereError(f"--run={run}: no config.json there, so it is not the workdir of a run.")
  return json.loads(path.read_text())


def build_teacher(config: dict, args: argparse.Namespace) -> Teacher:
  """Return the teacher of `--teacher`, or else the one in the config of the run.

  Raises:
    OptionError: neither the flags nor the config name a teacher.
  """
  options = dict(config.get("teacher") or {})
  if args.teacher:
    options = {"name": args.name, "path": args.teacher}
    if options["name"] == "clip":
      options["tokens"] = args.tokens
  elif not config:
    raise OptionError(
      "Name a run (--run=WORKDIR) or a teacher (--teacher=FOLDER, and --name if it is not a CLIP)."
    )
  elif not options:
    raise OptionError(
      f"--run={args.run}: the task {config.get('task')!r} has no teacher. Give --teacher and --name."
    )
  size = args.image_size or (not args.teacher and config["data"]["image_size"])
  return plugins.build("teachers", options | ({"image_size": size} if size else {}))


def load_images(config: dict, image_size: int, args: argparse.Namespace) -> np.ndarray:
  """Return centre crops of the first images, uint8 [B, H, W, 3], spread over the classes of a sorted set.

  Raises:
    UserError: none of the images is readable.
  """
  if args.folder:
    options = {"name": "folder", "data_dir": args.folder}
  else:
    options = config["data"]["dataset"] if config else {"name": "cifar10"}
  split = args.split
  if split is None:
    present = plugins.build("datasets", options, function="splits")
    split = datasets.evaluation_split(options) if {*present} - {"train"} else "train"
  dataset = datasets.spread(plugins.build("datasets", options, split=split), args.images)
  batches = data.eval_batches(dataset, batch_size=args.images, image_size=image_size, max_batches=1)
  batch = next(iter(batches))
  if not batch["valid"].any():
    raise UserError(f"None of the first {args.images} images of {dataset.name!r} is readable.")
  return batch["image"][batch["valid"]]


def choose_groups(given: list[str], grid: tuple[int, int]) -> list[int]:
  """Return the given numbers of groups, or SHARES of the number of tokens N.

  Raises:
    OptionError: a number is not between 1 and N.
  """
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
  """Return the labels [B, N] of exactly `num_groups` groups, found in rounds of at most `merges` merges."""
  left = target_BNC.shape[1]
  schedule = []
  while left > num_groups:
    schedule.append(min(merges, left // 2, left - num_groups))  # a round can at most halve the tokens
    left -= schedule[-1]
  merges_K = jnp.array(schedule or [0], jnp.int32)
  return morphing.bipartite_match(target_BNC, merges_K, split="random", key=jax.random.key(0))


def lay_out(columns: list[np.ndarray], titles: list[str], halves: int = 2, margin: int = 2) -> Image.Image:
  """Return one picture of all columns [B, h, w, 3] under their titles.

  The second half of the images stands beside the first. A place without an image is white.
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
  """Return the images [B, H, W, ...] with each pixel repeated `scale` times in both directions."""
  return image.repeat(scale, axis=1).repeat(scale, axis=2)


def paint(image: np.ndarray, label: np.ndarray, patch_size: int, scale: int) -> np.ndarray:
  """Return the images painted with the mean colour of each group and with its outlines.

  Args:
    image: uint8 [B, H, W, 3].
    label: the group of each patch, [B, rows, columns].
    patch_size: side of a patch in pixels.
    scale: factor of the enlargement.
  """
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


def _parser() -> argparse.ArgumentParser:
  result = script_parser(__doc__)
  add = result.add_argument
  add("--run", help="workdir of a run, for its teacher, image size and data set")
  add("--teacher", help="path of a teacher, instead of the run's")
  add("--name", default="clip", help="name of that teacher: clip (default), siglip, dinov2, checkpoint ...")
  add("--tokens", default="normalized", help="tokens of a CLIP: normalized (default) or projected")
  add("--folder", help="folder of images, instead of the run's data set or CIFAR-10")
  add("--split", help="split of the images (default: the one for evaluation)")
  add("--image_size", type=int, help="side in pixels (default: the run's, or the teacher's)")
  add(
    "--groups", type=lambda text: text.split(","), default=[], metavar="N,N,...",
    help="numbers of groups, a column each (default: 3/4 to 1/16 of the tokens)",
  )  # fmt: skip
  add("--images", type=int, default=12, help="number of images (default: 12)")
  add("--out", help="file to write (default: groups.png, in the workdir of the run if there is one)")
  return result


if __name__ == "__main__":
  run_script(main)
