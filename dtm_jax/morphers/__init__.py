"""Ways of morphing: one module each, `build(**options) -> assign`, named in `config.morphers`.

    assign(key, tokens_BNC, images_BHW3) -> label_BN

partitions the patch tokens of each image. `tokens_BNC` are the teacher's, `images_BHW3` what the teacher saw.
label[b, j], int32, is the id of the group that owns token j, and the id of a group is its smallest member.
`assign` is a pure function of its arguments, of static shape, traced once; a morpher ignores what it does
not need. `build` refuses unknown options and senseless values.
"""

from collections.abc import Callable

from dtm_jax.arrays import Array

Assign = Callable[[Array, Array, Array], Array]
