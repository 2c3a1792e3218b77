"""A study runs each command once, goes on when one fails, and writes a table."""

import json
import math
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from scripts.studies import paired_tables, study


@pytest.fixture
def commands(tmp_path, monkeypatch):
  """Record commands and run none. Each writes the accuracy 0.5 + seed, and one with "broken" fails."""
  monkeypatch.chdir(tmp_path)
  commands = []

  def execute(command, log, deadline):
    commands.append(command)
    value = lambda *names: next((word.split("=", 1)[1] for word in command if word.startswith(names)), "")
    for seed in value("--config.seed", "--seeds").split(","):
      workdir = Path(value("--workdir").replace("{seed}", seed))
      workdir.mkdir(parents=True, exist_ok=True)
      line = {"step": 3, "accuracy": 0.5 + int(seed) + 0.1 * any("other" in word for word in command)}
      (workdir / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    return int(any("broken" in word for word in command))

  monkeypatch.setattr(study, "execute", execute)
  return commands


def make(out, *variants, jobs=1, seeds="0,1", more=()):
  flags = ["--config=configs/x.py", f"--out={out}", f"--seeds={seeds}", f"--jobs={jobs}", "--curves=accuracy"]
  flags += ["--metrics=accuracy,then/accuracy", "--then=then: --config=y.py --init={workdir}"]
  study.main([*flags, *more, *(f"--variant={variant}" for variant in variants)])
  return Path(out, "table.md").read_text()


def test_a_finished_run_is_not_repeated_even_by_another_study(commands):
  make("a", "first", "second: --other=1")
  assert len(commands) == 8  # two variants, two seeds, each with what comes then
  make("a", "first", "second: --other=1")
  make("b", "first under another name")
  assert len(commands) == 8
  make("b", "first", "third: --other=2", jobs=2)
  assert len(commands) == 12


def test_the_other_runs_go_on_when_one_fails(commands):
  text = make("a", "first", "second: --broken=1", "third: --other=1")
  row = {line.split("|")[1].strip(): line for line in text.splitlines() if line.startswith("| ")}
  assert "(failed: 0, 1)" in row["second"]
  assert "1.0000 ± 0.7071" in row["first"]
  assert "+0.1000 [+0.1000, +0.1000]" in row["third - first"]
  assert "none" in row["second - first"]
  failed = [command for command in commands if "--broken=1" in command]
  assert len(failed) == 2  # no next command ran


def test_the_time_ends_a_study_and_the_same_command_goes_on(commands):
  text = make("a", "first", "second: --other=1", more=["--minutes=0"])
  assert not commands
  assert "| first | 2 (not finished: 0, 1) | none | none |" in text
  assert "| second - first | paired | none | none |" in text
  assert "not finished" not in make("a", "first", "second: --other=1", more=["--minutes=60"])
  assert len(commands) == 8


def test_what_has_finished_counts_if_the_next_command_has_not(commands, monkeypatch):
  execute = study.execute
  stopped = lambda command, *more: study.STOPPED_CODE if "y.py" in command[-3] else execute(command, *more)
  monkeypatch.setattr(study, "execute", stopped)
  text = make("a", "first", "second: --other=1")
  assert "| first | 2 (not finished: 0, 1) | 1.0000 ± 0.7071 | none |" in text
  assert "| second - first | paired | +0.1000 [+0.1000, +0.1000] | none |" in text


def test_a_run_is_told_to_stop_at_the_deadline(tmp_path):
  """The process of the run gets a SIGTERM, saves, and tells by its exit code that it is not finished."""
  saves = "import os, signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(int("
  saves += "os.environ['DTM_JAX_STOPPED_CODE']))); print('ready', flush=True); time.sleep(60)"
  log = tmp_path / "log.txt"
  for code, expected in ((saves, study.STOPPED_CODE), ("import time; time.sleep(60)", study.STOPPED_CODE)):
    command = [sys.executable, "-S", "-c", code]
    assert study.execute(command, log, time.monotonic() + 2) == expected
  assert study.execute([sys.executable, "-S", "-c", "raise SystemExit(3)"], log, math.inf) == 3
  assert study.execute([sys.executable, "-S", "-c", "raise SystemExit(0)"], log, math.inf) == 0


def test_all_seeds_of_a_variant_train_at_once(commands):
  """Only the next commands run seed by seed. After a failure the seeds run one by one, too."""
  text = make("a", "first", "second: --other=1", more=["--vmap_seeds"])
  together = [command for command in commands if "scripts.studies.train_seeds" in command]
  assert len(commands) == 2 + 4
  assert commands[:2] == together
  assert all("--seeds=0,1" in command for command in together)
  assert make("a", "first", "second: --other=1") == text.replace(" --vmap_seeds", "")
  assert len(commands) == 6  # separate runs would be the same
  make("b", "first", "third: --broken=1", more=["--vmap_seeds"])
  assert ["scripts.studies.train_seeds" in command for command in commands[6:]] == [True, False, False]
  make("c", "first", "second: --other=1", seeds="0,1,2", more=["--vmap_seeds"])
  assert not any("scripts.studies.train_seeds" in command for command in commands[9:])  # one seed is left


def test_settings_have_tables_of_their_own_and_are_compared(commands):
  """In the fixture, --other adds 0.1 in every setting, so the differences do not differ."""
  more = ["--setting=clean", "--setting=noisy: --noise=1"]
  text = make("a", "first", "second: --other=1", more=more)
  assert len(commands) == 16
  assert sum("--noise=1" in command for command in commands) == 4
  assert text.index("## clean") < text.index("## noisy") < text.index("## Differences that differ")
  assert text.count("| second - first | paired | +0.1000 [+0.1000, +0.1000]") == 2
  assert "| second - first: noisy minus clean | paired | +0.0000 [+0.0000, +0.0000]" in text
  assert "6 intervals" in text
  assert {*json.loads(Path("a/metrics.json").read_text())} == {"clean", "noisy"}
  assert "accuracy, noisy" in Path("a/curves.svg").read_text()


def test_the_next_command_starts_from_the_run_before(commands):
  make("a", "first")
  before = next(word for word in commands[0] if word.startswith("--workdir")).split("=")[1]
  assert f"--init={before}" in commands[1]


def test_one_seed_has_values_and_differences_but_no_interval(commands):
  text = make("a", "first", "second: --other=1", seeds="0")
  assert "| first | 1 | 0.5000 |" in text
  assert "+0.1000, one pair" in text


def test_intervals_are_students():
  differences = np.array([0.1, 0.3, 0.2])
  half = 4.302653 * 0.1 / np.sqrt(3)  # t(0.975, 2)
  assert paired_tables.interval(differences) == f"+0.2000 [{0.2 - half:+.4f}, {0.2 + half:+.4f}]"


def test_variants_of_another_scale_have_a_panel_of_their_own(tmp_path):
  run = lambda values: [{"step": step, "loss": value} for step, value in enumerate(values)]
  named = {"a": [run([2.0, 1.0]), run([2.0, 1.2])], "b": [run([1.0, 0.9])], "c": [run([0.5, 0.04])], "d": []}
  assert paired_tables.of_one_scale(named, "loss") == [["a", "b"], ["c"]]
  assert paired_tables.of_one_scale(named, "accuracy") == []
  lines = {name: dict(enumerate(runs)) or {0: None} for name, runs in named.items()}
  paired_tables.draw(lines, ["loss"], tmp_path)
  text = (tmp_path / "curves.svg").read_text()
  assert "loss (a, b)" in text
  assert "loss (c)" in text
  assert (tmp_path / "curves.png").stat().st_size > 1000
