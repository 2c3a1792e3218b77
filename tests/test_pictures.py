"""Pictures: the colours and lines that a reader sees are the groups, the similarities and the numbers."""

import importlib
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import jax
import numpy as np
import pytest

from dtm_jax import morphing, pictures
from dtm_jax.pictures import groups, sheet

IMAGE = np.random.default_rng(0).integers(0, 256, (16, 24, 3), np.uint8)


def pixels_of(figure):
  from matplotlib.backends.backend_agg import FigureCanvasAgg

  canvas = FigureCanvasAgg(figure)
  canvas.draw()
  return np.asarray(canvas.buffer_rgba())[..., :3]


def tokens(num_images=1, num_tokens=24):
  return jax.random.normal(jax.random.key(1), (num_images, num_tokens, 8))


def test_each_group_is_drawn_in_the_mean_colour_of_its_pixels():
  label_RQ = np.zeros((2, 3), int)
  label_RQ[:, 1:] = 1
  figure = pictures.draw_groups(IMAGE, label_RQ.reshape(-1), inches=2.0)
  pixels = pixels_of(figure)
  axes = figure.axes[0]
  panel = axes.get_images()[1].get_extent()
  for column, expected in ((0, IMAGE[:, :8]), (1, IMAGE[:, 8:])):
    place = (panel[0] + (0.5, 2.2)[column], panel[3] + 0.4)
    x, y = axes.transData.transform(place)
    drawn = pixels[len(pixels) - 1 - round(y), round(x)]
    np.testing.assert_allclose(drawn, expected.mean(axis=(0, 1)), atol=1.0)


def test_float_pixels_outside_of_0_to_1_are_refused():
  with pytest.raises(ValueError, match="theirs are 0 to 255"):
    pictures.draw_groups(np.linspace(0.0, 255.0, 8 * 8 * 3).reshape(8, 8, 3), np.zeros(4, int))


def test_borders_are_exactly_the_sides_between_two_groups():
  label_RQ = np.random.default_rng(2).integers(0, 3, (5, 4))
  expected = set()
  for r in range(5):
    for q in range(4):
      if q < 3 and label_RQ[r, q] != label_RQ[r, q + 1]:
        expected.add(((q + 1, r), (q + 1, r + 1)))
      if r < 4 and label_RQ[r, q] != label_RQ[r + 1, q]:
        expected.add(((q, r + 1), (q + 1, r + 1)))
  segments = sheet.border_segments(label_RQ)
  assert {tuple(map(tuple, segment)) for segment in segments} == expected
  assert len(segments) == len(expected)


def test_mean_colours_ignore_pixels_beyond_the_last_patch():
  image = np.concatenate([IMAGE, np.full((1, 24, 3), 255, np.uint8)])
  np.testing.assert_allclose(sheet.mean_colours(image, (2, 3)), sheet.mean_colours(IMAGE, (2, 3)))
  np.testing.assert_allclose(sheet.mean_colours(IMAGE, (2, 3))[1, 2] * 255, IMAGE[8:, 16:].mean(axis=(0, 1)))


@pytest.mark.parametrize("num_groups", [1, 5, 24])
def test_group_tokens_makes_exactly_so_many_groups(num_groups):
  for label_N in np.asarray(pictures.group_tokens(tokens(2), num_groups)):
    assert len(np.unique(label_N)) == num_groups


def test_group_tokens_names_a_number_that_does_not_fit():
  with pytest.raises(ValueError, match="num_groups=25 must be 1 to 24"):
    pictures.group_tokens(tokens(), 25)


def test_the_rounds_end_with_the_label_of_the_whole_matching():
  merges_K, options = np.array([6, 5, 0, 3]), {"split": "random", "key": jax.random.key(3)}
  label_PBN = pictures.label_after_rounds(tokens(2), merges_K, **options)
  assert [len(np.unique(label_N)) for label_N in label_PBN[:, 0]] == [24, 18, 13, 13, 10]
  expected = morphing.bipartite_match(tokens(2), jax.numpy.asarray(merges_K), **options)
  np.testing.assert_array_equal(label_PBN[-1], expected)
  for before_N, after_N in zip(label_PBN[:-1, 0], label_PBN[1:, 0], strict=True):
    parts = groups._merged_centres(before_N, after_N, (4, 6))
    assert sum(len(centres) - 1 for centres in parts) == len(np.unique(before_N)) - len(np.unique(after_N))
  figure = pictures.draw_rounds(IMAGE, label_PBN[:, 0])
  titles = [text.get_text() for text in figure.axes[0].texts]
  assert titles[:2] == ["24 groups at the start", "round 1: 18 groups"]


def test_several_images_and_titles_make_a_table():
  image = np.stack([IMAGE, IMAGE, IMAGE])
  label = {f"{n} groups": pictures.group_tokens(tokens(3), n) for n in (12, 3)}
  axes = pictures.draw_groups(image, label, halves=2).axes[0]
  assert [text.get_text() for text in axes.texts] == ["image", "12 groups", "3 groups"] * 2
  assert len(axes.get_images()) == 3 * 3


def test_labels_that_do_not_fit_are_refused():
  with pytest.raises(ValueError, match="2 images have labels of 3 images"):
    pictures.draw_groups(np.stack([IMAGE] * 2), np.zeros((3, 24), int))
  with pytest.raises(ValueError, match=r"23 tokens do not fill.*16x24 pixels.*grid="):
    pictures.draw_groups(IMAGE, np.zeros(23, int))
  pictures.draw_groups(IMAGE, np.zeros(12, int), grid=(3, 4))


def test_similarity_is_the_cosine_to_the_query():
  token_NC = np.asarray(tokens()[0])
  figure = pictures.draw_similarity(IMAGE, {"a": token_NC, "b": token_NC * 3}, query=(1, 2))
  first, second = (np.asarray(image.get_array()) for image in figure.axes[0].get_images()[1:])
  query = token_NC[1 * 6 + 2]
  expected = token_NC @ query / np.linalg.norm(token_NC, axis=1) / np.linalg.norm(query)
  np.testing.assert_allclose(first.reshape(-1), expected, rtol=1e-5)
  np.testing.assert_allclose(first, second, rtol=1e-5)
  assert np.isfinite(pictures.cosine_to(np.zeros((3, 2)), 0)).all()
  with pytest.raises(ValueError, match=r"query=\(4, 0\) is not in the grid of 4x6"):
    pictures.draw_similarity(IMAGE, token_NC, query=(4, 0))


def test_curves_have_one_pair_of_axes_for_each_scale():
  lines = [{"step": step, "loss": 1 / step, "lr": step / 10} for step in (1, 2, 4)] + [
    {"step": 3, "knn": 0.5}
  ]
  figure = pictures.draw_curves(lines, {"losses": ["loss", "lr"], "kNN": ["knn"], "none": ["missing"]})
  losses, knn, none = figure.axes
  assert [list(line.get_xdata()) for line in losses.lines] == [[1, 2, 4]] * 2
  assert losses.lines[0].get_color() != losses.lines[1].get_color()
  assert list(knn.lines[0].get_ydata()) == [0.5]
  assert not none.lines
  assert none.texts[0].get_text() == "no numbers"


def test_runs_differ_in_colour_and_seeds_of_a_run_do_not():
  lines = [{"step": 1, "loss": 0.5}, {"step": 2, "loss": None}, {"step": 3, "loss": 0.2}]
  (axes,) = pictures.draw_curves({"A": lines, "B": [lines, lines]}, ["loss"]).axes
  colours = [line.get_color() for line in axes.lines]
  assert colours[0] != colours[1] == colours[2]
  assert [text.get_text() for text in axes.get_legend().get_texts()] == ["A", "B"]
  np.testing.assert_array_equal(axes.lines[0].get_ydata(), [0.5, np.nan, 0.2])  # not finite: a gap


def test_svg_is_one_element_with_readable_text_and_the_same_each_time():
  make = lambda: pictures.to_svg(pictures.draw_curves([{"step": 1, "loss": 0.5}], ["loss"]), "curves")
  assert make() == make()
  root = ET.fromstring(make())
  assert root.tag.endswith("svg")
  assert {"loss", "step"} <= {element.text for element in root.iter("{http://www.w3.org/2000/svg}text")}


def test_without_matplotlib_the_error_names_the_extra(monkeypatch):
  for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
    monkeypatch.delitem(sys.modules, name)
  monkeypatch.setattr(sys, "path", [])
  monkeypatch.setattr(sys, "meta_path", [])
  with pytest.raises(sheet.MissingMatplotlibError, match=r'pip install "dtm_jax\[studies\]"'):
    sheet.require("matplotlib.figure")


@pytest.mark.slow
def test_the_command_that_draws_groups(tmp_path, capsys):
  root = Path(__file__).parents[1]
  command = importlib.import_module("scripts.reports.draw_groups")
  command.main([
    f"--teacher={root / 'assets/tiny_clip_cifar10'}", f"--folder={root / 'assets/photos'}", "--images=2",
    "--groups=16,1", f"--out={tmp_path / 'groups.svg'}",
  ])  # fmt: skip
  text = (tmp_path / "groups.svg").read_text()
  assert "<svg" in text
  assert "2 images in 16, 1 groups" in capsys.readouterr().out


def test_tokens_of_a_class_have_its_colour_and_rare_classes_are_grey():
  image = np.stack([IMAGE])
  class_BN = np.array([[0] * 4 + [1] * 3 + [2, 2, 3, 3, 4, 4, 5, 5, 6, 6] + [7]])[:, :18]
  figure = pictures.draw_token_classes(image, {"a": class_BN}, list("ABCDEFGH"), grid=(3, 6))
  drawn = np.asarray(figure.axes[0].get_images()[1].get_array()).reshape(-1, 3)
  assert len(np.unique(drawn[:4], axis=0)) == 1
  assert len(np.unique(drawn, axis=0)) == 8
  assert np.ptp(drawn[-1]) == 0  # grey
  (legend,) = figure.legends
  assert [text.get_text() for text in legend.get_texts()] == [*"ABCDEFG", "others"]
