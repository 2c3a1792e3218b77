"""Trains a student for a few steps on given inputs, to compare with another implementation step by step.

    python scripts/replay_steps.py inputs.npz outputs.npz [--clip=FOLDER] [--clip_norm=3.0] [--betas=0.9,0.98]

Nothing is drawn: images, masks, schedules and targets are given, and there is no drop path and no
augmentation. The model, the matching, the loss and the update are those of pre-training.

inputs.npz, float32 unless said otherwise, S steps of B images with N = patches:

    param/NAME        the student's initial weights under the authors' names, `lm_head` included
    images            [S, B, H, W, 3], normalised as the student gets them; or images_chw [S, B, 3, H, W]
    masks             [S, B, N] bool, True where the patch is hidden from the student
    targets           [S, B, N, C] the teacher's tokens; may be absent with --clip, whose projected patch
                      tokens of the same images are then the targets
    r, k              [S, L] int: for each of L schedules (two, as released) k rounds of r merges each; or
                      n, k: n tokens to merge in k rounds by the released rule, which gives r
    lr, weight_decay  [S]: in force at each step

outputs.npz:

    loss, grad_norm   [S]: before the update; the norm is that before clipping
    labels            [S, L, B, N] int32: the group of each token, named by its smallest member
    param/NAME        the weights after the last step
"""

import argparse
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dtm_jax import morphing
from dtm_jax.arrays import Array, Float, Int, PyTree
from dtm_jax.models.vit import config as vit_config
from dtm_jax.models.vit import weights as vit_weights
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
  """The outputs of the steps that `inputs` describe (the module's docstring has all keys).

  Args:
    clip_folder: a CLIP whose projected patch tokens are the targets.
    num_heads: only of a student without tables of relative positions.
    betas, eps, clip_norm: of `optim.make_update`.
    split, protect_first, merged_feature: of `morphing.bipartite_match`; as released.
    distance, normalize_target: of `morphing.dtm_loss`.

  Raises:
    ValueError: inputs are missing, or weights do not match.
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

  def label_maps(target_BNC: Float[Array, "B N C"], merges_SK: Int[Array, "S K"]) -> Int[Array, "S B N"]:
    match = lambda merges_K: morphing.bipartite_match(
      target_BNC, merges_K, split=split, protect_first=protect_first, merged_feature=merged_feature
    )
    return jnp.stack([match(merges_K) for merges_K in merges_SK])

  def loss_fn(params: PyTree, image: Array, mask_BN: Array, target_BNC: Array, label_SBN: Array) -> Array:
    student_BNC = student.apply({"params": params}, image, mask_BN)["prediction"]
    return morphing.dtm_loss(
      student_BNC, target_BNC, label_SBN, distance=distance, normalize_target=normalize_target
    )

  @jax.jit
  def step(
    params: PyTree, opt_state: PyTree, image: Array, mask_BN: Array, target_BNC: Array, merges_SK: Array
  ):
    label_SBN = label_maps(target_BNC, merges_SK)
    loss, grads = jax.value_and_grad(loss_fn)(params, image, mask_BN, target_BNC, label_SBN)
    updates, opt_state = optimizer.update(grads, opt_state, params)
    measurements = {"loss": loss, "grad_norm": optax.tree.norm(grads), "labels": label_SBN}
    return optax.apply_updates(params, updates), opt_state, measurements

  opt_state, history = optimizer.init(params), []
  masks, merges = inputs["masks"].astype(bool), merges_of(inputs, num_tokens=targets.shape[2])
  with jax.default_matmul_precision("highest"):
    for each in zip(images, masks, targets, merges, strict=True):
      params, opt_state, measurements = step(params, opt_state, *map(jnp.asarray, each))
      history.append(jax.device_get(measurements))
  outputs = {name: np.stack([at_step[name] for at_step in history]) for name in history[0]}
  final = vit_weights.to_authors(jax.device_get(params))
  return outputs | {PARAM + name: np.ascontiguousarray(tensor) for name, tensor in final.items()}


def merges_of(inputs: dict[str, np.ndarray], num_tokens: int) -> np.ndarray:
  """[S, L, K]: how many tokens each of K = max(k) rounds merges."""
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
    raise ValueError(f"The inputs lack {', '.join(missing)}.")
  images = inputs["images"] if "images" in inputs else np.moveaxis(inputs["images_chw"], 2, -1)
  if "targets" in inputs:
    return images, inputs["targets"]
  teacher = clip.build(clip_folder)
  with jax.default_matmul_precision("highest"):
    tokens = jax.jit(lambda image: teacher.tokens(teacher.params, image))
    return images, np.stack([tokens(jnp.asarray(image)) for image in images])


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("inputs")
  parser.add_argument("outputs")
  parser.add_argument("--clip", help="folder of a CLIP, for the targets")
  parser.add_argument("--betas", type=lambda text: tuple(map(float, text.split(","))), default=(0.9, 0.999))
  parser.add_argument("--eps", type=float, default=1e-8)
  parser.add_argument("--clip_norm", type=float)
  parser.add_argument("--distance", default="smooth_l1", choices=list(morphing.DISTANCES))
  parser.add_argument("--normalize_target", action="store_true")
  args = parser.parse_args()
  with np.load(args.inputs) as file:
    inputs = dict(file)
  outputs = replay(
    inputs, clip_folder=args.clip, betas=args.betas, eps=args.eps, clip_norm=args.clip_norm,
    distance=args.distance, normalize_target=args.normalize_target,
  )  # fmt: skip
  np.savez(args.outputs, **outputs)
  for number, (loss, norm) in enumerate(zip(outputs["loss"], outputs["grad_norm"], strict=True), start=1):
    print(f"step {number}: loss {loss:.7f}, gradient norm {norm:.7f}")


if __name__ == "__main__":
  main()
