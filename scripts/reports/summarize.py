"""Print the numbers of a run of any task: the first and last loss, and the first and last evaluations.

python scripts/summarize.py runs/quickstart
"""

import json
from collections.abc import Sequence
from typing import Any

from etils import epath

from dtm_jax.errors import NotThereError
from dtm_jax.options.command_line import run_script, script_parser
from dtm_jax.records import metrics_file
from dtm_jax.storage import paths

SHARES = ("accuracy", "top1", "top5", "miou")
"""Words in the names of metrics that are shown in percent."""
SHOWN_CLASSES = 10
TITLES = {"cifar10": "CIFAR-10", "imagenet": "ImageNet"}

Lines = list[dict[str, Any]]


def main(argv: Sequence[str] | None = None) -> None:
  """Run the command line of the module's docstring."""
  parser = script_parser(__doc__)
  parser.add_argument("workdirs", nargs="+", metavar="WORKDIR", help="workdir of a run")
  for workdir in parser.parse_args(argv).workdirs:
    print("\n" + "\n".join(summary(workdir)))


def summary(workdir: str) -> list[str]:
  """Return the lines about a run.

  Raises:
    NotThereError: the folder is not the workdir of a run.
  """
  folder = paths.resolve(workdir)
  config, lines = read(folder / "config.json"), read_lines(folder / "metrics.jsonl")
  if not config and not lines:
    raise NotThereError(f"{workdir} has no config.json and no metrics.jsonl: it is not the workdir of a run.")
  text = [f"{workdir}: {progress(config, lines)}"]
  if any("knn/student_accuracy" in line for line in lines):
    text += student_and_teacher(config, lines)
    lines = [{name: x for name, x in line.items() if not name.startswith("knn/")} for line in lines]
  text += evaluations(lines)
  if names := config.get("class_names"):
    shown = ", ".join(f"{label} {name}" for label, name in enumerate(names[:SHOWN_CLASSES]))
    text.append(f"{len(names)} classes: {shown}{', ...' if len(names) > SHOWN_CLASSES else ''}")
  if (folder / "groups.png").exists():
    text.append(f"picture: {folder / 'groups.png'}")
  return text


def progress(config: dict, lines: Lines) -> str:
  """Return the number of steps that are done, and the loss of the first and last window."""
  trained = [line for line in lines if "loss" in line]
  if not trained:
    return f"{config.get('task', 'run')}, no steps trained"
  last = trained[-1]
  steps, total, epochs = last["step"], config.get("total_steps"), config.get("total_epochs")
  if total:
    done = f"{steps} steps" if steps >= total else f"{steps} of {total} steps"
  elif epochs and "epoch" in last:
    done = f"{steps} steps, {last['epoch']:.4g} of {epochs:g} epochs"
  else:
    done = f"{steps} steps"
  return f"{done}, loss {number(trained[0]['loss'])} -> {number(last['loss'])}"


def student_and_teacher(config: dict, lines: Lines) -> list[str]:
  """Return the kNN accuracies of a pre-training run: untrained student, trained student and teacher."""
  evaluated = [line for line in lines if "knn/student_accuracy" in line]
  section = config.get("evals", {}).get("knn", {})
  name = section.get("dataset", {}).get("name", "its data set")
  text = [f"kNN accuracy on {TITLES.get(name, name)} (frozen features, mean of the patch tokens)"]
  rows = [("student", evaluated[-1], "student")]
  if evaluated[0]["step"] == 0 and len(evaluated) > 1:
    rows.insert(0, ("untrained student", evaluated[0], "student"))
  if "knn/teacher_accuracy" in evaluated[-1]:
    rows.append(("teacher", evaluated[-1], "teacher"))
  for title, line, kind in rows:
    step = f"   (step {line['step']})" if title == "student" else ""
    text.append(f"  {title:19} {percent(line[f'knn/{kind}_accuracy'])}{step}")
  return text


def evaluations(lines: Lines) -> list[str]:
  """Return a line for each metric of each evaluator, with its first and last value."""
  found: dict[str, list[tuple[int, Any]]] = {}
  for line in lines:
    for name, value in line.items():
      if "/" in name:
        found.setdefault(name, []).append((line["step"], value))
  width = max(map(len, found), default=0)
  text = []
  for name, values in found.items():
    (first, before), (last, after) = values[0], values[-1]
    show = percent if any(word in name for word in SHARES) else number
    change = f"{show(before)} -> {show(after)}   (steps {first} -> {last})"
    text.append(f"  {name:{width}} " + (change if len(values) > 1 else f"{show(after)}   (step {last})"))
  return text


def percent(value: float | None) -> str:
  """Return a share between 0 and 1 as a percentage."""
  return "not finite" if value is None else f"{100 * value:5.1f} %"


def number(value: float | None) -> str:
  """Return a number with four decimals, or with four significant digits if it is small or large."""
  if value is None:
    return "not finite"
  return f"{value:.4f}" if 1e-3 < abs(value) < 1e4 or not value else f"{value:.4g}"


def read(path: epath.Path) -> dict:
  """Return the JSON object in a file, or an empty one if the file is missing or cut off."""
  try:
    return json.loads(path.read_text()) if path.exists() else {}
  except ValueError:
    return {}


def read_lines(path: epath.Path) -> Lines:
  """Return the lines of metrics.jsonl, without lines that a kill has cut off."""
  return metrics_file.parse(path.read_text())[0] if path.exists() else []


if __name__ == "__main__":
  run_script(main)
