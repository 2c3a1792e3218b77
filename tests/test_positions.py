"""Resized positions against torch and SciPy's splines, and functions that resizing must keep."""

import jax.numpy as jnp
import numpy as np
import pytest
from scipy.interpolate import RectBivariateSpline

from dtm_jax.models import positions


def random(*shape):
  return np.random.default_rng(0).standard_normal(shape, np.float32)


def test_position_embeddings_without_slack_match_torch():
  torch = pytest.importorskip("torch")
  table = random(1 + 36, 5)
  for grid in ((9, 9), (4, 7)):
    ours = positions.resize_positions(jnp.asarray(table), grid, slack=0.0)
    square = torch.from_numpy(table[1:]).reshape(1, 6, 6, 5).permute(0, 3, 1, 2)
    theirs = torch.nn.functional.interpolate(square, size=grid, mode="bicubic", align_corners=False)
    np.testing.assert_allclose(ours[1:], theirs[0].permute(1, 2, 0).reshape(-1, 5), atol=1e-5)
    np.testing.assert_array_equal(ours[0], table[0])


@pytest.mark.parametrize(("old", "new"), [(14, 24), (7, 14), (4, 5), (14, 10)])
def test_geometric_offsets(old, new):
  """For a larger grid, the old outermost offset lands on the new one, and the steps grow."""
  places = positions.geometric_offsets(old - 1, new - 1)
  steps = np.diff(places)
  assert places.shape == (2 * old - 1,)
  np.testing.assert_allclose(places, -places[::-1])
  right = steps[old - 1 :]
  assert right[0] == 1
  ratio = right[1:] / right[:-1]
  np.testing.assert_allclose(ratio, ratio[0])
  if new > old:
    np.testing.assert_allclose(places[-1], new - 1, atol=1e-4)
  else:
    np.testing.assert_allclose(ratio, 1.01, atol=1e-5)


@pytest.mark.parametrize(("old", "new"), [((14, 14), (24, 24)), ((7, 5), (8, 9)), ((14, 14), (10, 10))])
def test_bias_tables_match_scipys_spline(old, new):
  rows, columns = (2 * size - 1 for size in old)
  table = random(2, rows * columns + 3, 3)
  resized = positions.resize_bias_table(table, old, new)
  assert resized.dtype == np.float32
  assert resized.shape == (2, (2 * new[0] - 1) * (2 * new[1] - 1) + 3, 3)
  np.testing.assert_array_equal(resized[:, -3:], table[:, -3:])
  places = [positions.geometric_offsets(o - 1, n - 1) for o, n in zip(old, new, strict=True)]
  wanted = [np.clip(np.arange(1 - n, n), place[0], place[-1]) for n, place in zip(new, places, strict=True)]
  for layer in range(2):
    for head in range(3):
      square = table[layer, :-3, head].reshape(rows, columns)
      expected = RectBivariateSpline(*places, square)(*wanted)
      np.testing.assert_allclose(resized[layer, :-3, head], expected.ravel(), atol=1e-5)


def test_bicubic_bias_tables_match_torch():
  torch = pytest.importorskip("torch")
  table = random(13 * 13 + 3, 3)
  resized = positions.resize_bias_table(table, (7, 7), (10, 9), method="bicubic")
  square = torch.from_numpy(table[:-3]).reshape(1, 13, 13, 3).permute(0, 3, 1, 2)
  theirs = torch.nn.functional.interpolate(square, size=(19, 17), mode="bicubic", align_corners=False)
  np.testing.assert_allclose(resized[:-3], theirs[0].permute(1, 2, 0).reshape(-1, 3), atol=1e-5)


@pytest.mark.parametrize("method", positions.BIAS_RESIZES)
def test_resizing_keeps_the_same_grid_and_constants(method):
  table = random(13 * 13 + 3, 3)
  assert positions.resize_bias_table(table, (7, 7), (7, 7), method=method) is table
  one_axis = positions.resize_bias_table(table, (7, 7), (7, 9), method=method)
  assert one_axis.shape == (13 * 17 + 3, 3)
  middle = lambda table, columns: table[:-3].reshape(13, columns, 3)[:, columns // 2]  # no horizontal offset
  np.testing.assert_allclose(middle(one_axis, 17), middle(table, 13), atol=1e-5)
  constant = np.full((13 * 13 + 3, 2), 1.5, np.float32)
  for grid in ((12, 12), (5, 9)):
    resized = positions.resize_bias_table(constant, (7, 7), grid, method=method)
    np.testing.assert_allclose(resized, 1.5, atol=1e-5)


def test_geometric_resize_keeps_a_smooth_function_of_near_offsets():
  """Up to 3 patches, a cubic keeps its values at the true distance; an even stretch would change them."""
  offset = np.arange(-13.0, 14.0)
  places = positions.geometric_offsets(13, 23)
  cubic = lambda y, x: (y / 10) ** 3 - x * y / 50 + 0.3
  table = np.concatenate([cubic(places[:, None], places[None, :]).ravel(), np.zeros(3)])[:, None]
  assert not np.allclose(places, offset)
  resized = positions.resize_bias_table(table.astype(np.float32), (14, 14), (24, 24))
  whole = np.arange(-23.0, 24.0)
  np.testing.assert_allclose(
    resized[:-3, 0].reshape(47, 47), cubic(whole[:, None], whole[None, :]), atol=1e-3
  )


def test_wrong_calls_are_refused():
  with pytest.raises(ValueError, match=r"'linear'.*geometric, bicubic"):
    positions.resize_bias_table(random(12, 1), (2, 2), (3, 3), method="linear")
  with pytest.raises(ValueError, match=r"11 rows .*\(2, 2\): 12 rows"):
    positions.resize_bias_table(random(11, 1), (2, 2), (3, 3))
