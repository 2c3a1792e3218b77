"""The HTML page of a run: its sections, what it loads, hostile names, and runs that lack something."""

import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import numpy as np
import pytest
import small_runs
import small_world

from dtm_jax import report
from dtm_jax.errors import NotThereError, OptionError
from dtm_jax.records import metrics, run_config
from dtm_jax.report import charts, page, run_files, strips
from scripts.reports import report as command

VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
  """The tags, links, section ids and text of a page. Every tag must be closed by the right one."""

  def __init__(self, text: str):
    super().__init__()
    self.tags, self.links, self.sections, self.open, self.text = [], [], [], [], []
    self.feed(text)
    self.close()
    assert not self.open, self.open

  def handle_starttag(self, tag, attrs):
    self.tags.append(tag)
    self.links += [value for key, value in attrs if key in ("href", "src", "srcset", "action", "data")]
    self.sections += [value for key, value in attrs if tag == "section" and key == "id"]
    assert not any(key.startswith("on") for key, _ in attrs)
    if tag not in VOID:
      self.open.append(tag)

  def handle_startendtag(self, tag, attrs):
    self.handle_starttag(tag, attrs)
    if tag not in VOID:
      self.open.pop()

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, data):
    if self.open and self.open[-1] not in ("script", "style"):
      self.text.append(data)

  @property
  def words(self) -> str:
    return " ".join(" ".join(self.text).split())


def check(text: str) -> Page:
  """Return the parsed page, after the checks that hold for every page."""
  found = Page(text)
  assert found.sections == list(page.SECTIONS)
  assert all(link.startswith(("#", "data:image/")) for link in found.links), found.links
  assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)|url\(|@import|\$[a-z]", text)
  assert found.tags.count("script") == 1
  assert found.tags.count("link") == found.tags.count("iframe") == 0
  return found


def test_the_page_has_every_section_and_loads_nothing(tmp_path):
  found = check(report.make_page([small_runs.write(tmp_path / "run")]))
  for words in (
    "300", "37.0 %", "26.0 % step 0", "Loss of the morpher “tokens”", "automobile", "betas", "[0.9, 0.98]",
    "Effective rank of the features (RankMe)", "8 cpu", "jax 0.10.2", small_runs.START["commit"],
    small_runs.START["command"],
  ):  # fmt: skip
    assert words in found.words, words
  assert "Loss of the morpher “dtm”" not in found.words  # it is the loss
  assert "by “tokens”, mean" not in found.words  # always 64 groups
  assert found.tags.count("image") == 4 * 3  # for each image two steps and the teacher
  assert found.tags.count("img") == 4


def test_names_of_files_and_things_beside_the_config_are_those_of_their_owners():
  assert (run_files.CONFIG, run_files.METRICS) == (run_config.FILE, metrics.FILE)
  assert (run_files.CLASS_NAMES, run_files.STARTS) == (run_config.CLASS_NAMES, run_config.STARTS)


def test_hostile_names_are_text(tmp_path):
  evil = "<script>alert(1)</script>\"'&"
  config = small_runs.CONFIG | {"evals": {evil: {"name": "snapshots"}}, evil: {evil: evil}}
  content = [
    {"step": 0, f"{evil}/{evil}": 1.0, evil: 2.0, f"{evil}/{evil}_rank": 3.0},
    {"step": 1, evil: 1.0},
  ]
  start = small_runs.START | {"command": evil, "commit": evil, "host": evil, "changes": {evil: [evil, evil]}}
  workdir = tmp_path / "<script>alert(1)<"
  small_runs.write(workdir, content, config, [evil] * 3, [start, start])
  folder = small_runs.write(tmp_path / "other")
  for runs in ([workdir], [workdir, folder]):
    found = check(report.make_page(runs))
    assert "alert(1)</script>" in found.words
  for drawing in page.figures(report.read_runs([workdir])).values():
    ElementTree.fromstring(drawing)


@pytest.mark.parametrize(
  ("content", "words"),
  [
    ([], ["no training steps", "no evaluations", "not measured its tokens"]),
    (small_runs.lines([1]), ["Loss", "37.0 %"]),
    ([{"step": 5, "loss": None}], ["no training steps"]),
    ([{"step": 0, "zeroshot/accuracy": 0.5}], ["no training steps", "50.0 %"]),
  ],
  ids=["nothing", "one step", "only NaN", "evaluation only"],
)
def test_a_run_that_lacks_something_has_a_page(tmp_path, content, words):
  found = check(report.make_page([small_runs.write(tmp_path / "run", content, images=0)]))
  assert "recorded no groups" in found.words
  for each in words:
    assert each in found.words


def test_an_old_run_and_damaged_files_are_named(tmp_path):
  workdir = small_runs.write(tmp_path / "run", config=None)
  with (workdir / "metrics.jsonl").open("a") as file:
    file.write('{"step": 350, "lo')
  (workdir / "snapshots" / "step_00000100.npz").write_bytes(b"PK")
  found = check(report.make_page([workdir]))
  assert "Line 8 of metrics.jsonl is not a JSON object with a step; it is left out." in found.words
  assert "config.json is missing" in found.words
  assert "step_00000100.npz cannot be read" in found.words
  (workdir / "config.json").write_text('{"task": "pretrain", "optim": {"lr": 1')
  assert "config.json is not JSON" in check(report.make_page([workdir])).words
  (workdir / "config.json").write_text('{"task": "pretrain", "evals": {}}')  # older versions had no starts
  assert "The environment is not known." in check(report.make_page([workdir])).words
  (workdir / "metrics.jsonl").unlink()
  assert "metrics.jsonl is missing" in check(report.make_page([workdir])).words
  with pytest.raises(NotThereError, match="not the workdir of a run"):
    report.make_page([tmp_path / "nowhere"])


def test_two_runs_share_scales_and_show_what_differs(tmp_path):
  config = small_runs.CONFIG | {"seed": 1, "optim": {"lr": 0.003, "betas": [0.9, 0.98]}}
  first = small_runs.write(tmp_path / "a" / "run")
  second = small_runs.write(tmp_path / "b" / "run", small_runs.lines(scale=3.0), config)
  found = check(report.make_page([first, second]))
  assert "2 options differ." in found.words
  assert "seed 0 1" in found.words
  assert "optim.lr 0.0015 0.003" in found.words
  assert found.tags.count("image") == 2 * 4 * 3
  assert found.tags.count("article") == 4  # the same images share cards
  names = [run.name for run in report.read_runs([first, second])]
  assert names == [str(first), str(second)]
  assert "The configurations are the same." in check(report.make_page([first, first])).words


def test_snapshots_of_steps_that_the_run_lacks_are_not_shown(tmp_path):
  workdir = small_runs.write(tmp_path / "run", small_runs.lines([50, 100]))  # went back from step 300
  (run,) = report.read_runs([workdir])
  assert run.evaluated_steps == [0]


def test_the_curves_are_drawn_where_their_values_are():
  drawn = charts.draw("x", [charts.Series("a", [(0, 0.0), (100, 1.0)])])
  (points,) = re.findall(r'points="([^"]+)"', drawn)
  left, right = charts.LEFT, charts.WIDTH - charts.RIGHT
  assert points == f"{left:.1f},{charts.HEIGHT - charts.BOTTOM:.1f} {right:.1f},{charts.TOP:.1f}"
  rng = np.random.default_rng(0)
  values = rng.normal(size=5000)
  values[777], values[4000] = 50.0, -50.0
  thinned = charts._thinned(list(enumerate(values.tolist())))
  assert len(thinned) <= charts.MOST_POINTS + 2
  assert {777, 4000, 0, 4999} <= {step for step, _ in thinned}
  with pytest.raises(ValueError, match="no points"):
    charts.draw("x", [])


@pytest.mark.parametrize(
  "values", [[0.0], [5.0], [-3.0, -3.0], [1e-9, 2e-9], [1e12, 3e12], [0.1, 0.1000001], [-1.0, 7.0]]
)
def test_marks_are_round_and_cover_the_values(values):
  scale = charts._Scale(values, 100.0, 0.0, wide=True)
  ticks = scale.ticks()
  assert 2 <= len(ticks) <= 12
  assert ticks[0] <= min(values) + 1e-9 * abs(min(values))
  assert ticks[-1] >= max(values) - 1e-9 * abs(max(values))
  labels = [charts._in_steps_of(scale.step, tick) for tick in ticks]
  assert len({*labels}) == len(labels), labels
  ElementTree.fromstring(charts.draw("x", [charts.Series("a", list(enumerate(values)))], own_file=True))


def test_borders_and_shown_steps():
  assert strips.borders(np.array([[0, 1], [0, 0]])) == "M1 0v1M1 1h1"
  assert strips.shown_steps([0, 5]) == [0, 5]
  assert strips.shown_steps(list(range(0, 1001, 10))) == [0, 200, 400, 600, 800, 1000]


def test_the_command_writes_page_and_figures(tmp_path, capsys):
  workdir = small_runs.write(tmp_path / "run")
  command.main([str(workdir), f"--figures={tmp_path / 'figures'}"])
  check((workdir / "report.html").read_text())
  names = {path.name for path in (tmp_path / "figures").iterdir()}
  assert {"loss.svg", "learning_rate.svg", "snapshots_rank.svg", "knn_student_accuracy.svg"} <= names
  for path in (tmp_path / "figures").iterdir():
    ElementTree.parse(path)
  command.main([str(workdir), f"--compare={workdir}", f"--out={tmp_path / 'new' / 'both.html'}"])
  check((tmp_path / "new" / "both.html").read_text())
  assert "report.html" in capsys.readouterr().out


@pytest.mark.parametrize(
  ("option", "message"),
  [
    ("--out={}", "is a folder; name a file"),
    ("--out={}/file/a.html", "--out="),
    ("--figures={}/file", "--figures="),
  ],
)
def test_the_command_refuses_places_that_cannot_be_written(tmp_path, option, message):
  workdir = small_runs.write(tmp_path / "run")
  (tmp_path / "file").write_text("")
  with pytest.raises(OptionError, match=message):
    command.main([str(workdir), option.format(tmp_path)])
  assert not (workdir / "report.html").exists()


def test_a_run_ends_with_its_report_and_never_fails_because_of_it(
  world, programs, tmp_path, monkeypatch, caplog
):
  config = small_world.probe_config(world, evals={})
  path = tmp_path / "report.html"
  programs.train(config, str(tmp_path))
  assert "Loss" in check(path.read_text()).words
  path.unlink()
  programs.train(config, str(tmp_path))  # a finished run changes nothing
  assert not path.exists()
  config.log.report = False
  programs.train(config, str(tmp_path / "without"))
  assert small_world.metrics(tmp_path / "without")[-1]["step"] == 6
  assert not (tmp_path / "without" / "report.html").exists()
  config.log.report = True
  monkeypatch.setattr(page, "make", lambda runs: 1 / 0)
  programs.train(config, str(tmp_path / "broken"))
  assert "could not be written: ZeroDivisionError" in caplog.text
  assert small_world.metrics(tmp_path / "broken")[-1]["step"] == 6
