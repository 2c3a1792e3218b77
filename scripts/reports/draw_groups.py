"""Draw images and their groups of patches: beside each image, a column for each number of groups.

    python scripts/draw_groups.py --run=runs/quickstart
    python scripts/draw_groups.py --teacher=FOLDER --name=dinov2 --folder=PHOTOS --groups=49,12

`--run` takes the teacher, the image size and the data set from the config.json of a run. Other flags replace
them. Each pixel has the mean colour of its group, and white lines separate the groups.
"""

import argparse
import json
from collections.abc import Sequence

import numpy as np

from dtm_jax import data, datasets, pictures, plugins
from dtm_jax.errors import NotThereError, OptionError, UserError
from dtm_jax.options.command_line import run_script, script_parser
from dtm_jax.storage import paths
from dtm_jax.teachers import Teacher

SHARES = (3 / 4, 1 / 2, 1 / 4, 1 / 8, 1 / 16)
"""Default of --groups: shares of the number of tokens."""


def main(argv: Sequence[str] | None = None) -> None:
  """Run the command line of the module's docstring."""
  args = _parser().parse_args(argv)
  if args.images < 1:
    raise OptionError(f"--images={args.images} must be at least 1.")
  config = read_config(args.run) if args.run else {}
  teacher = build_teacher(config, args)
  groups = choose_groups(args.groups, teacher.grid)
  image = load_images(config, teacher.image_size, args)
  target_BNC = teacher.tokens(image)
  columns = {
    f"{number} group{'s' * (number > 1)}": np.asarray(pictures.group_tokens(target_BNC, number))
    for number in groups
  }
  out = paths.resolve(args.out or (f"{args.run}/groups.png" if args.run else "groups.png"))
  out.parent.mkdir(parents=True, exist_ok=True)
  figure = pictures.draw_groups(image, columns, grid=teacher.grid, halves=2)
  with out.open("wb") as file:
    figure.savefig(file, format=out.suffix[1:] or "png")
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
  options = {name: value for name, value in (config.get("teacher") or {}).items() if name != "noise"}
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
  add("--out", help="file.png, .svg or .pdf (default: groups.png, in the workdir of the run if there is one)")
  return result


if __name__ == "__main__":
  run_script(main)
