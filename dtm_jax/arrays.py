"""Define the letters of the axes and the types of arrays.

    B images         N patch tokens, without CLS         D student width
    C teacher width  H W pixels                          A attention heads
    K rounds         S schedules, label maps in a step   L layers
    G classes        T text tokens                       E joint width of image and text
    P prompts        Q queries                           R entries of a bank, heads of a probe
    J shards         V pixel values, 0 to 255            M slots of groups

and in matching/: F, X tokens of the first and the second set of a round; Z, N padded to whole TPU lanes.

Every public function states its shapes with these letters, as in `Float[Array, "B N D"]`. A single letter has
a space before it, `" B"`, so that linters don't take it for a name. The tests check the shapes at run time
with jaxtyping's pytest hook; production does not. In morphing and attention, names also carry their axes:
`sim_NN`, `label_BN`.

`mask` is True if a patch is hidden. `live` and `valid` are True if an entry counts. A `label` is the id of a
group.
"""

from typing import Any

import jax
from jaxtyping import Array, Bool, Float, Int, Key, Shaped, UInt8, UInt32

Batch = dict[str, Any]
"""Arrays with the same leading axis B: "image" (uint8 or float), and "label", "index", "valid"."""

PyTree = Any
"""Arrays in nested dicts, and in optax's named tuples."""

RandomKey = Key[Array, ""]
"""One typed key of `jax.random`."""

__all__ = [
  "Array", "Batch", "Bool", "Float", "Int", "Key", "PyTree", "RandomKey", "Shaped", "UInt8", "UInt32",
  "named_leaves", "path_name",
]  # fmt: skip


def named_leaves(tree: PyTree) -> dict[str, Any]:
  """Return the leaves of a tree by their names, such as "blocks/mlp/fc1/kernel"."""
  return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def path_name(path: tuple[Any, ...]) -> str:
  """Return the "/"-joined name of a path of `jax.tree_util`."""
  return jax.tree_util.keystr(path, simple=True, separator="/")
