"""Write partitions of an image's tokens into groups as one integer for each token.

label[b, j] is the id of the group that owns token j of image b, from 0 to N-1. The paper's partition
M ∈ {0,1}^{n̄×N} is the one-hot form of the label. In canonical form, the id of a group is its smallest member:

    tokens 0 and 2, 1 and 4, 3 alone        label = [0, 1, 0, 3, 1]
"""

import jax.numpy as jnp

from dtm_jax.arrays import Array, Bool, Int


def canonical_labels(label_BN: Int[Array, "B N"]) -> Int[Array, "B N"]:
  """Return the same partition with every group named by its smallest member, as int32.

  >>> canonical_labels(jnp.array([[7, 4, 7, 3, 4]])).tolist()
  [[0, 1, 0, 3, 1]]
  """
  return jnp.argmax(same_group(label_BN), axis=2).astype(jnp.int32)


def group_sizes(label_BN: Int[Array, "B N"]) -> Int[Array, "B N"]:
  """Return w_i, the number of tokens in the group with id i. It is 0 if no group has this id.

  >>> group_sizes(jnp.array([[0, 1, 0, 3, 1]])).tolist()
  [[2, 2, 0, 1, 0]]
  """
  return (label_BN[:, None, :] == jnp.arange(label_BN.shape[1])[None, :, None]).sum(axis=2)


def num_groups(label_BN: Int[Array, "B N"]) -> Int[Array, " B"]:
  """Return n̄, the number of groups of each image.

  >>> num_groups(jnp.array([[0, 1, 0, 3, 1], [0, 0, 0, 0, 0]])).tolist()
  [3, 1]
  """
  return (group_sizes(label_BN) > 0).sum(axis=1)


def same_group(label_BN: Int[Array, "B N"]) -> Bool[Array, "B N N"]:
  """Return True for every pair of tokens that share a group.

  >>> same_group(jnp.array([[0, 1, 0]])).tolist()
  [[[True, False, True], [False, True, False], [True, False, True]]]
  """
  return label_BN[:, :, None] == label_BN[:, None, :]
