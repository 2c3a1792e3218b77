"""Count the floating-point operations per image from shapes: matrix products only, 2·m·k·n each.

A step is the teacher's forward pass and the student's forward and backward pass. The backward pass counts as
two forward passes; work that is repeated to save memory does not count. Matching and morphing are counted
separately, with all K rounds.
"""

from dtm_jax.models.vit import model as vit
from dtm_jax.teachers import Teacher


def tower(num_tokens: int, width: int, depth: int, mlp_width: int) -> int:
  """Return the operations of `depth` blocks of attention and MLP, forward."""
  projections = 4 * width * width + 2 * width * mlp_width
  return depth * (2 * num_tokens * projections + 4 * num_tokens**2 * width)


def embedding(num_patches: int, patch_size: int, width: int) -> int:
  """Return the operations of the patch embedding, forward."""
  return 2 * num_patches * patch_size**2 * 3 * width


def student_forward(model: vit.VisionTransformer, grid: tuple[int, int]) -> int:
  """Return the operations of the student with its head, forward."""
  patches, width = grid[0] * grid[1], model.width
  blocks = tower(1 + patches, width, model.depth, round(model.mlp_ratio * width))
  return blocks + embedding(patches, model.patch_size, width) + 2 * patches * width * (model.out_dim or 0)


def teacher_forward(teacher: Teacher) -> int:
  """Return the operations of a CLIP's image tower, from the shapes of its parameters.

  Raises:
    ValueError: the teacher is not a CLIP.
  """
  if not teacher.name.startswith("clip "):
    raise ValueError(f"The operations of teacher {teacher.name!r} are unknown: only a CLIP can be counted.")
  patches = teacher.grid[0] * teacher.grid[1]
  depth, width, mlp_width = teacher.params["blocks"]["mlp"]["fc1"]["kernel"].shape
  projection = 2 * patches * width * teacher.width if "projection" in teacher.params else 0
  blocks = tower(1 + patches, width, depth, mlp_width)
  return blocks + embedding(patches, teacher.patch_size, width) + projection


def morphing_and_loss(num_patches: int, channels: int, schedules: int, max_rounds: int) -> int:
  """Return the operations of bipartite matching, morphing and the loss with its gradient.

  In each round, one product compares the two halves of the tokens, and one product moves tokens. The sum also
  has the group means of student and target, and the gradient of the student's means.
  """
  one_round = 2 * (num_patches // 2) ** 2 * channels + 2 * num_patches**2 * channels
  return schedules * (max_rounds * one_round + 3 * 2 * num_patches**2 * channels)
