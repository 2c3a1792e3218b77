"""Captions from sets of prompts, and from files of templates and class names."""

import importlib.util
from pathlib import Path

import pytest

from dtm_jax.models.clip import prompts

WNIDS = [f"n{i:08d}" for i in range(1000)]


def test_imagenet_prompts_have_class_names_in_label_order():
  captions = prompts.captions(WNIDS, "imagenet")
  assert len(captions) == 1000
  assert {len(of_class) for of_class in captions} == {80}
  assert captions[0][0] == "a bad photo of a tench."
  known = {0: "tench", 207: "Golden Retriever", 281: "tabby cat", 404: "airliner", 999: "toilet paper"}
  for label, name in known.items():
    assert all(name in caption for caption in captions[label])


def test_tfds_labels_imagenet_in_the_same_order():
  """TFDS's class names are the sorted WordNet ids, as are the folders of the original data set."""
  root = Path(importlib.util.find_spec("tensorflow_datasets").origin).parent
  wnids = (root / "datasets" / "imagenet2012" / "labels.txt").read_text().split()
  assert wnids == sorted(set(wnids))
  assert (len(wnids), wnids[0], wnids[207]) == (1000, "n01440764", "n02099601")  # tench, golden retriever


def test_other_prompts_use_the_data_sets_names():
  captions = prompts.captions(("aquarium_fish", "maple_tree"), "cifar100")
  assert [len(of_class) for of_class in captions] == [18, 18]
  assert "a photo of a aquarium fish." in captions[0]


def test_templates_and_names_from_files(tmp_path):
  templates, names = tmp_path / "templates.txt", tmp_path / "names.txt"
  templates.write_text("# a comment\n\na {c}, drawn\n  {c}!\n")
  names.write_text("red panda\nsea cow\n")
  captions = prompts.captions(("n1", "n2"), str(templates), names_file=str(names))
  assert captions == [["a red panda, drawn", "red panda!"], ["a sea cow, drawn", "sea cow!"]]
  said = prompts.captions(WNIDS[:2], "plain", names_file=str(names))
  assert said == [["a photo of a red panda."], ["a photo of a sea cow."]]


@pytest.mark.parametrize(
  ("content", "message"),
  [
    ("a photo\n", r"templates.txt: template 'a photo' has no \{c\}"),
    ("a {c} of {d}\n", r"templates.txt: template 'a \{c\} of \{d\}' has braces other than \{c\}"),
    ("a {c\n", "has braces other than"),
    ("# nothing\n", r"templates.txt has no templates"),
  ],
)
def test_bad_templates_are_named(tmp_path, content, message):
  (tmp_path / "templates.txt").write_text(content)
  with pytest.raises(ValueError, match=message):
    prompts.captions(("cat",), str(tmp_path / "templates.txt"))


def test_missing_files_unknown_sets_and_wrong_counts_are_named(tmp_path):
  with pytest.raises(FileNotFoundError, match=r"prompts='nowhere/t\.txt'"):
    prompts.captions(("cat",), "nowhere/t.txt")
  with pytest.raises(FileNotFoundError, match=r"class_names='names\.txt'"):
    prompts.captions(("cat",), "plain", names_file="names.txt")
  with pytest.raises(ValueError, match=r"'cifar_10'.*cifar10, cifar100, imagenet"):
    prompts.captions(("cat",), "cifar_10")
  (tmp_path / "names.txt").write_text("a\nb\nc\n")
  with pytest.raises(ValueError, match=r"names\.txt has 3 class names, and pets has 2 classes"):
    prompts.captions(("cat", "dog"), "plain", names_file=str(tmp_path / "names.txt"), dataset="pets")
  with pytest.raises(ValueError, match=r"imagenet_classes\.txt has 1000 class names, and .* 2 classes"):
    prompts.captions(("cat", "dog"), "imagenet")
  with pytest.raises(ValueError, match="data set 'folder' has none"):
    prompts.captions(None, "plain", dataset="data set 'folder'")


def test_names_for_numbered_folders_are_logged(tmp_path, caplog):
  (tmp_path / "names.txt").write_text("airplane\ncar\ncafe\u0301\n", encoding="utf-8")
  said = prompts.captions(("5", "6", "14"), "plain", names_file=str(tmp_path / "names.txt"))
  assert said[2] == ["a photo of a caf\u00e9."]
  (record,) = [record for record in caplog.records if "names.txt" in record.getMessage()]
  assert record.levelname == "WARNING"
  assert "5 is airplane, 6 is car, 14 is caf\u00e9." in record.getMessage()


def test_class_names_in_another_order_are_refused(tmp_path):
  names = tmp_path / "names.txt"
  names.write_text("Sea cow\ncat\nred panda\n")
  with pytest.raises(ValueError, match=r"another order: number 0 in it is 'Sea cow', and class 0 .* 'cat'"):
    prompts.captions(("cat", "red_panda", "sea_cow"), "plain", names_file=str(names))
