"""What all evaluators share: their context, their schedule, and the check of class names."""

import numpy as np
import pytest
from coloured_images import mean_colour, write_cifar10, write_folder

from dtm_jax import evaluators, plugins
from dtm_jax.errors import OptionError
from dtm_jax.evaluators import Context, Evaluators, best_head, classification, knn
from dtm_jax.training import mesh as meshes
from dtm_jax.training.course import Course

MESH = meshes.make_mesh(8, 1)


def test_an_unknown_predict_function_names_the_choices():
  with pytest.raises(ValueError, match=r"'studnt'.*student, teacher"):
    Context({"teacher": mean_colour, "student": mean_colour}, MESH).function("studnt")


def test_bound_functions_get_the_frozen_arrays():
  functions = {"sum": lambda state, frozen, batch: state + frozen + batch["x"]}
  context = Context.bind(functions, np.float32(10), MESH)
  result = context.function("sum")(np.float32(100), {"x": np.arange(8, dtype=np.float32)})
  np.testing.assert_array_equal(result, 110 + np.arange(8))
  assert result.sharding.is_fully_replicated


class Brightness:
  """A complete evaluator that a user might write."""

  def __init__(self, context: Context, *, dataset, split=None, batch_size=16):
    self._predict, self._mesh = context.function("student"), context.mesh
    self._dataset = evaluators.open_dataset(dataset, split)
    self._view = dict(batch_size=batch_size, image_size=context.image_size)

  def run(self, state):
    total, count = 0.0, 0
    for colour_B3, label_B in evaluators.labelled_outputs(
      self._predict, state, self._dataset, self._mesh, **self._view
    ):
      total += float(colour_B3.max(axis=1).sum())
      count += len(label_B)
    yield "brightness", total / count


def test_a_users_evaluator_needs_only_what_it_uses(tmp_path):
  context = Context({"student": mean_colour}, MESH, image_size=32)
  dataset = write_cifar10(tmp_path)
  image = np.load(tmp_path / "cifar10" / "arrays" / "test_images.npy")
  expected = {"brightness": pytest.approx(image.max(axis=(1, 2, 3)).mean() / 255, abs=1e-6)}
  assert dict(Brightness(context, dataset=dataset).run({})) == expected


SECTIONS = {
  "often": dict(name="stub", every_steps=2, at_start=True),
  "stub": dict(every_steps=3),
  "at_the_end": dict(name="stub"),
}


class TestSchedule:
  @pytest.fixture(autouse=True)
  def stub(self, monkeypatch):
    class Stub:
      class Evaluator:
        def __init__(self, context):
          pass

        def run(self, state):
          if state["step"] == 13:
            raise ValueError("no luck")
          yield "step", float(state["step"])

    monkeypatch.setattr(plugins, "load", lambda socket, name: {("evaluators", "stub"): Stub}[socket, name])

  def make(self, total_steps):
    return Evaluators(SECTIONS, Context({}, MESH), Course.fresh(8, 80).steps, total_steps)

  def test_intervals_start_and_end(self):
    made = self.make(total_steps=8)
    assert {step: made.due(step) for step in range(9)} == {
      0: ["often"], 1: [], 2: ["often"], 3: ["stub"], 4: ["often"], 5: [], 6: ["often", "stub"], 7: [],
      8: ["often", "stub", "at_the_end"],
    }  # fmt: skip

  def test_a_fresh_start_runs_what_is_due(self):
    assert self.make(total_steps=8).due_at_start(0, unexpected, unexpected) == ["often"]
    assert self.make(total_steps=0).due_at_start(0, unexpected, unexpected) == list(SECTIONS)
    assert self.make(total_steps=0).due_at_start(8, unexpected, unexpected) == list(SECTIONS)

  def test_a_resumed_run_repeats_what_has_no_numbers(self):
    made = self.make(total_steps=8)
    evaluated = lambda step: {6: ["often"], 8: ["often", "stub"]}[step]
    assert made.due_at_start(6, evaluated, lambda name: True) == ["stub"]
    assert made.due_at_start(8, evaluated, lambda name: False) == ["at_the_end"]

  def test_a_finished_run_repeats_what_has_changed(self):
    evaluated = lambda step: list(SECTIONS)
    assert self.make(total_steps=8).due_at_start(8, evaluated, lambda name: name == "stub") == ["stub"]

  def test_numbers_and_errors_name_the_evaluator(self):
    made = self.make(total_steps=8)
    assert made.run("often", {"step": 4}) == {"often/step": 4}
    with pytest.raises(ValueError, match="no luck") as raised:
      made.run("often", {"step": 13})
    assert raised.value.__notes__ == ["while evaluator 'often' ran at step 13"]


def unexpected(*_):
  raise AssertionError("not called")


class TestClassesOfTwoSplits:
  def make(self, dataset, **options):
    context = Context({"student": mean_colour}, MESH)
    return knn.Evaluator(context, dataset=dataset, k=1, image_size=8, batch_size=8, **options)

  def test_the_error_names_classes_that_the_bank_lacks(self, tmp_path):
    dataset = write_folder(tmp_path)
    write_folder(tmp_path, splits=("val",), classes=("eel", "fox"), count=1)
    with pytest.raises(
      OptionError, match=rf"'{tmp_path}/val' has 2 classes \(eel, fox\) that '{tmp_path}/train'"
    ):
      self.make(dataset)

  def test_a_folder_of_images_is_not_a_class(self, tmp_path):
    write_folder(tmp_path, splits=("train",))
    dataset = write_folder(tmp_path, splits=("val",), classes=("images",), count=8)
    with pytest.raises(OptionError, match=r"has 1 class \(images\) that .*4 classes \(a, b, c, d\)"):
      self.make(dataset)
    rows = "".join(f"{i:02d}.png a 0 0 8 8\n" for i in range(8))
    (tmp_path / "val" / "val_annotations.txt").write_text(rows)
    assert dict(self.make(dataset).run({})) == {"student_accuracy": 1.0}

  def test_one_line_of_the_log_names_classes_that_the_evaluated_split_lacks(self, tmp_path, caplog):
    caplog.set_level("INFO")
    write_folder(tmp_path, splits=("train",))
    dataset = write_folder(tmp_path, splits=("val",), classes=("a", "b"))
    assert dict(self.make(dataset).run({})) == {"student_accuracy": 1.0}
    assert f"'{tmp_path}/val' has no example of 2 classes (c, d) of '{tmp_path}/train'" in caplog.text

  @pytest.mark.parametrize("name", ["classification", "best_head"])
  def test_a_classifier_is_compared_with_its_training_set(self, tmp_path, name):
    """The evaluated set may have numbers for names, but no other or fewer classes."""
    module, more = {"classification": (classification, {}), "best_head": (best_head, {"held_out": "val"})}[
      name
    ]
    predict = {key: mean_colour for key in ("logits", "rates")}
    training = plugins.build("datasets", write_folder(tmp_path / "train"), split="train")
    context = Context(predict, MESH, training=training)
    make = lambda dataset: module.Evaluator(context, dataset=dataset, image_size=8, batch_size=8, **more)
    make(write_folder(tmp_path / "same", splits=("val",)))
    make(write_folder(tmp_path / "numbers", splits=("val",), classes=("0", "1", "2", "3")))
    with pytest.raises(
      OptionError, match=r"in two ways: 'b' is 0 of 3 in the first and 1 of 4 in the second"
    ):
      make(write_folder(tmp_path / "fewer", splits=("val",), classes=("b", "c", "d")))
    with pytest.raises(OptionError, match=r"2 classes \(cat, dog\) that .*/train/train' does not have"):
      make(write_folder(tmp_path / "others", splits=("val",), classes=("cat", "dog")))

  def test_a_part_of_a_split_may_lack_classes(self, tmp_path, caplog):
    dataset = write_folder(tmp_path)
    assert dict(self.make(dataset, bank="train[:2]").run({}))["student_accuracy"] <= 0.5
    assert "/train[:2]' has no example of " in caplog.text
