"""The commands of scripts/: each parses its flags, and a file of its old name still runs it."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from dtm_jax.errors import UserError

ROOT = Path(__file__).parents[1]
SCRIPTS = ROOT / "scripts"
FOLDERS = ("data", "reports", "studies", "weights")
MODULES = sorted(
  path for folder in FOLDERS for path in (SCRIPTS / folder).glob("*.py") if "def main(" in path.read_text()
)
WRAPPER = '''"""Run `scripts/{folder}/{name}.py`."""

from {folder}.{name} import main

from dtm_jax.options.command_line import run_script

if __name__ == "__main__":
  run_script(main)
'''


def load(path: Path):
  return importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_help_shows_the_docstring_and_each_flag(path, capsys):
  module = load(path)
  with pytest.raises(SystemExit) as caught:
    module.main(["--help"])
  assert caught.value.code == 0
  text = capsys.readouterr().out
  assert module.__doc__.strip() in text
  assert f"python scripts/{path.name}" in text


@pytest.mark.parametrize("name", ["environment.sh", "slurm.sbatch"])
def test_help_of_what_bash_does_not_start_shows_the_comment(name):
  done = subprocess.run(["bash", name, "--help"], cwd=SCRIPTS, capture_output=True, text=True, check=True)
  comment = [line[2:] for line in (SCRIPTS / name).read_text().splitlines()[1:] if line.startswith("# ")]
  lines = done.stdout.splitlines()
  assert lines
  assert lines == comment[: len(lines)]
  assert done.stderr == ""


@pytest.mark.parametrize(
  "path",
  [path for path in sorted(SCRIPTS.glob("*.sh")) if "\nsource scripts/environment.sh" in path.read_text()],
  ids=lambda path: path.name,
)
def test_help_of_a_shell_script_installs_nothing(path, tmp_path):
  alone = tmp_path / path.name  # without environment.sh beside it
  alone.write_text(path.read_text())
  done = subprocess.run(["bash", str(alone), "--help"], capture_output=True, text=True, check=True)
  comment = [line[2:] for line in path.read_text().splitlines()[1:] if line.startswith("# ")]
  assert done.stdout.splitlines()[0] == comment[0]
  assert "set -" not in done.stdout


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_an_unknown_flag_is_refused(path, capsys):
  with pytest.raises((SystemExit, UserError)):  # a UserError by a script that takes a config
    load(path).main(["--no_such_flag=1"])


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_the_command_of_the_readme_is_a_thin_wrapper(path):
  wrapper = SCRIPTS / path.name
  assert wrapper.read_text() == WRAPPER.format(folder=path.parent.name, name=path.stem)


def test_every_file_of_scripts_is_a_command_or_in_a_folder():
  names = {path.name for path in SCRIPTS.glob("*.py")}
  assert names == {path.name for path in MODULES}


def test_a_file_that_imports_its_neighbours_starts_the_command_above(tmp_path):
  """Otherwise `python scripts/data/prepare_imagenet.py` knows no package in which to find them."""
  with_neighbours = [path for path in MODULES if "\nfrom ." in path.read_text()]
  assert with_neighbours
  for path in with_neighbours:
    assert "\nif not __package__:\n  start_above(__file__)\n\nfrom ." in path.read_text(), path
  path = SCRIPTS / "data" / "tfrecord_to_array_record.py"
  done = subprocess.run(
    [sys.executable, path.name, "no_such_folder", f"--out={tmp_path}"],
    cwd=path.parent, capture_output=True, text=True, check=False,
  )  # fmt: skip
  assert done.returncode == 2
  assert "no_such_folder" in done.stderr
  assert "Traceback" not in done.stderr


@pytest.mark.parametrize("command", [["scripts/summarize.py"], ["-m", "scripts.reports.summarize"]])
def test_a_command_ends_with_one_message(command, tmp_path):
  """It runs from a plain shell, since the package is installed."""
  done = subprocess.run(
    [sys.executable, *command, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=False
  )
  assert done.returncode == 2
  assert done.stderr.strip().endswith("it is not the workdir of a run.")
  assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
  "path",
  sorted(path for folder in ("scripts", "tests", "benchmarks") for path in (ROOT / folder).rglob("*.py")),
  ids=lambda path: str(path.relative_to(ROOT)),
)
def test_nothing_changes_the_path_of_imports(path):
  """The package is installed, and commands run from the checkout."""
  if path.name == "test_environment.py":
    return
  words = ("sys." + "path", "PYTHON" + "PATH", "syspath_" + "prepend", "spec_from_" + "file_location")
  assert not [word for word in words if word in path.read_text()]
