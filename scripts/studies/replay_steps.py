"""Train a student for a few steps on given inputs, to compare it with another implementation step by step.

    python scripts/replay_steps.py inputs.npz outputs.npz [--clip=FOLDER] [--clip_norm=3.0] [--betas=0.9,0.98]

Nothing is random: the inputs contain images, masks, schedules and targets, and the script uses neither drop
path nor augmentation. Model, matching, loss and update are the code of pre-training.

inputs.npz, for S steps of B images with N patches; float32 unless another type is given:

    param/NAME        the student's initial weights under the authors' names, `lm_head` included
    images            [S, B, H, W, 3], normalised for the student; or images_chw [S, B, 3, H, W]
    masks             [S, B, N] bool, True where the patch is hidden from the student
    targets           [S, B, N, C], the teacher's tokens. With --clip they may be missing: then the projected
                      patch tokens of that CLIP are the targets
    r, k              [S, L] int: k rounds of r merges for each of L schedules (the released code has two); or
                      n, k: n tokens to merge in k rounds, from which the released rule computes r
    lr, weight_decay  [S], the values at each step

outputs.npz:

    loss, grad_norm   [S], before the update; the norm before gradient clipping
    labels            [S, L, B, N] int32, the smallest member of each token's group
    param/NAME        the weights after the last step
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dtm_jax import morphing
from dtm_jax.arrays import Array, PyTree
from dtm_jax.errors import OptionError
from dtm_jax.models.vit import config as vit_config
from dtm_jax.models.vit import weights as vit_weights
from dtm_jax.models.vit.model import VisionTransformer
from dtm_jax.options.command_line import run_script, script_parser
from dtm_jax.teachers import clip
from dtm_jax.training import optim

PARAM = "param/"


def replay(
  inputs: dict[str, np.ndarray],
  *,
  clip_folder: str | None = None,
  num_heads: int | None = None,
  betas: Sequence[float] = (0.9, 0.999),
  eps: float = 1e-8,
  clip_norm: float | None = None,
  split: str = "alternate",
  protect_first: bool = True,
  merged_feature: str = "size_weighted",
  distance: str = "smooth_l1",
  normalize_target: bool = False,
) -> dict[str, np.ndarray]:
  """Train the steps that `inputs` describe, and return the outputs. The module's docstring lists all keys.

  Args:
    clip_folder: a CLIP that gives the targets, its projected patch tokens.
    num_heads: number of attention heads, for a student without relative position tables.
    betas, eps, clip_norm: options of `optim.make_update`.
    split, protect_first, merged_feature: options of `morphing.bipartite_match`. The defaults are the
      released ones.
    distance, normalize_target: options of `morphing.dtm_loss`.

  Raises:
    OptionError: inputs are missing.
    ValueError: weights do not match.
  """
  images, targets = _images_and_targets(inputs, clip_folder)
  tensors = {name.removeprefix(PARAM): x for name, x in inputs.items() if name.startswith(PARAM)}
  shapes = {name: tensor.shape for name, tensor in tensors.items()}
  student, _ = vit_config.describe(shapes, num_heads=num_heads)
  params = vit_weights.from_authors(tensors, source="param/", num_heads=num_heads)
  lr, weight_decay = (jnp.asarray(inputs[name], jnp.float32) for name in ("lr", "weight_decay"))
  optimizer = optim.make_update(
    params, lambda step: lr[step], betas=betas, eps=eps, clip_norm=clip_norm,
    weight_decay=lambda step: weight_decay[step],
  )  # fmt: skip
  match = functools.partial(
    morphing.bipartite_match, split=split, protect_first=protect_first, merged_feature=merged_feature
  )
  loss = functools.partial(morphing.dtm_loss, distance=distance, normalize_target=normalize_target)
  step = jax.jit(_make_step(student, optimizer, match, loss))
  opt_state, history = optimizer.init(params), []
  masks, merges = inputs["masks"].astype(bool), merges_of(inputs, num_tokens=targets.shape[2])
  with jax.default_matmul_precision("highest"):
    for each in zip(images, masks, targets, merges, strict=True):
      params, opt_state, measurements = step(params, opt_state, *map(jnp.asarray, each))
      history.append(jax.device_get(measurements))
  outputs = {name: np.stack([at_step[name] for at_step in history]) for name in history[0]}
  final = vit_weights.to_authors(jax.device_get(params))
  return outputs | {PARAM + name: np.ascontiguousarray(tensor) for name, tensor in final.items()}


def _make_step(
  student: VisionTransformer,
  optimizer: optax.GradientTransformation,
  match: Callable[..., Array],
  loss_of: Callable[..., Array],
) -> Callable[..., tuple[PyTree, PyTree, dict[str, Array]]]:
  """Return a function of one step: parameters, optimiser state and inputs -> both, updated, and outputs."""

  def loss_fn(params: PyTree, image: Array, mask_BN: Array, target_BNC: Array, label_SBN: Array) -> Array:
    student_BNC = student.apply({"params": params}, image, mask_BN)["prediction"]
    return loss_of(student_BNC, target_BNC, label_SBN)

  def step(
    params: PyTree, opt_state: PyTree, image: Array, mask_BN: Array, target_BNC: Array, merges_SK: Array
  ) -> tuple[PyTree, PyTree, dict[str, Array]]:
    label_SBN = jnp.stack([match(target_BNC, merges_K) for merges_K in merges_SK])
    loss, grads = jax.value_and_grad(loss_fn)(params, image, mask_BN, target_BNC, label_SBN)
    updates, opt_state = optimizer.update(grads, opt_state, params)
    measurements = {"loss": loss, "grad_norm": optax.tree.norm(grads), "labels": label_SBN}
    return optax.apply_updates(params, updates), opt_state, measurements

  return step


def merges_of(inputs: dict[str, np.ndarray], num_tokens: int) -> np.ndarray:
  """Return the number of tokens that each of K = max(k) rounds merges, [S, L, K]."""
  rounds = inputs["k"].astype(np.int32)
  max_rounds = int(rounds.max())
  if "r" in inputs:
    return np.where(np.arange(max_rounds) < rounds[..., None], inputs["r"][..., None], 0).astype(np.int32)
  rule = lambda n, k: morphing.released_merges(jnp.int32(n), jnp.int32(k), num_tokens, max_rounds)
  merges = [rule(n, k) for n, k in zip(inputs["n"].ravel(), rounds.ravel(), strict=True)]
  return np.stack(merges).reshape(*rounds.shape, max_rounds)


def _images_and_targets(
  inputs: dict[str, np.ndarray], clip_folder: str | None
) -> tuple[np.ndarray, np.ndarray]:
  """Return the images [S, B, H, W, 3] and the targets [S, B, N, C]."""
  given = set(inputs)
  alternatives = [
    (f"{PARAM}lm_head.weight",),
    ("images", "images_chw"),
    ("masks",),
    ("k",),
    ("r", "n"),
    ("lr",),
    ("weight_decay",),
  ]
  if clip_folder is None:
    alternatives.append(("targets",))
  if missing := [" or ".join(names) for names in alternatives if not given & set(names)]:
    raise OptionError(f"The inputs lack {', '.join(missing)}.")
  images = inputs["images"] if "images" in inputs else np.moveaxis(inputs["images_chw"], 2, -1)
  if "targets" in inputs:
    return images, inputs["targets"]
  assert clip_folder is not None  # otherwise "targets" would be missing
  teacher = clip.build(clip_folder)
  with jax.default_matmul_precision("highest"):
    tokens = jax.jit(lambda image: teacher.apply(teacher.params, image))
    return images, np.stack([tokens(jnp.asarray(image)) for image in images])


def _two_floats(text: str) -> tuple[float, float]:
  first, second = map(float, text.split(","))  # argparse reports the ValueError with the flag and the text
  return first, second


def main(argv: Sequence[str] | None = None) -> None:
  """Run the command line of the module's docstring."""
  parser = script_parser(__doc__)
  add = parser.add_argument
  add("inputs", help="the file inputs.npz")
  add("outputs", help="the file to write")
  add("--clip", help="folder of a CLIP that gives the targets")
  add("--betas", type=_two_floats, default=(0.9, 0.999), metavar="B1,B2", help="of AdamW")
  add("--eps", type=float, default=1e-8, help="of AdamW")
  add("--clip_norm", type=float, help="largest norm of the gradient (default: no clipping)")
  add("--distance", default="smooth_l1", choices=list(morphing.DISTANCES), help="of the loss")
  add("--normalize_target", action="store_true", help="standardise the morphed targets")
  args = parser.parse_args(argv)
  with np.load(args.inputs) as file:
    inputs = dict(file)
  outputs = replay(
    inputs, clip_folder=args.clip, betas=args.betas, eps=args.eps, clip_norm=args.clip_norm,
    distance=args.distance, normalize_target=args.normalize_target,
  )  # fmt: skip
  np.savez(args.outputs, allow_pickle=False, **outputs)
  for number, (loss, norm) in enumerate(zip(outputs["loss"], outputs["grad_norm"], strict=True), start=1):
    print(f"step {number}: loss {loss:.7f}, gradient norm {norm:.7f}")


if __name__ == "__main__":
  run_script(main)
