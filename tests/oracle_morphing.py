"""Compute dynamic token morphing in NumPy's float64, to test against: slowly, with lists that grow shorter.

It is written from the equations (docs/method.md), for one image at a time. A group is a list of its members.
"""

import numpy as np


def paper_merges(num_groups, rounds, num_tokens):
  each = (num_tokens - num_groups) // rounds
  return [each] * (rounds - 1) + [num_tokens - num_groups - (rounds - 1) * each]


def released_merges(merged, rounds, max_merged):
  each = int(np.ceil(merged / rounds))
  if each * rounds > max_merged:
    each = merged // rounds
  return [each] * rounds


def num_groups(merges, num_tokens, protect_first):
  """Return how many groups a schedule leaves. A round merges at most half of the live tokens."""
  for r in merges:
    num_tokens -= min(r, (num_tokens - protect_first) // 2)
  return num_tokens


def match(target, merges, order=None, protect_first=False, merged_feature="size_weighted"):
  """Return (label, margin): the groups of `target` [N, C] and the similarity gap of the closest decision.

  `order` [K, N] holds the numbers that sort the live tokens. Without it the split alternates.
  """
  features = [np.asarray(v, np.float64) for v in target]
  groups = [[j] for j in range(len(features))]
  margin = np.inf
  for p, r in enumerate(merges):
    if order is not None:
      places = np.argsort(order[p][: len(groups)], kind="stable")
      if protect_first:
        places = [0, *(i for i in places if i != 0)]
      features, groups = [features[i] for i in places], [groups[i] for i in places]
    first, second = range(0, len(groups), 2), range(1, len(groups), 2)
    r = min(r, (len(groups) - protect_first) // 2)
    if r == 0:
      continue

    similarity = cosine(np.stack([features[i] for i in first]), np.stack([features[j] for j in second]))
    sources = range(protect_first, len(first))
    falling = sorted(sources, key=lambda f: -similarity[f].max())
    best = {first[f]: second[np.argmax(similarity[f])] for f in sources}
    merging = [first[f] for f in falling[:r]]
    left = [first[f] for f in [0] * protect_first + falling[r:]]
    if protect_first:
      left.sort()
    margin = min(margin, closest_decision(similarity, falling, r, protect_first))

    into = {j: [j] + [i for i in merging if best[i] == j] for j in second}
    features = [features[i] for i in left] + [
      mean([features[i] for i in into[j]], [len(groups[i]) for i in into[j]], merged_feature) for j in second
    ]
    groups = [groups[i] for i in left] + [[m for i in into[j] for m in groups[i]] for j in second]

  label = np.zeros(len(target), np.int32)
  for members in groups:
    label[members] = min(members)
  return label, margin


def cosine(x, y):
  """[F, C], [S, C] -> [F, S]."""
  unit = lambda z: z / np.sqrt((z * z).sum(-1, keepdims=True))
  return unit(x) @ unit(y).T


def mean(features, sizes, merged_feature):
  weights = sizes if merged_feature == "size_weighted" else np.ones(len(sizes))
  return np.average(features, axis=0, weights=weights)


def closest_decision(similarity, falling, r, protect_first):
  """Return the smallest gap between a chosen similarity and the next one."""
  values = similarity[falling].max(1)
  order = values[:-1] - values[1:]
  if protect_first:
    order = order[r - 1 : r]  # without a protected token, the whole order decides the next split
  counterpart = np.diff(np.sort(similarity[falling[:r]], axis=1)[:, -2:]).ravel()
  return min(order.min(initial=np.inf), counterpart.min(initial=np.inf))


def morph(tokens, label):
  """Replace each token by the mean of its group, with w + 1e-6 as the denominator (docs/method.md, 3)."""
  tokens = np.asarray(tokens, np.float64)
  return np.stack([tokens[label == g].sum(0) / ((label == g).sum() + 1e-6) for g in label])


def distance(u, v, name):
  e = np.abs(u - v)
  if name == "smooth_l1":
    return np.where(e < 2, e**2 / 4, e - 1).mean(-1)
  if name == "l1":
    return e.mean(-1)
  if name == "l2":
    return (e**2).mean(-1)
  return 1 - np.diagonal(cosine(u, v))


def loss(student_BNC, target_BNC, label_SBN, name, normalize_target):
  values = []
  for label_BN in label_SBN:
    for u, v, label in zip(student_BNC, target_BNC, label_BN, strict=True):
      u, v = morph(u, label), morph(v, label)
      if normalize_target:
        v = (v - v.mean(-1, keepdims=True)) / np.sqrt(v.var(-1, keepdims=True, ddof=1) + 1e-6)
      values.append(distance(u, v, name).mean())
  return np.mean(values)
