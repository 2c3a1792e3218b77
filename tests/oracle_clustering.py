"""Compute the clusterings of morphers/ in NumPy's float64, to test against, with explicit loops."""

import numpy as np


def refill(slot, distance, num_groups):
  """Give empty groups, in order, the tokens farthest from their centre that are not nearest to a centre."""
  slot = slot.copy()
  members = [np.flatnonzero(slot == i) for i in range(num_groups)]
  stay = {tokens[np.argmin(distance[tokens])] for tokens in members if len(tokens)}
  leave = [j for j in np.argsort(-distance, kind="stable") if j not in stay]
  for i in range(num_groups):
    if not len(members[i]):
      slot[leave.pop(0)] = i
  return slot


def kmeans(tokens, seeds, iterations):
  """Return the slots before the first iteration and after each."""
  unit = tokens / np.linalg.norm(tokens, axis=1, keepdims=True)
  centres, history = unit[seeds], []
  for _ in range(iterations + 1):
    distance = 1 - unit @ centres.T
    slot = refill(distance.argmin(1), distance.min(1), len(seeds))
    history.append(slot)
    centres = np.stack([unit[slot == i].sum(0) for i in range(len(seeds))])
    centres /= np.linalg.norm(centres, axis=1, keepdims=True)
  return history


def kmeans_objective(tokens, slot):
  """Return Σ_j 1 - cos(v_j, c_j), which is w minus the length of the sum for a group of w unit vectors."""
  unit = tokens / np.linalg.norm(tokens, axis=1, keepdims=True)
  return sum((slot == i).sum() - np.linalg.norm(unit[slot == i].sum(0)) for i in np.unique(slot))


def cosine_distance(tokens):
  unit = tokens / np.linalg.norm(tokens, axis=1, keepdims=True)
  distance = 1 - unit @ unit.T
  np.fill_diagonal(distance, 0)
  return distance


def kmedoids(tokens, seeds, iterations):
  distance, medoids, history = cosine_distance(tokens), np.array(seeds), []
  for _ in range(iterations + 1):
    slot = distance[medoids].argmin(0)
    slot[medoids] = np.arange(len(medoids))
    history.append(slot)
    members = [np.flatnonzero(slot == i) for i in range(len(medoids))]
    medoids = np.array([each[distance[np.ix_(each, each)].sum(1).argmin()] for each in members])
  return history


def kmedoids_objective(tokens, slot):
  """Return the sum of distances to the best medoid of each group."""
  distance = cosine_distance(tokens)
  groups = [np.flatnonzero(slot == i) for i in np.unique(slot)]
  return sum(distance[np.ix_(group, group)].sum(1).min() for group in groups)


def slic(color, seeds, grid, compactness, iterations):
  """Run the loop of Achanta et al. over centres and their windows, on patches and without connectivity."""
  rows, columns = grid
  place = np.stack(np.divmod(np.arange(rows * columns), columns), 1).astype(float)
  step = np.sqrt(rows * columns / len(seeds))
  centres = [(color[j], place[j]) for j in seeds]
  for _ in range(iterations + 1):
    best, slot = np.full(rows * columns, np.inf), np.full(rows * columns, -1)
    anywhere = np.array([_apart(color, place, *centre, compactness / step) for centre in centres])
    for i, (_, at) in enumerate(centres):
      for j in range(rows * columns):
        if np.abs(place[j] - at).max() <= step and anywhere[i, j] < best[j]:
          best[j], slot[j] = anywhere[i, j], i
    lost = slot < 0
    slot[lost], best[lost] = anywhere.argmin(0)[lost], anywhere.min(0)[lost]
    slot = refill(slot, best, len(seeds))
    centres = [(color[slot == i].mean(0), place[slot == i].mean(0)) for i in range(len(seeds))]
  return slot


def _apart(color, place, centre_color, centre_place, weight):
  return ((color - centre_color) ** 2).sum(1) + weight**2 * ((place - centre_place) ** 2).sum(1)
