"""Data sets: one module for each. `data.dataset.name` in a config is the module's name.

A module has two functions with the same options:

    build(split, **options) -> data.Dataset     opens a split
    splits(**options) -> tuple of names         returns the names of the splits

Both functions take `data_dir`, the folder of the files. None means the default folder. `sliceable` lets
`build` open a part of a split, in TFDS's notation: "train[:90%]", "train[45000:]". A module whose name starts
with _ is not a data set. This is a complete one, datasets/colors.py:

    \"\"\"Squares of one colour.\"\"\"

    import numpy as np

    from dtm_jax.data import Dataset
    from dtm_jax.datasets import sliceable
    from dtm_jax.errors import check_choice

    COLORS = {"red": (200, 40, 40), "green": (40, 200, 40), "blue": (40, 40, 200)}
    SPLITS = {"train": 300, "val": 30}

    @sliceable
    def build(split: str = "train", *, data_dir: str | None = None, side: int = 32) -> Dataset:
      check_choice("split of colors", split, SPLITS)
      labels = np.arange(SPLITS[split]) % len(COLORS)
      squares = [np.full((side, side, 3), color, np.uint8) for color in COLORS.values()]
      examples = [{"image": squares[k], "label": k, "name": f"{split}/{i}"} for i, k in enumerate(labels)]
      return Dataset("colors", len(examples), tuple(COLORS), examples, image_size=side, labels=labels)

    def splits(**options) -> tuple[str, ...]:
      return tuple(SPLITS)

Here all examples are in memory. A data set of files replaces the list by a class with `__len__` and
`__getitem__`, which reads one file at a time; see folder.py.
"""

from dtm_jax.datasets._parts import evenly, is_part, sliceable, spread
from dtm_jax.datasets._splits import evaluation_split

__all__ = ["evaluation_split", "evenly", "is_part", "sliceable", "spread"]
