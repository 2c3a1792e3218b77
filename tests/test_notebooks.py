"""The notebooks: each runs from top to bottom in small sizes, without network. None has stored outputs."""

import json
from pathlib import Path

import nbformat
import pytest
import small_world

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
REPOSITORY = (ROOT / "notebooks/repository.txt").read_text().strip()
DISCONNECT = """
from dtm_jax.records.metrics import Metrics
from tests.shared_programs import SharedPrograms

programs = SharedPrograms()
_write = Metrics.write


def _write_and_disconnect(self, step, scalars, **more):
  _write(self, step, scalars, **more)
  if step >= 10 and "loss" in scalars:
    Metrics.write = _write
    raise KeyboardInterrupt("the user stops the cell")


Metrics.write = _write_and_disconnect
"""


def read(name: str) -> nbformat.NotebookNode:
  return nbformat.read(ROOT / f"notebooks/{name}.ipynb", as_version=4)


def execute(notebook: nbformat.NotebookNode, world: Path, monkeypatch, **variables: str) -> list[str]:
  """Run a notebook with one CPU device, and return the text that each of its code cells has printed."""
  from nbclient import NotebookClient

  environment = small_world.environment(
    1, DTM_JAX_NOTEBOOK_SMALL="1", DTM_JAX_CACHE=str(world), HF_HUB_OFFLINE="1", HF_HOME=str(world / "hub"),
    JAX_NUMPY_RANK_PROMOTION="allow", **variables,
  )  # fmt: skip
  for name, value in environment.items():
    monkeypatch.setenv(name, value)
  NotebookClient(notebook, timeout=600, kernel_name="python3").execute(cwd=str(ROOT / "notebooks"))
  return [
    "".join(output.get("text", "") for output in cell.outputs)
    for cell in notebook.cells
    if cell.cell_type == "code"
  ]


def num_figures(notebook: nbformat.NotebookNode) -> int:
  return sum(
    "image/png" in output.get("data", {}) for cell in notebook.cells for output in cell.get("outputs", ())
  )


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_has_a_badge_an_install_cell_run_times_and_no_outputs(path):
  notebook = nbformat.read(path, as_version=4)
  nbformat.validate(notebook)
  first, install = notebook.cells[:2]
  address = f"https://colab.research.google.com/github/{REPOSITORY}/blob/main/notebooks/{path.name}"
  assert f"({address})" in first.source.splitlines()[0]
  assert "| device | run time |" in first.source
  assert f"https://github.com/{REPOSITORY} " in install.source
  assert "notebooks/install.sh" in install.source
  for cell in notebook.cells:
    if cell.cell_type == "code":
      assert not cell.outputs
      assert cell.execution_count is None
  assert path.stat().st_size < 20_000


def test_every_notebook_is_run_by_a_test_and_described_in_the_documentation():
  page = (ROOT / "docs/notebooks.md").read_text()
  tests = Path(__file__).read_text()
  for path in NOTEBOOKS:
    assert f"{path.stem}.ipynb" in page
    assert f'read("{path.stem}")' in tests


@pytest.mark.slow
def test_use_as_a_library(world, monkeypatch):
  notebook = read("use_as_a_library")
  text = "".join(execute(notebook, world, monkeypatch))
  assert text.count("JAX compiles the step") == 1  # new schedules do not compile again
  assert "tokens of torch" in text or "Skipped: torch" in text
  assert num_figures(notebook) == 2


@pytest.mark.slow
def test_morphing_step_by_step(world, monkeypatch):
  notebook = read("morphing_step_by_step")
  text = "".join(execute(notebook, world, monkeypatch))
  assert "merges in each round: [7, 7, 7, 7, 7, 7, 12]" in text
  assert num_figures(notebook) == 5


@pytest.mark.slow
@pytest.mark.long  # test_consistency_report.py has its numbers, test_pictures.py its figures
def test_real_clip_consistency_says_that_it_is_not_the_real_clip(world, monkeypatch):
  notebook = read("real_clip_consistency")
  text = "".join(execute(notebook, world, monkeypatch))
  assert "cannot be loaded" in text
  assert "NOT those of OpenAI's CLIP" in text
  assert text.count("of the tokens have the class of their photo") == 4
  assert num_figures(notebook) == 2


@pytest.mark.slow
@pytest.mark.long  # test_loop.py stops and resumes such a run
def test_pretrain_on_colab_resumes_after_a_disconnect(world, monkeypatch, tmp_path):
  notebook = read("pretrain_on_colab")
  (place,) = [i for i, cell in enumerate(notebook.cells) if "train" in cell.metadata.get("tags", ())]
  train = notebook.cells[place]
  assert train.source == "state = loop.train(config, WORKDIR)"
  train.source = "state = programs.train(config, WORKDIR)"  # the second run compiles nothing
  stopped = nbformat.v4.new_code_cell(train.source, metadata={"tags": ["raises-exception"]})
  notebook.cells[place:place] = [nbformat.v4.new_code_cell(DISCONNECT), stopped]
  text = execute(notebook, world, monkeypatch, DTM_JAX_WORKDIR=str(tmp_path / "run"))
  assert "KeyboardInterrupt" in [output.get("ename") for output in stopped.outputs]
  assert any("Resumed from step" in each for each in text)
  lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
  assert [line["step"] for line in lines if "loss" in line] == [5, 10, 15, 20]
  assert any("student: kNN" in each for each in text)
  assert num_figures(notebook) == 4


def test_the_run_times_name_no_colab_device_as_measured():
  """We have no Colab, so its run times say so."""
  for path in NOTEBOOKS:
    assert "| GPU or TPU of Colab | not measured |" in nbformat.read(path, as_version=4).cells[0].source
