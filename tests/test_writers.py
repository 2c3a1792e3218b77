"""Weights & Biases and MLflow, offline: what they store, resumed runs, missing packages, and failures."""

import json
import math
import struct

import pytest
import small_world
from etils import epath

from dtm_jax.errors import OptionError, UserError
from dtm_jax.options import overrides, run_options, validation
from dtm_jax.records import writers
from dtm_jax.records.metrics import Metrics

CONFIG = {"task": "pretrain", "optim": {"lr": 0.001}, "mesh": {"rules": [[".*", "fsdp"]]}}


class Recorder:
  """A writer that keeps what it gets, and fails from one step on."""

  def __init__(self, fails_at=math.inf):
    self.got, self.flushed, self.closed, self._fails_at = [], 0, 0, fails_at

  def write_scalars(self, step, scalars):
    if step >= self._fails_at:
      raise ConnectionError("the service is down")
    self.got.append((step, dict(scalars)))

  def flush(self):
    self.flushed += 1

  def close(self):
    self.closed += 1


def write(folder, more, steps):
  metrics = Metrics(epath.Path(folder))
  metrics.go_on_from(-1)
  metrics.add_writers(more)
  for step in steps:
    metrics.write(step, {"loss": 1 / step, "knn/accuracy": math.nan})
  metrics.close()


def test_a_writer_gets_the_finite_numbers_in_order(tmp_path):
  recorder = Recorder()
  write(tmp_path, [writers.Guarded("wandb", recorder)], range(1, 50))
  assert recorder.got == [(step, {"loss": 1 / step}) for step in range(1, 50)]
  assert recorder.closed == 1


def test_a_writer_that_fails_warns_once_and_the_others_go_on(tmp_path, caplog):
  bad, good = Recorder(fails_at=3), Recorder()
  write(tmp_path, [writers.Guarded("mlflow", bad), writers.Guarded("wandb", good)], range(1, 7))
  assert [step for step, _ in bad.got] == [1, 2]
  assert [step for step, _ in good.got] == [1, 2, 3, 4, 5, 6]
  assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 6
  warnings = [record.message for record in caplog.records if "mlflow failed" in record.message]
  assert len(warnings) == 1
  assert "ConnectionError: the service is down" in warnings[0]


def test_writers_that_never_wrote_are_closed(tmp_path):
  recorder = Recorder()
  write(tmp_path, [writers.Guarded("wandb", recorder)], [])
  assert recorder.closed == 1


def fake_service(monkeypatch, open_writer):
  monkeypatch.setattr(writers, "_open_writer", lambda name: open_writer)


def refuse(workdir, config):
  raise ConnectionError("no route to host")


def test_a_service_that_cannot_be_opened_ends_a_fresh_run_only(monkeypatch, tmp_path, caplog):
  fake_service(monkeypatch, refuse)
  workdir = epath.Path(tmp_path)
  with pytest.raises(OptionError, match=r"log.writers=wandb: it cannot be opened: .*no route to host"):
    writers.open_writers(["wandb"], workdir, CONFIG, resumed=False)
  assert writers.open_writers(["wandb"], workdir, CONFIG, resumed=True) == []
  assert "goes on without it" in caplog.text


def test_only_process_0_opens_a_service(monkeypatch, tmp_path):
  monkeypatch.setattr(writers.processes, "from_first_process", lambda function: None)  # as on process 1
  fake_service(monkeypatch, refuse)
  assert writers.open_writers(["wandb"], epath.Path(tmp_path), CONFIG, resumed=False) == []


def test_a_missing_package_names_the_extra(world, monkeypatch):
  config = small_world.debug_config(world, log__writers=("mlflow",))
  find = validation.cross_checks.importlib.util.find_spec
  monkeypatch.setattr(
    validation.cross_checks.importlib.util, "find_spec", lambda name: None if name == "mlflow" else find(name)
  )
  with pytest.raises(UserError, match=r'log.writers.*mlflow.*pip install "dtm_jax\[mlflow\]"'):
    validation.check(config)


def test_writers_are_typed_with_commas():
  rule = run_options.RUN_OPTIONS["log.writers"]
  assert overrides.parse(rule, "wandb,mlflow") == ("wandb", "mlflow")
  assert overrides.parse(rule, "wandb") == ("wandb",)
  assert overrides.parse(rule, "()") == ()
  assert rule.problem(overrides.parse(rule, "wandb,tensorboard")) is not None


def test_a_run_sends_its_numbers_and_continues_them(world, programs, monkeypatch, tmp_path):
  recorder, seen = Recorder(), []
  fake_service(monkeypatch, lambda workdir, config: seen.append(config) or recorder)
  config = small_world.probe_config(world, total_steps=2, evals={}, log__writers=("wandb",))
  programs.train(config, str(tmp_path))
  config.total_steps = 6
  programs.train(config, str(tmp_path))
  assert [step for step, _ in recorder.got] == [2, 3, 4, 6]
  lines = {line["step"]: line for line in small_world.metrics(tmp_path)}
  for step, scalars in recorder.got:
    assert scalars["loss"] == pytest.approx(lines[step]["loss"], rel=1e-5)
  assert [each["total_steps"] for each in seen] == [2, 6]
  assert recorder.closed == 2


def test_mlflow_keeps_steps_config_and_one_run(monkeypatch, tmp_path):
  pytest.importorskip("mlflow")
  from mlflow import MlflowClient

  from dtm_jax.records import mlflow_writer

  uri = (tmp_path / "mlruns").as_uri()
  monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
  monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
  workdir = epath.Path(tmp_path / "run")
  workdir.mkdir()
  for lr, steps in ((0.001, (1, 2)), (0.002, (2, 3))):
    writer = mlflow_writer.open_writer(workdir, CONFIG | {"optim": {"lr": lr}})
    for step in steps:
      writer.write_scalars(step, {"loss": 1 / step, "knn/student_accuracy": 0.5})
    writer.close()
  client, run_id = MlflowClient(uri), json.loads((workdir / "mlflow.json").read_text())["run_id"]
  (run,) = client.search_runs([client.get_experiment_by_name("dtm_jax").experiment_id])
  assert (run.info.run_id, run.info.run_name, run.info.status) == (run_id, "run", "FINISHED")
  history = client.get_metric_history(run_id, "loss")
  assert {(each.step, each.value) for each in history} == {(1, 1.0), (2, 0.5), (3, 1 / 3)}
  assert client.get_metric_history(run_id, "knn/student_accuracy")
  assert run.data.params["optim.lr"] == "0.001"  # MLflow can't change it
  (path,) = (tmp_path / "mlruns").rglob("config.json")
  assert json.loads(path.read_text())["optim"]["lr"] == 0.002
  (workdir / "mlflow.json").write_text('{"run_id": "0123456789abcdef0123456789abcdef"}')
  mlflow_writer.open_writer(workdir, CONFIG)  # a run that is gone there
  assert len(client.search_runs([run.info.experiment_id])) == 2


def wandb_records(content):
  """Yield the records of a .wandb file: 7 bytes, then LevelDB's log in blocks of 32 KiB.

  A part of a record has a checksum (4 bytes), a length (2) and a kind (1): whole, first, middle, last.
  """
  place, block, record = 7, 32768, b""
  while place + 7 <= len(content):
    if block - place % block < 7:  # the rest of a block is empty
      place += block - place % block
      continue
    length, kind = struct.unpack("<HB", content[place + 4 : place + 7])
    record += content[place + 7 : place + 7 + length]
    place += 7 + length
    if kind in (1, 4):
      yield record
      record = b""


@pytest.mark.slow
def test_wandb_keeps_steps_config_and_one_run(monkeypatch, tmp_path):
  wandb = pytest.importorskip("wandb")
  from wandb.proto import wandb_internal_pb2

  from dtm_jax.records import wandb_writer

  monkeypatch.setenv("WANDB_MODE", "offline")
  monkeypatch.setenv("WANDB_SILENT", "true")
  workdir = epath.Path(tmp_path)
  for lr, steps in ((0.001, (1, 2)), (0.002, (2, 3))):
    writer = wandb_writer.open_writer(workdir, CONFIG | {"optim": {"lr": lr}})
    for step in steps:
      writer.write_scalars(step, {"loss": 1 / step})
    writer.close()
  wandb.teardown()  # W&B's own process writes the files; this waits for its end, as the end of a run does
  identity = json.loads((tmp_path / "wandb.json").read_text())
  files = sorted((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
  assert [file.name for file in files] == [f"run-{identity['id']}.wandb"] * 2
  rows, configs = [], []
  for file in files:
    for data in wandb_records(file.read_bytes()):
      record = wandb_internal_pb2.Record()
      record.ParseFromString(data)
      items = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
      rows += [(json.loads(items["step"]), json.loads(items["loss"]))] if "loss" in items else []
      updates = [*record.run.config.update, *record.config.update]
      configs += [json.loads(item.value_json) for item in updates if item.key == "optim"]
  assert rows == [(1, 1.0), (2, 0.5), (2, 0.5), (3, pytest.approx(1 / 3))]
  assert [each["lr"] for each in configs][-1] == 0.002


def test_a_damaged_identity_is_named(tmp_path):
  (tmp_path / "wandb.json").write_text("{")
  with pytest.raises(UserError, match=r"wandb.json is not JSON. Remove it"):
    writers.read_identity(epath.Path(tmp_path), "wandb")
