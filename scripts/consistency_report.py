"""One self-contained HTML page of a consistency study: its table, and what single tokens know in pictures.

    python -m dtm_jax.main --config=configs/consistency.py
    python scripts/consistency_report.py --workdir=runs/consistency --out=consistency.html

The network, the data and the ways of morphing are those of the run's config.json, the numbers those of its
metrics.jsonl. The pictures need the network once more, for the batches of the shown images alone. The page
asks nothing of any other place, and every drawing is a vector but the images themselves.
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
from pathlib import Path

import consistency_drawing as drawing
import jax
from absl import app, flags
from etils import epath
from ml_collections import config_dict

from dtm_jax import evaluators, plugins
from dtm_jax.evaluators import Context
from dtm_jax.evaluators.consistency import AS_THEY_ARE, Evaluator
from dtm_jax.models.clip import prompts
from dtm_jax.storage import paths
from dtm_jax.tasks import Run
from dtm_jax.training import mesh as meshes

TEMPLATE = Path(__file__).with_suffix(".html")
MEASURES = {"zeroshot": 100, "linear": 100, "cosine": 1}  # in percent, or as it is
PURITIES = ("zeroshot_purity", "linear_purity")
CONTROL = "random"
LIBRARIES = ("jax", "flax", "numpy", "opencv-python-headless")


@dataclasses.dataclass(frozen=True)
class Study:
  """What a run of a consistency study left behind: config, the evaluator's options, numbers, and when."""

  workdir: epath.Path
  config: config_dict.ConfigDict
  options: config_dict.ConfigDict
  numbers: dict[str, float]
  measured: datetime.datetime

  @classmethod
  def read(cls, workdir: str) -> "Study":
    """Raises FileNotFoundError or ValueError, with the folder's name and what it lacks."""
    workdir = paths.resolve(workdir)
    if not workdir.is_dir():
      raise FileNotFoundError(
        f"There is no run {workdir}. python -m dtm_jax.main --config=configs/consistency.py makes one."
      )
    files = {name: workdir / name for name in ("config.json", "metrics.jsonl")}
    if missing := [name for name, file in files.items() if not file.exists()]:
      raise FileNotFoundError(f"The run {workdir} has no {' and no '.join(missing)}.")
    config = config_dict.ConfigDict(json.loads(files["config.json"].read_text()))
    evals = {
      name: options for name, options in config.evals.items() if options.get("name", name) == "consistency"
    }
    if len(evals) != 1 or config.total_steps != 0:
      raise ValueError(
        f"The run {workdir} is no consistency study of a frozen network: it has {len(evals)} evaluators of "
        f"that kind, not 1, and total_steps={config.total_steps}, not 0."
      )
    ((name, options),) = evals.items()
    if options.get("prompts") is None:
      raise ValueError(
        f"The run {workdir} has prompts=None in evals.{name}, hence no zero-shot classes to show."
      )
    lines = [json.loads(line) for line in files["metrics.jsonl"].read_text().splitlines()]
    wanted = f"{name}/{AS_THEY_ARE}_zeroshot"
    found = [line for line in lines if wanted in line]
    if not found:
      raise ValueError(f"{files['metrics.jsonl']} has no {wanted}: the run has not ended.")
    numbers = {key.removeprefix(f"{name}/"): value for key, value in found[-1].items()}
    measured = datetime.datetime.fromtimestamp(files["metrics.jsonl"].stat().mtime, datetime.UTC)
    return cls(workdir, config, options, numbers, measured)

  def evaluator(self) -> tuple[Evaluator, dict]:
    """The study's evaluator and the state to give it."""
    config, mesh = self.config, meshes.make_mesh(self.config.mesh.data, self.config.mesh.fsdp)
    dataset = plugins.build("datasets", config.data.dataset, split=config.data.split)
    run = Run(0, dataset.num_examples / config.batch_size, config.batch_size, dataset.class_names)
    task = plugins.load("tasks", config.task).build(config, run)
    frozen = meshes.place(task.frozen, meshes.param_shardings(mesh, task.frozen, config.mesh.rules))
    context = Context.bind(task.outputs, frozen, mesh, tokenize=task.tokenize)
    return evaluators.make("consistency", self.options, context), task.init(jax.random.key(0))


def main(_) -> None:
  page = make_page(flags.FLAGS.workdir, flags.FLAGS.images)
  paths.resolve(flags.FLAGS.out).write_text(page)
  print(f"{flags.FLAGS.out}: {len(page.encode()) / 1e6:.2f} MB")


def make_page(workdir: str, num_images: int) -> str:
  """The page of the run in `workdir`, with `num_images` images."""
  study = Study.read(workdir)
  evaluator, state = study.evaluator()
  examples = evaluator.examples(state, num_images)
  num_tokens = examples.group_BSN.shape[2]
  morphed = evaluator.names[1:]
  groups = {name: describe(study.options.morphers[name], num_tokens) for name in morphed}
  shown = [0, 1] + [index for index, name in enumerate(evaluator.names) if name == CONTROL and index > 1]
  pictures = drawing.Pictures(
    examples, said_names(evaluator.test.class_names, study.options.prompts), evaluator.names, groups, shown
  )
  limit = study.options.get("max_images")
  num_test = min(evaluator.test.num_examples, limit or evaluator.test.num_examples)
  return string.Template(TEMPLATE.read_text()).substitute(
    summary=summary(study.numbers, morphed, groups),
    table=table(study.numbers, evaluator.names, groups),
    measured_on=f"{num_test:,} images of {html.escape(evaluator.test.name)} × {num_tokens} tokens",
    num_images=len(examples.label_B),
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


def describe(options, num_tokens: int) -> str:
  """How many groups a morpher makes of N tokens, as far as its options tell."""
  low, high = options.get("min_groups", 1), options.get("max_groups") or num_tokens
  if options.get("groups") is not None:
    low = high = options["groups"]
  if options["name"] in ("image", "identity"):
    low = high = {"image": 1, "identity": num_tokens}[options["name"]]
  number = f"{low}" if low == high else f"{low} to {high}"
  return f"{number} of {num_tokens} groups" if low != 1 or high != 1 else "one group"


def said_names(class_names: tuple[str, ...], templates: str) -> list[str]:
  """The classes as the captions say them: ImageNet's own names are numbers.

  That is what the first template's captions do not have in common, where they do not have the class's name.
  """
  captions = [several[0] for several in prompts.captions(class_names, templates)]
  spelled = [name.replace("_", " ") for name in class_names]
  if all(name in caption for name, caption in zip(spelled, captions, strict=True)):
    return spelled
  start, end = common(captions), common([caption[::-1] for caption in captions])
  return [caption[start : len(caption) - end] for caption in captions]


def common(texts: list[str]) -> int:
  """The length of their common beginning."""
  places = enumerate(zip(*texts, strict=False))
  return next((place for place, letters in places if len(set(letters)) > 1), 0)


def summary(numbers: dict[str, float], morphed: tuple[str, ...], groups: dict[str, str]) -> str:
  """What the first morpher does to each measure, and what the control does."""
  way = morphed[0]
  gain = lambda name: 100 * (numbers[f"{name}_zeroshot"] - numbers[f"{AS_THEY_ARE}_zeroshot"])
  text = (
    f"Morphed by {html.escape(way)} ({groups[way]}), the share of tokens whose own zero-shot class is their "
    f"image’s changes by {signed(gain(way), 1)} points"
  )
  if CONTROL in morphed[1:]:
    text += f"; averaged in random groups, the control, by {signed(gain(CONTROL), 1)}"
  tiles = []
  for kind, title in (
    ("zeroshot", "zero-shot"),
    ("linear", "linear probe"),
    ("cosine", "neighbours’ cosine"),
  ):
    before, after = (shown(numbers[f"{name}_{kind}"], MEASURES[kind]) for name in (AS_THEY_ARE, way))
    tiles.append(f"<div><dt>{title}</dt><dd>{before} <span>→</span> <b>{after}</b></dd></div>")
  return f"<p>{text}.</p>\n<dl class=tiles>{''.join(tiles)}</dl>"


def table(numbers: dict[str, float], names: tuple[str, ...], groups: dict[str, str]) -> str:
  """The rows: a way of morphing each."""
  rows = []
  for name in names:
    note = f" <small>{groups[name]}</small>" if name in groups else ""
    title = html.escape("as they are" if name == AS_THEY_ARE else name) + (
      " (control)" if name == CONTROL else ""
    )
    cells = [f"<th scope=row>{title}{note}</th>"]
    for kind, factor in MEASURES.items():
      value, reference = numbers[f"{name}_{kind}"], numbers[f"{AS_THEY_ARE}_{kind}"]
      change = factor * (value - reference)
      small = "" if name == AS_THEY_ARE else signed(change, 1 if factor > 1 else 3)
      cells.append(f"<td>{cell(name, kind, value, factor)} <small>{small}</small></td>")
    for kind in PURITIES:
      known = name != AS_THEY_ARE
      cells.append(f"<td>{cell(name, kind, numbers[f'{name}_{kind}'], 100) if known else '–'}</td>")
    rows.append(f"<tr>{''.join(cells)}</tr>")
  return "\n".join(rows)


def cell(name: str, kind: str, value: float, factor: int) -> str:
  return f'<data id="{html.escape(name)}_{kind}" value="{value}">{shown(value, factor)}</data>'


def shown(value: float, factor: int) -> str:
  return f"{factor * value:.1f} %" if factor > 1 else f"{value:.3f}"


def signed(value: float, digits: int) -> str:
  """With its sign, a true minus; nothing that rounds to zero has one."""
  text = f"{value:+.{digits}f}"
  return (text if float(text) else f"±{0:.{digits}f}").replace("-", "−")


def made(study: Study, evaluator: Evaluator, num_test: int) -> str:
  """Terms and what they are: all that is needed to make the page again."""
  config, options = study.config, study.options
  fit = (
    "all"
    if options.get("max_fit") is None
    else f"{options.max_fit:,} evenly spaced"
    if options.get("fit_evenly")
    else f"the first {options.max_fit:,}"
  )
  versions = [f"{name} {importlib.metadata.version(name)}" for name in LIBRARIES]
  network = (
    {key: value for key, value in config.clip.items() if value is not None} if "clip" in config else {}
  )
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
  flags.DEFINE_string("workdir", None, "The run of a consistency study.", required=True)
  flags.DEFINE_string("out", "consistency.html", "The page.")
  flags.DEFINE_integer("images", 12, "How many images are shown.", lower_bound=1)
  app.run(main)
