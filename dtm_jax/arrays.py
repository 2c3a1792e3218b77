"""The letters of the axes, defined once.

    B images         N patch tokens (CLS never counted)   D student width
    C teacher width  H W pixels                           A attention heads
    K rounds         S schedules (label maps in a step)   L layers
    G classes        T text tokens

Every public function states its shapes with these letters, `Float[Array, "B N D"]`; the tests
check them at run time (jaxtyping's pytest hook), production never does.
In the heart and in attention a name also carries its axes: `sim_NN`, `label_BN`.

`mask` is True where a patch is hidden, `live` and `valid` are True where an entry counts, and a
`label` is the id of a group.
"""

from typing import Any

from jaxtyping import Array, Bool, Float, Int, Key, Shaped, UInt8

Batch = dict[str, Any]
"""Arrays that share their leading axis B: "image" (uint8 or float), and "label", "index", "valid"."""

PyTree = Any
"""Arrays in nested dicts; optax adds named tuples."""

RandomKey = Key[Array, ""]
"""One typed key of `jax.random`."""

__all__ = [
  "Array", "Batch", "Bool", "Float", "Int", "Key", "PyTree", "RandomKey", "Shaped", "UInt8",
]  # fmt: skip
