"""Test the records of a run: settings and starts, one line of numbers a step, and its course in examples."""

import json
import math

import numpy as np
import pytest
from etils import epath
from ml_collections import config_dict

from dtm_jax import data
from dtm_jax.errors import OptionError, UserError
from dtm_jax.records import changes, fingerprints, metrics_file
from dtm_jax.records import run_config as records
from dtm_jax.records.metrics_file import BucketMetricsFile, MetricsFile, rounded
from dtm_jax.training import optim
from dtm_jax.training.course import Course


class Pictures:
  def __init__(self, count, level=0):
    self.count, self.level = count, level

  def __len__(self):
    return self.count

  def __getitem__(self, index):
    return {"image": np.full((2, 2, 3), index + self.level, np.uint8), "label": index % 2, "name": str(index)}


def dataset(count=20, level=0, names=("cat", "dog")):
  return data.Dataset("pictures", count, names, Pictures(count, level))


def config(**more):
  values = dict(
    task="linear_probe", seed=0, resume="check", batch_size=4, total_steps=10,
    teacher=dict(name="clip", path="weights/a", dtype="float32", image_size=config_dict.placeholder(int)),
    data=dict(
      dataset=dict(name="folder", data_dir="photos"), split="train", num_threads=2, view=dict(scale=(0.2, 1))
    ),
    optim=dict(name="sgd", lr=0.1), evals=dict(test=dict(split="val", k=3)),
    morphers=dict(dtm=dict(name="bipartite", implementation="plain", max_rounds=14)),
  )  # fmt: skip
  made = config_dict.ConfigDict(values)
  made.update(more)
  return made


WEIGHTS = {"kernel": np.arange(6, dtype=np.float32).reshape(2, 3)}


def start(workdir, made=None, photos=None, frozen=WEIGHTS, write=True):
  """Do what one start of a run does with its records."""
  found = records.Records(epath.Path(workdir), made or config(), photos or dataset())
  found.check()
  found.check_weights("frozen", frozen)
  found.check_weights("init_from", None)
  if write:
    found.write(0, 0)
    (workdir / "metrics.jsonl").write_text('{"step": 0, "test/accuracy": 0.5}\n')
  return found


def saved(workdir):
  return json.loads((workdir / "config.json").read_text())


def kinds(found):
  return {change.key: change.kind for change in found.changes}


def test_the_same_config_again_is_no_change(tmp_path):
  start(tmp_path)
  assert start(tmp_path).changes == []
  assert saved(tmp_path)["class_names"] == ["cat", "dog"]
  assert records.class_names(str(tmp_path)) == ["cat", "dog"]
  first, second = saved(tmp_path)["starts"]
  assert (
    first["weights"] == second["weights"] == {"frozen": fingerprints.of_arrays(WEIGHTS), "init_from": None}
  )
  assert {"time", "step", "examples", "host", "processes", "versions", "commit", "command"} <= first.keys()


@pytest.mark.parametrize(
  ("change", "named"),
  [
    (dict(seed=1), r"--config.seed: 0 -> 1"),
    (dict(task="finetune"), r"--config.task: 'linear_probe' -> 'finetune'"),
    (dict(teacher=dict(name="dinov2")), r"--config.teacher.name: 'clip' -> 'dinov2'"),
    (dict(teacher=dict(image_size=64)), r"--config.teacher.image_size: None -> 64"),
    (dict(data=dict(split="train[:50%]")), r"--config.data.split: 'train' -> 'train\[:50%\]'"),
    (dict(morphers=dict(dtm=dict(max_rounds=2))), r"--config.morphers.dtm.max_rounds: 14 -> 2"),
    (dict(something_new=3), r"--config.something_new: None -> 3"),
  ],
)
def test_a_change_of_meaning_is_refused_with_both_values_and_the_way_out(tmp_path, change, named):
  start(tmp_path)
  before = (tmp_path / "config.json").read_bytes()
  with pytest.raises(UserError, match=rf"{named}(.|\n)*--workdir(.|\n)*--config.resume=force"):
    start(tmp_path, config(**change))
  assert (tmp_path / "config.json").read_bytes() == before
  forced = start(tmp_path, config(**change, resume="force"))
  assert forced.forced
  assert saved(tmp_path)["starts"][-1]["changes"]


def test_every_change_of_meaning_is_in_one_message(tmp_path):
  start(tmp_path)
  with pytest.raises(UserError) as error:
    start(tmp_path, config(seed=1, task="finetune", optim=dict(lr=0.2)), dataset(names=("dog", "cat")))
  assert all(text in str(error.value) for text in ("seed", "task", "class_names"))
  assert "optim.lr" not in str(error.value)


def test_a_change_of_course_is_named_and_goes_on(tmp_path, caplog):
  start(tmp_path)
  changed = config(batch_size=8, total_steps=20, optim=dict(lr=0.2), evals=dict(test=dict(k=5)))
  changed.data.num_threads, changed.teacher.dtype = 9, "bfloat16"
  with caplog.at_level("WARNING", logger="absl"):
    found = start(tmp_path, changed)
    found.log_changes(finished=False)
  keys = {"batch_size", "total_steps", "optim.lr", "evals.test.k", "data.num_threads", "teacher.dtype"}
  assert kinds(found) == dict.fromkeys(keys, changes.COURSE)
  assert "--config.optim.lr: 0.1 -> 0.2" in caplog.text
  assert found.changed("evals.test")
  assert not found.changed("evals.tes")
  assert saved(tmp_path)["starts"][-1]["changes"]["optim.lr"] == [0.1, 0.2]


def test_a_folder_of_weights_that_moved_goes_on_and_other_weights_do_not(tmp_path):
  start(tmp_path)
  moved = config(teacher=dict(path="weights/b"))
  assert kinds(start(tmp_path, moved, write=False)) == {"teacher.path": changes.COURSE}
  other = {"kernel": WEIGHTS["kernel"] + 1}
  with pytest.raises(UserError, match=r"teacher.path: 'weights/a' -> 'weights/b' \(other weights: checksum"):
    start(tmp_path, moved, frozen=other)
  with pytest.raises(UserError, match=r"teacher.path: \d+ -> \d+ \(checksums of what lies there\)"):
    start(tmp_path, frozen=other)


def test_a_folder_of_images_that_moved_goes_on_and_other_images_do_not(tmp_path):
  start(tmp_path)
  moved = config(data=dict(dataset=dict(data_dir="pictures")))
  assert kinds(start(tmp_path, moved, write=False)) == {"data.dataset.data_dir": changes.COURSE}
  for photos in (dataset(level=1), dataset(count=21)):
    with pytest.raises(UserError, match=r"data_dir: 'photos' -> 'pictures' \(other images\)"):
      start(tmp_path, moved, photos)
    with pytest.raises(UserError, match="other images in the same place"):
      start(tmp_path, photos=photos)


def test_a_key_that_only_another_version_of_the_code_has_is_no_change_of_meaning():
  old, new = {"task": "pretrain"}, {"task": "pretrain", "student": {"registers": 0}}
  (change,) = changes.compare(old, new, same_code=False)
  assert change.kind == changes.COURSE
  (change,) = changes.compare(old, new, same_code=True)
  assert change.kind == changes.MEANING
  assert changes.compare({}, {"a": None, "init_from": {"path": ""}}, same_code=True) == []


def test_a_renamed_option_counts_as_the_new_one():
  """A run that was started as optim.frozen goes on as optim.fixed, and no other value passes."""
  old = {"optim": {"frozen": ["blocks/.*"]}}
  assert changes.compare(old, {"optim": {"fixed": ["blocks/.*"]}}, same_code=False) == []
  (change,) = changes.compare(old, {"optim": {"fixed": ["norm/.*"]}}, same_code=False)
  assert (change.key, change.kind) == ("optim.fixed", changes.MEANING)


def test_a_run_from_before_this_version_still_resumes(tmp_path):
  (tmp_path / "config.json").write_text(config().to_json_best_effort(indent=2))
  (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
  assert start(tmp_path).changes == []


def test_without_numbers_any_config_may_go_on(tmp_path):
  start(tmp_path)
  (tmp_path / "metrics.jsonl").write_text("")
  assert start(tmp_path, config(seed=3)).changes == []


def test_an_unknown_value_of_resume_is_refused(tmp_path):
  with pytest.raises(OptionError, match=r"--config.resume='yes' is unknown. Available: check, force"):
    start(tmp_path, config(resume="yes"))


# metrics.jsonl -------------------------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path):
  return MetricsFile(epath.Path(tmp_path) / "metrics.jsonl")


def test_there_is_one_line_a_step_in_any_order_of_writing(file):
  file.keep_until(-1)
  file.write(2, {"loss": 0.5})
  file.write(2, {"knn/accuracy": 0.25}, replacing="knn/")
  file.write(4, {"loss": 0.25})
  file.write(2, {"knn/top5": 1.0}, replacing="knn/")
  assert file.lines() == [{"step": 2, "loss": 0.5, "knn/top5": 1.0}, {"step": 4, "loss": 0.25}]


def test_a_resume_drops_later_lines_and_mends_a_half_one(file):
  text = '{"step": 1, "loss": 1.0}\n\n{"step": 2, "loss": 0.5}\n{"step": 2, "knn/a": 0.5}\n'
  text += '{"step": 3}\n{"step": 4, "lo'
  file._path.write_text(text)
  file.keep_until(2)
  assert file._path.read_text() == '{"step": 1, "loss": 1.0}\n{"step": 2, "loss": 0.5, "knn/a": 0.5}\n'
  file.write(3, {"loss": 0.25})
  assert [line["step"] for line in file.lines()] == [1, 2, 3]
  file.keep_until(3, forget_evaluations=True)
  file.keep_until(2, forget_evaluations=True)
  assert file.lines()[-1] == {"step": 2, "loss": 0.5}


def test_a_complete_file_is_left_unchanged(file):
  file._path.write_text('{"step": 1, "loss": 0.123456789}\n')
  file.keep_until(1)
  assert file._path.read_text() == '{"step": 1, "loss": 0.123456789}\n'


@pytest.fixture
def in_bucket(tmp_path, monkeypatch):
  """Return a metrics file of a bucket, the contents that it writes, and its clock."""
  written, clock = [], [0.0]
  monkeypatch.setattr(metrics_file.writing, "write_whole", lambda path, text: written.append(text))
  monkeypatch.setattr(metrics_file.time, "monotonic", lambda: clock[0])
  return BucketMetricsFile(epath.Path(tmp_path) / "metrics.jsonl"), written, clock


def test_a_small_file_in_a_bucket_is_written_with_each_line(in_bucket):
  file, written, _ = in_bucket
  file.keep_until(-1)
  for step in (1, 2, 3):
    file.write(step, {"loss": 0.5})
    assert len(written) == step
  assert written[-1].count("\n") == 3
  file.flush()
  assert len(written) == 3  # nothing is left


def test_a_large_file_in_a_bucket_is_written_in_proportion_to_its_size(in_bucket):
  file, written, clock = in_bucket
  file.keep_until(-1)
  file.write(1, {f"number_{i}": i for i in range(5000)})
  assert [len(text) > metrics_file.SMALL for text in written] == [True]
  for step in range(2, 50):
    file.write(step, {"loss": 0.5})
  assert len(written) == 1
  assert len(file.lines()) == 49  # this process misses no line
  file.flush()  # as before a save
  assert [text.count("\n") for text in written] == [1, 49]
  clock[0] += 2 * len(written[-1]) / metrics_file.BYTES_PER_SECOND
  file.write(50, {"loss": 0.5})
  assert [text.count("\n") for text in written] == [1, 49, 50]


@pytest.mark.parametrize(
  ("value", "written"),
  [
    (1e-7, "1e-07"), (0.123456789, "0.123457"), (123456.789, "123457.0"), (np.float32(0.1), "0.1"),
    (12_345_678, "12345678"), (np.int64(3), "3"), (math.nan, "null"), (-math.inf, "null"),
  ],
)  # fmt: skip
def test_numbers_have_six_significant_digits(value, written):
  assert json.dumps(rounded(value)) == written


# The course in examples ----------------------------------------------------------------------------------


def test_another_batch_size_ends_at_the_same_number_of_examples():
  options = config_dict.ConfigDict(dict(total_epochs=6.0))
  first = Course.fresh(16, 80)
  assert first.total_steps(options) == 30
  assert first.for_schedules(options)["total_steps"] == 30
  second = Course.fresh(8, 80).resumed(10, first.meta_at(10))
  assert second.changed
  assert second.examples == 160
  assert second.total_steps(options) == 10 + 40
  assert second.examples_at(50) == 480
  assert second.epoch_at(50) == 6.0
  third = Course.fresh(16, 80).resumed(30, second.meta_at(30))  # and back
  assert third.examples == 320
  assert third.examples_at(third.total_steps(options)) == 480
  options.total_steps = 33
  assert third.total_steps(options) == 33
  assert "scale" not in third.for_schedules(options)


def test_the_same_batch_size_changes_nothing():
  options = config_dict.ConfigDict(dict(total_examples=1000))
  course = Course.fresh(16, 80)
  resumed = course.resumed(7, {"batch_size": 16, "seed": 0})  # as old checkpoints have it
  assert not resumed.changed
  assert resumed.total_steps(options) == course.total_steps(options)
  assert resumed.for_schedules(options) == course.for_schedules(options)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("durations", [dict(total_epochs=6.0, warmup=4), dict(total_steps=30, warmup=4)])
def test_the_learning_rate_goes_on_at_the_same_place(accumulate, durations):
  options = config_dict.ConfigDict(durations)

  def rate(course):
    fields = course.for_schedules(options)
    shapes = {"w": np.zeros(3, np.float32)}
    places = {name: fields[name] for name in ("scale", "shift") if name in fields}
    return optim.make_optimizer(
      shapes, total_steps=fields["total_steps"], warmup_steps=4, batch_size=16, lr_scaling="none", lr=1.0,
      accumulate=accumulate, **places,
    )[1]  # fmt: skip

  first = Course.fresh(16, 80)
  second = Course.fresh(8, 80).resumed(10, first.meta_at(10))
  before, after = rate(first), rate(second)
  assert float(after(10)) == pytest.approx(float(before(10)), rel=1e-6)
  if "total_epochs" in durations:
    assert float(after(10 + 8)) == pytest.approx(float(before(10 + 4)), rel=1e-6)
    assert float(after(50)) == pytest.approx(float(before(30)), rel=1e-6)
  else:
    assert float(after(20)) == float(before(20))
