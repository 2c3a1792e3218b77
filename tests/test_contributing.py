"""CONTRIBUTING.md: its four examples, in a copy of the checkout, run by its own command."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import small_world

from dtm_jax import plugins, signatures

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text()
EXAMPLES = dict(re.findall(r"```python\n# (\S+)\n(.*?)```", TEXT, re.S))


def test_there_is_a_short_example_for_each_socket():
  assert [name.split("/")[1] for name in EXAMPLES] == ["morphers", "teachers", "datasets", "evaluators"]
  assert TEXT.count("```python") == 4
  for source in EXAMPLES.values():
    assert len(source.splitlines()) < 40


def test_the_examples_describe_their_options():
  for name, source in EXAMPLES.items():
    socket = name.split("/")[1]
    path = ("Evaluator", "__init__") if socket == "evaluators" else ("build",)
    options = signatures.parameters_in_source(source, *path)
    given = plugins.GIVEN.get(socket, ())
    assert [option.name for option in options if not option.meaning and option.name not in given] == []


def test_the_examples_keep_our_style(tmp_path):
  for name, source in EXAMPLES.items():
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(source)
  shutil.copy(ROOT / "pyproject.toml", tmp_path)
  for command in (
    ["check", "--ignore=I001"],
    ["format", "--check"],
  ):  # imports: dtm_jax is not beside the examples
    done = subprocess.run(["ruff", *command, "."], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
def test_its_command_trains_with_all_four_examples(tmp_path):
  """The run groups rows of patches, learns the colours of gradients, and measures the features."""
  for folder in ("dtm_jax", "configs"):
    shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
  for name, source in EXAMPLES.items():
    (tmp_path / name).write_text(source)
  command = re.search(r"^    (python -m dtm_jax\.main (?:.*\\\n)*.*)$", TEXT, re.M)[1]
  words = shlex.split(command.replace("\\\n", " "))
  environment = small_world.environment(1, **{"PYTHON" + "PATH": ""})  # the copy, not this checkout
  done = subprocess.run(
    [sys.executable, *words[1:]], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
  )
  assert done.returncode == 0, done.stderr
  lines = [json.loads(line) for line in (tmp_path / "runs/example/metrics.jsonl").read_text().splitlines()]
  measured = {name: value for line in lines for name, value in line.items()}
  assert measured["step"] == 6
  assert measured["groups_dtm"] == 4  # of 8 rows
  assert measured["knn/student_norm"] > 0
  assert measured["knn/teacher_norm"] > 0
