"""Write one HTML page about a consistency study: its table, and drawings of what single tokens know.

    python -m dtm_jax.main --config=configs/consistency.py
    python scripts/consistency_report.py --workdir=runs/consistency --out=consistency.html

The network, the data and the morphers are those of the run's config.json. The numbers are those of its
metrics.jsonl. The drawings run the network once more, on the batches of the shown images only. The page is
self-contained: it loads no other file.
"""

import dataclasses
import datetime
import html
import importlib.metadata
import json
import platform
import shlex
import string
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from dtm_jax.errors import OptionError
from dtm_jax.evaluators.consistency import UNMORPHED, Evaluator
from dtm_jax.models.clip import prompts
from dtm_jax.options.command_line import run_script, script_parser, start_above
from dtm_jax.storage import paths

if not __package__:
  start_above(__file__)

from . import consistency_drawing as drawing
from . import consistency_figure
from .consistency_study import Study

TEMPLATE = Path(__file__).with_suffix(".html")
MEASURES = {"zeroshot": 100, "linear": 100, "cosine": 1}
"""The factor of each measure: 100 for percent."""
PURITIES = ("zeroshot_purity", "linear_purity")
LABELS = {
  "zeroshot": "zero-shot",
  "linear": "linear probe",
  "cosine": "neighbours’ cosine",
  "zeroshot_purity": "purity (zero-shot)",
  "linear_purity": "purity (linear)",
}
"""The titles of the columns, which a narrow screen shows in every row."""
CONTROL = "random"
LIBRARIES = ("jax", "flax", "numpy", "opencv-python-headless")


def main(argv: Sequence[str] | None = None) -> None:
  """Run the command line of the module's docstring."""
  parser = script_parser(__doc__)
  parser.add_argument("--workdir", required=True, help="workdir of a consistency study")
  parser.add_argument("--out", default="consistency.html", help="file to write (default: consistency.html)")
  parser.add_argument("--images", type=int, default=12, help="number of images (default: 12)")
  parser.add_argument("--figure", metavar="FILE", help="also draw an SVG figure for a text: the first images")
  args = parser.parse_args(argv)
  if args.images < 1:
    raise OptionError(f"--images={args.images} must be at least 1.")
  content = Content.of_run(args.workdir, args.images)
  page = content.page()
  paths.resolve(args.out).write_text(page)
  print(f"{args.out}: {len(page.encode()) / 1e6:.2f} MB")
  if args.figure:
    paths.resolve(args.figure).write_text(consistency_figure.make(content.pictures, content.study.numbers))
    print(args.figure)


def make_page(workdir: str, num_images: int) -> str:
  """Return the page of the run in `workdir`, with `num_images` images.

  Raises:
    FileNotFoundError: there is no such run, or a file of it is missing.
    ValueError: the run is not a consistency study, or it has not ended.
  """
  return Content.of_run(workdir, num_images).page()


@dataclasses.dataclass(frozen=True)
class Content:
  """What page and figure show.

  Attributes:
    groups: how many groups each morpher makes, in words.
  """

  study: Study
  evaluator: Evaluator
  groups: dict[str, str]
  pictures: drawing.Pictures

  @classmethod
  def of_run(cls, workdir: str, num_images: int) -> "Content":
    """Read the run, and run its network on the images to show."""
    study = Study.read(workdir)
    evaluator, state = study.evaluator()
    examples = evaluator.examples(state, num_images)
    num_tokens = examples.group_BSN.shape[2]
    groups = {name: describe(study.options.morphers[name], num_tokens) for name in evaluator.names[1:]}
    shown = [0, 1] + [index for index, name in enumerate(evaluator.names) if name == CONTROL and index > 1]
    names = said_names(evaluator.test.class_names or (), study.options.prompts)
    return cls(study, evaluator, groups, drawing.Pictures(examples, names, evaluator.names, groups, shown))

  def page(self) -> str:
    """Return the HTML page."""
    study, evaluator, groups, pictures = self.study, self.evaluator, self.groups, self.pictures
    morphed, num_images = evaluator.names[1:], len(pictures.examples.label_B)
    limit = study.options.get("max_images")
    num_test = min(evaluator.test.num_examples, limit or evaluator.test.num_examples)
    num_tokens = pictures.examples.group_BSN.shape[2]
    return string.Template(TEMPLATE.read_text()).substitute(
      summary=summary(study.numbers, morphed, groups),
      table=table(study.numbers, evaluator.names, groups),
      measured_on=f"{num_test:,} images of {html.escape(evaluator.test.name)} × {num_tokens} tokens",
      num_images=num_images,
      way=html.escape(f"{morphed[0]}, {groups[morphed[0]]}"),
      defs=pictures.definitions(),
      right_wrong=pictures.right_wrong(),
      group_maps=pictures.group_maps(),
      query=pictures.query_words(),
      lowest=f"{pictures.lowest:.2f}".replace("-", "−"),
      gradient=drawing.gradient(),
      similarity=pictures.similarity(),
      made=made(study, evaluator, num_test),
    )


def describe(options: Any, num_tokens: int) -> str:
  """Return how many groups a morpher makes of N tokens, as far as its options tell."""
  low, high = options.get("min_groups", 1), options.get("max_groups") or num_tokens
  if options.get("groups") is not None:
    low = high = options["groups"]
  if options["name"] in ("image", "identity"):
    low = high = {"image": 1, "identity": num_tokens}[options["name"]]
  number = f"{low}" if low == high else f"{low} to {high}"
  return f"{number} of {num_tokens} groups" if low != 1 or high != 1 else "one group"


def said_names(class_names: Sequence[str], templates: str) -> list[str]:
  """Return the names of the classes in their captions. The class names of ImageNet are numbers.

  If a caption does not contain the class name, the name is the part in which the first template's captions
  differ.
  """
  captions = [several[0] for several in prompts.captions(class_names, templates)]
  spelled = [name.replace("_", " ") for name in class_names]
  if all(name in caption for name, caption in zip(spelled, captions, strict=True)):
    return spelled
  start, end = common_length(captions), common_length([caption[::-1] for caption in captions])
  return [caption[start : len(caption) - end] for caption in captions]


def common_length(texts: Sequence[str]) -> int:
  """Return the length of the beginning that all texts share."""
  places = enumerate(zip(*texts, strict=False))
  return next((place for place, letters in places if len(set(letters)) > 1), 0)


def summary(numbers: dict[str, float], morphed: Sequence[str], groups: dict[str, str]) -> str:
  """Return the effect of the first morpher on each measure, and that of the control."""
  way = morphed[0]
  gain = lambda name: 100 * (numbers[f"{name}_zeroshot"] - numbers[f"{UNMORPHED}_zeroshot"])
  text = (
    f"Morphing by {html.escape(way)} ({groups[way]}) changes the share of tokens with the zero-shot class of "
    f"their image by {signed(gain(way), 1)} points"
  )
  if CONTROL in morphed[1:]:
    text += f". Averaging in random groups, the control, changes it by {signed(gain(CONTROL), 1)}"
  tiles = []
  for kind in MEASURES:
    before, after = (shown(numbers[f"{name}_{kind}"], MEASURES[kind]) for name in (UNMORPHED, way))
    tiles.append(f"<div><dt>{LABELS[kind]}</dt><dd>{before} <span>→</span> <b>{after}</b></dd></div>")
  return f"<p>{text}.</p>\n<dl class=tiles>{''.join(tiles)}</dl>"


def table(numbers: dict[str, float], names: Sequence[str], groups: dict[str, str]) -> str:
  """Return the rows of the table, one for each way of morphing."""
  rows = []
  for name in names:
    note = f" <small>{groups[name]}</small>" if name in groups else ""
    title = html.escape("unmorphed" if name == UNMORPHED else name) + (
      " (control)" if name == CONTROL else ""
    )
    cells = [f"<th scope=row>{title}{note}</th>"]
    for kind, factor in MEASURES.items():
      value, reference = numbers[f"{name}_{kind}"], numbers[f"{UNMORPHED}_{kind}"]
      change = factor * (value - reference)
      small = "" if name == UNMORPHED else signed(change, 1 if factor > 1 else 3)
      number = f"{cell(name, kind, value, factor)} <small>{small}</small>"
      cells.append(f'<td data-label="{LABELS[kind]}">{number}</td>')
    for kind in PURITIES:
      purity = cell(name, kind, numbers[f"{name}_{kind}"], 100) if name != UNMORPHED else "–"
      cells.append(f'<td data-label="{LABELS[kind]}">{purity}</td>')
    rows.append(f"<tr>{''.join(cells)}</tr>")
  return "\n".join(rows)


def cell(name: str, kind: str, value: float, factor: int) -> str:
  """Return a number of the table, with its full value as data."""
  return f'<data id="{html.escape(name)}_{kind}" value="{value}">{shown(value, factor)}</data>'


def shown(value: float, factor: int) -> str:
  """Return a number as the page shows it: in percent if the factor is 100."""
  return f"{factor * value:.1f} %" if factor > 1 else f"{value:.3f}"


def signed(value: float, digits: int) -> str:
  """Return a number with its sign. The minus is a true minus, and zero after rounding has the sign ±."""
  text = f"{value:+.{digits}f}"
  return (text if float(text) else f"±{0:.{digits}f}").replace("-", "−")


def made(study: Study, evaluator: Evaluator, num_test: int) -> str:
  """Return terms and descriptions of everything that is needed to make the page again."""
  config, options = study.config, study.options
  fit = "all"
  if options.get("max_fit") is not None:
    fit = (
      f"{options.max_fit:,} evenly spaced" if options.get("fit_evenly") else f"the first {options.max_fit:,}"
    )
  versions = [f"{name} {importlib.metadata.version(name)}" for name in LIBRARIES]
  network = {key: value for key, value in config.get("clip", {}).items() if value is not None}
  facts = {
    "network": f"{config.task}: " + ", ".join(f"{key} {value}" for key, value in network.items()),
    "data": f"{evaluator.test.name}, {options.get('split', 'test')}: {num_test:,} images of "
    f"{options.image_size} pixels a side; classes by the prompts “{options.prompts}”",
    "linear probe": f"ridge regression on single tokens of {fit} images of {options.get('fit', 'train')}",
    "morphers": "; ".join(f"{name}: {json.dumps(each.to_dict())}" for name, each in options.morphers.items()),
    "measured": f"{study.measured:%Y-%m-%d %H:%M} UTC, in {study.workdir}",
    "drawn": f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC",
    "versions": f"Python {platform.python_version()}, {', '.join(versions)}, {jax.default_backend()}",
  }
  rows = [f"<dt>{name}</dt><dd>{html.escape(fact)}</dd>" for name, fact in facts.items()]
  command = f"<dt>command</dt><dd><code>python {html.escape(shlex.join(sys.argv))}</code></dd>"
  return "\n".join([*rows, command])


if __name__ == "__main__":
  run_script(main)
