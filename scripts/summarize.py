"""Prints the numbers of a run of any task: its loss at both ends, and its evaluations before and after.

python scripts/summarize.py runs/quickstart
"""

import json
import sys
from typing import Any

from dtm_jax.errors import NotThereError, UserError
from dtm_jax.storage import paths

SHARES = ("accuracy", "top1", "top5", "miou")  # numbers with these in their names are shown in percent
SHOWN_CLASSES = 10
TITLES = {"cifar10": "CIFAR-10", "imagenet": "ImageNet"}

Lines = list[dict[str, Any]]


def main(*workdirs: str) -> None:
  if not workdirs:
    sys.exit(__doc__)
  try:
    for workdir in workdirs:
      print("\n" + "\n".join(summary(workdir)))
  except UserError as error:
    sys.exit(str(error))


def summary(workdir: str) -> list[str]:
  """The lines about a run.

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
  """The task, how far it is, and the loss of the first and last window."""
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
  """kNN of a pre-training run: the student at both ends, beside the teacher."""
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
  """Every number of every evaluator, first and last."""
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
  """A share between 0 and 1."""
  return "not finite" if value is None else f"{100 * value:5.1f} %"


def number(value: float | None) -> str:
  """Four digits after the point, or as many significant ones for small and large numbers."""
  if value is None:
    return "not finite"
  return f"{value:.4f}" if 1e-3 < abs(value) < 1e4 or not value else f"{value:.4g}"


def read(path) -> dict:
  """A JSON object; an empty one if the file is not there or cut off."""
  try:
    return json.loads(path.read_text()) if path.exists() else {}
  except ValueError:
    return {}


def read_lines(path) -> Lines:
  """The lines of metrics.jsonl, without those that a kill has cut off."""
  lines = []
  for text in path.read_text().splitlines() if path.exists() else []:
    try:
      line = json.loads(text)
    except ValueError:
      continue
    if isinstance(line, dict) and "step" in line:
      lines.append(line)
  return lines


if __name__ == "__main__":
  main(*sys.argv[1:])
