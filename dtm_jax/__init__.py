"""Pre-train vision transformers with Dynamic Token Morphing and frozen teachers, in JAX.

    import dtm_jax

    teacher = dtm_jax.load_teacher("clip", "openai/clip-vit-base-patch16")
    target_BNC = teacher.tokens(image_BHW3)                            # uint8, or float from 0 to 1
    merges_K = dtm_jax.paper_schedule(key, num_tokens=196, min_groups=1, max_rounds=14)
    label_BN = dtm_jax.bipartite_match(target_BNC, merges_K)           # the group of each patch
    loss = dtm_jax.dtm_loss(student_BNC, target_BNC, label_BN[None])
    dtm_jax.draw_groups(image_BHW3, label_BN).savefig("groups.png")

`import dtm_jax` is fast: it imports JAX only when one of these names is first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from dtm_jax.morphing import (
    bipartite_match,
    dtm_loss,
    morph,
    paper_merges,
    paper_schedule,
    released_merges,
    released_schedule,
  )
  from dtm_jax.pictures import draw_groups
  from dtm_jax.teachers import Teacher

__version__ = "0.1.0"
_MODULES = {"Teacher": "dtm_jax.teachers", "draw_groups": "dtm_jax.pictures"}
"""The modules of the names that `dtm_jax.morphing` does not define."""

__all__ = [
  "Teacher",
  "__version__",
  "bipartite_match",
  "draw_groups",
  "dtm_loss",
  "load_teacher",
  "morph",
  "paper_merges",
  "paper_schedule",
  "released_merges",
  "released_schedule",
]


def load_teacher(name: str, path: str | None = None, **options: Any) -> "Teacher":
  """Return a frozen teacher, such as `load_teacher("clip", "openai/clip-vit-base-patch16")`.

  >>> teacher = load_teacher("clip", "assets/tiny_clip_cifar10", tokens="normalized")
  >>> teacher.image_size, teacher.patch_size, teacher.width
  (32, 4, 96)

  Args:
    name: a module of `dtm_jax.teachers`: beit, checkpoint, clip, dinov2, mae or siglip.
    path: a file, a folder or a repository of the hub. None uses the teacher's default, if it has one.
    options: further arguments of the `build` function of that module.

  Raises:
    OptionError: there is no such teacher or no such option, or an option has a value that is not allowed.
    NotThereError: there are no such weights.
  """
  from dtm_jax import errors, plugins

  for option in options:
    errors.check_choice(f"option of the teacher {name}:", option, plugins.options_of("teachers", name))
  return plugins.build("teachers", {"name": name, "path": path, **options})


def __getattr__(name: str) -> Any:
  """Import the module that defines `name` when the name is first used (PEP 562)."""
  if name not in __all__:
    raise AttributeError(f"module 'dtm_jax' has no attribute {name!r}")
  module = importlib.import_module(_MODULES.get(name, "dtm_jax.morphing"))
  globals()[name] = getattr(module, name)
  return globals()[name]


def __dir__() -> list[str]:
  return sorted({*globals(), *__all__})
