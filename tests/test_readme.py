"""The README and the pages of docs/: their commands, their Python, and their links."""

import re
import shlex
import subprocess
import sys
import urllib.parse
from pathlib import Path

import commands
import pytest
import small_world
from commands import PAGES, ROOT

BLOCKS = commands.blocks()
BASH = [block for block in BLOCKS if block.language == "bash"]
PYTHON = [block for block in BLOCKS if block.language == "python"]
LINES = sorted({(block.page, line) for block in BASH for line in block.commands()})
RUN = sorted({line for block in BASH if block.is_run for line in block.commands()})


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
  monkeypatch.chdir(ROOT)


def test_the_readme_fits_on_two_screens():
  assert len((ROOT / "README.md").read_text().splitlines()) <= 120


@pytest.mark.parametrize(("page", "line"), LINES, ids=[f"{page}: {line[:60]}" for page, line in LINES])
def test_every_command_has_existing_files_flags_and_options(page, line):
  assert commands.problems(line) == []


def test_a_wrong_command_is_found():
  for line in (
    "python -m dtm_jax.main --config=configs/no_such.py",
    "python -m dtm_jax.main --config=configs/vitb16.py --config.no_such=1",
    "python -m dtm_jax.main --config=configs/vitb16.py --no_such=1",
    "python -m dtm_jax.no_such",
    "python scripts/no_such.py",
    "python scripts/export.py --no_such=1",
    "bash scripts/quickstart.sh --config.no_such=1",
    'python -m pip install ".[no_such]"',
    'gcloud ssh --command="python -m dtm_jax.no_such"',
    "no_such_program",
  ):
    assert commands.problems(line), line


@pytest.mark.parametrize("line", [line for line in RUN if "--help" in line])
def test_a_marked_command_runs(line):
  done = subprocess.run(
    [sys.executable, *shlex.split(line)[1:]], capture_output=True, text=True, check=False, timeout=60
  )
  assert done.returncode == 0, done.stderr
  assert "--config.batch_size" in done.stdout


@pytest.mark.slow
def test_the_quickstart_runs(world, tmp_path):
  """The marked command, made small: random images, a random teacher, two steps."""
  (line,) = [line for line in RUN if "--help" not in line]
  data = [f"--config.{section}dataset.data_dir={world}" for section in ("data.", "evals.knn.")]
  small = [
    "batch_size=8", "total_steps=2", "optim.warmup_steps=1", "student.width=32", "student.depth=2",
    "student.num_heads=2", f"teacher.path={world / 'clip'}", "evals.knn.max_bank=32",
    "evals.knn.max_queries=16", "evals.knn.batch_size=16", "evals.knn.k=5",
  ]  # fmt: skip
  environment = small_world.environment(1, DTM_JAX_VENV=sys.prefix, DTM_JAX_WORKDIR=str(tmp_path / "run"))
  command = [*shlex.split(line), *data, *(f"--config.{option}" for option in small)]
  done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr + done.stdout
  assert re.search(r"untrained student .* %\n  student .* %   \(step 2\)\n  teacher .* %", done.stdout)
  assert (tmp_path / "run" / "groups.png").stat().st_size > 1000


@pytest.mark.parametrize("block", PYTHON, ids=lambda block: block.page)
def test_python_compiles(block):
  compile(block.text, block.page, "exec")


@pytest.mark.slow
def test_the_python_of_the_readme_runs():
  (block,) = [block for block in PYTHON if block.page == "README.md"]
  assert block.is_run
  assert len([line for line in block.text.splitlines() if line]) == 6
  names: dict = {}
  exec(block.text, names)
  assert names["label_BN"].shape == (2, 64)
  assert 0 < float(names["loss"]) < 10


def test_the_python_of_the_method_runs():
  names: dict = {}
  for block in PYTHON:
    if block.page == "method.md" and block.is_run:
      exec(block.text, names)
  assert names["merges_K"].tolist() == [14, 14, 16, 0, 0, 0]
  assert [len(set(label_N)) for label_N in names["label_BN"].tolist()] == [20, 20]
  assert names["size_BN"].sum(axis=1).tolist() == [64, 64]
  assert abs(names["loss"] - names["same"]) < 1e-6


def links(path: Path) -> list[str]:
  text = re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.S | re.M)
  return re.findall(r"\]\(([^)\s]+)\)", text)


def anchors(path: Path) -> set[str]:
  """Return the anchors that GitHub makes of the headings of a page."""
  headings = re.findall(r"^#+ (.*)$", path.read_text(), re.M)
  return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(path):
  """Links also work where the files are read without the site. The site checks its own links."""
  for link in links(path):
    url = urllib.parse.urlsplit(link)
    if url.scheme:
      assert url.scheme == "https", link
      assert re.fullmatch(r"([\w-]+\.)+[a-z]{2,}", url.netloc), link
      assert not link.endswith((".", ",")), link
      continue
    target = (path.parent / url.path).resolve() if url.path else path
    assert target.exists(), link
    generated = "configuration.md" in (url.path, path.name)
    assert not url.fragment or generated or url.fragment in anchors(target), link
