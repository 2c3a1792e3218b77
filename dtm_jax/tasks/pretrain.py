"""Masked pre-training on a frozen teacher's morphed tokens (Dynamic Token Morphing, arXiv 2401.00254)."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax

from dtm_jax import augment, device_options, masking, morphing, partitions, plugins, rngs
from dtm_jax.arrays import Array, Batch, Bool, Float, Int, Key, PyTree, RandomKey
from dtm_jax.errors import OptionError
from dtm_jax.models.vit import model as vit
from dtm_jax.models.vit import transfer as vit_transfer
from dtm_jax.normalizations import Triple, mean_and_std
from dtm_jax.tasks import (
  Learner,
  Output,
  Pixels,
  Run,
  Scalars,
  State,
  StepKeys,
  Task,
  build_learner,
  build_teacher,
)
from dtm_jax.tasks._online_probe import OnlineProbe
from dtm_jax.teachers import Teacher
from dtm_jax.training import pretrained

Morpher = Callable[[RandomKey, Float[Array, "B N C"], Float[Array, "B H W 3"]], Int[Array, "B N"]]
"""(key, the teacher's tokens, images in [0, 1]) -> the group of each token."""


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Pretraining(Task):
  """The paper's figure: `teach`, `mask`, `group`, `predict`, `compare`. Profiles show these names.

  Attributes:
    noise: strength of the noise that is added to the teacher's tokens while training; see `add_noise`.
    grid: (rows, columns) of patches, which student and teacher share.
    augmentation: the options of `augment.augment`.
    normalization: mean and standard deviation of the student's input.
    mask_options: the options of `masking.masks`.
    morphers, weights: each morpher and its weight in the loss, by name.
    num_schedules: S, the label maps that each morpher draws in a step.
    distance: the options of `morphing.dtm_loss`.
    probe: a linear classifier that learns beside the student and never moves it; None without one.
    init_from: the section of the config.
  """

  teacher: Teacher
  noise: float
  student: vit.VisionTransformer
  image_size: int
  grid: tuple[int, int]
  augmentation: Mapping[str, Any]
  normalization: tuple[Triple, Triple]
  mask_options: Mapping[str, Any]
  morphers: Mapping[str, Morpher]
  weights: Mapping[str, Any]
  num_schedules: int
  distance: Mapping[str, Any]
  learner: Learner
  probe: OnlineProbe | None
  init_from: Mapping[str, Any]

  def init(self, key: RandomKey, params: PyTree | None = None) -> State:
    state = self.learner.init(self._init_params(key) if params is None else params)
    return state | ({"probe": self.probe.init()} if self.probe else {})

  def train_step(self, state: State, frozen: PyTree, batch: Batch, key: RandomKey) -> tuple[State, Scalars]:
    """Make one update, in the order of the paper's figure."""
    keys = StepKeys(key, state["step"], len(batch["image"]))
    image = self.augment(batch["image"], keys)
    target_BNC = self.add_noise(self.teach(frozen, image), keys)
    mask_BN = self.mask(keys)
    label_SBN = self.group(target_BNC, image, keys)

    def loss_fn(params: PyTree) -> tuple[Array, tuple[Scalars, Array]]:
      output = self.predict(params, image, mask_BN, keys)
      loss, losses = self.compare(output["prediction"], target_BNC, label_SBN)
      return loss, (losses, output["patches"])

    after, measurements, (losses, patches_BND) = self.learner.update(state, loss_fn)
    measurements |= losses | count_groups(label_SBN)
    if self.probe:
      with jax.named_scope("probe"):
        after["probe"], probed = self.probe.update(state["probe"], patches_BND.mean(axis=1), batch["label"])
      measurements |= probed
    return after, measurements

  @jax.named_scope("augment")
  def augment(self, image: Pixels, keys: StepKeys) -> Float[Array, "B H W 3"]:
    """Return the flipped and jittered images, values in [0, 1]. Student and teacher see the same ones."""
    return augment.augment(keys.per_example("augment"), image, **self.augmentation)

  @jax.named_scope("teach")
  def teach(self, frozen: PyTree, image: Float[Array, "B H W 3"]) -> Float[Array, "B N C"]:
    """Return the teacher's patch tokens v of images in [0, 1]."""
    return jax.lax.stop_gradient(self.teacher.apply(frozen, self.teacher.prepare(image)))

  @jax.named_scope("add_noise")
  def add_noise(self, target_BNC: Float[Array, "B N C"], keys: StepKeys) -> Float[Array, "B N C"]:
    """Return the teacher's tokens with the noise of `teacher.noise`, which is drawn for each image and step.

    The noise of a channel is `noise` times as strong as the channel's deviation over the tokens of the image.
    """
    if not self.noise:
      return target_BNC
    draw = lambda key: jax.random.normal(key, target_BNC.shape[1:])
    strength_B1C = self.noise * target_BNC.std(axis=1, keepdims=True)
    return target_BNC + strength_B1C * jax.vmap(draw)(keys.per_example("noise"))

  @jax.named_scope("mask")
  def mask(self, keys: StepKeys) -> Bool[Array, "B N"]:
    """Return which patches the student does not see."""
    return masking.masks(keys_B=keys.per_example("mask"), grid=self.grid, **self.mask_options)

  @jax.named_scope("group")
  def group(
    self, target_BNC: Float[Array, "B N C"], image: Float[Array, "B H W 3"], keys: StepKeys
  ) -> dict[str, Int[Array, "S B N"]]:
    """Return S label maps of every morpher, drawn on the teacher's tokens."""
    key = keys.stream("morph")

    def draw(name: str) -> Int[Array, "S B N"]:
      keys_S: Key[Array, " S"] = jax.random.split(rngs.stream(key, name), self.num_schedules)
      return jax.vmap(self.morphers[name], (0, None, None))(keys_S, target_BNC, image)

    return {name: draw(name) for name in self.morphers}

  @jax.named_scope("predict")
  def predict(
    self, params: PyTree, image: Float[Array, "B H W 3"], mask_BN: Bool[Array, "B N"], keys: StepKeys
  ) -> dict[str, Array]:
    """Return the student's view of masked images: "prediction" u [B, N, C] and "patches" [B, N, D]."""
    return self.student.apply(
      {"params": params}, augment.normalize(image, *self.normalization), mask_BN, train=True,
      rngs={"drop_path": keys.stream("drop_path")},
    )  # fmt: skip

  @jax.named_scope("compare")
  def compare(
    self,
    prediction_BNC: Float[Array, "B N C"],
    target_BNC: Float[Array, "B N C"],
    label_SBN: Mapping[str, Int[Array, "S B N"]],
  ) -> tuple[Float[Array, ""], Scalars]:
    """Morph both sides and return their distance: the weighted sum over morphers, and each "loss_<name>"."""
    losses = {
      f"loss_{name}": morphing.dtm_loss(prediction_BNC, target_BNC, label, **self.distance)
      for name, label in label_SBN.items()
    }
    return sum(self.weights[name] * losses[f"loss_{name}"] for name in label_SBN), losses

  @property
  def outputs(self) -> dict[str, Output]:
    return {
      "student": self.student_features,
      "teacher": self.teacher_features,
      "student_patches": self.student_patches,
      "student_tokens": self.student_tokens,
      "teacher_tokens": self.teacher_tokens,
    }

  def student_features(self, state: State, frozen: PyTree, batch: Batch) -> Float[Array, "B D"]:
    """Return the mean of the student's final patch tokens. No patch is hidden."""
    return self.student_patches(state, frozen, batch).mean(axis=1)

  def teacher_features(self, state: State, frozen: PyTree, batch: Batch) -> Float[Array, "B C"]:
    """Return the mean of the teacher's patch tokens."""
    return self.teacher_tokens(state, frozen, batch).mean(axis=1)

  def student_patches(self, state: State, frozen: PyTree, batch: Batch) -> Float[Array, "B N D"]:
    """Return the student's final patch tokens, before the head. No patch is hidden."""
    return self._student_output(state, batch)["patches"]

  def student_tokens(self, state: State, frozen: PyTree, batch: Batch) -> Float[Array, "B N C"]:
    """Return the student's prediction of the teacher's tokens. No patch is hidden."""
    return self._student_output(state, batch)["prediction"]

  def teacher_tokens(self, state: State, frozen: PyTree, batch: Batch) -> Float[Array, "B N C"]:
    """Return the teacher's patch tokens of images as they are in the data set."""
    return self.teach(frozen, augment.to_float(batch["image"]))

  def pretrained(self, key: RandomKey) -> PyTree | None:
    """Read the student of `init_from.path`, a run's workdir or weights."""
    options = self.init_from
    if not options["path"]:
      return None
    given = pretrained.load(options["path"], num_heads=self.student.num_heads, weights=options.get("weights"))
    return vit_transfer.to_student(given, self._init_params(key), grid=self.grid)

  def _init_params(self, key: RandomKey) -> PyTree:
    return vit.init(self.student, key, self.image_size)

  def _student_output(self, state: State, batch: Batch) -> dict[str, Array]:
    image = augment.normalize(augment.to_float(batch["image"]), *self.normalization)
    return self.student.apply({"params": state["params"]}, image)


def count_groups(label_SBN: Mapping[str, Int[Array, "S B N"]]) -> Scalars:
  """Return the mean number of groups of every morpher, "groups_<name>"."""
  return {
    f"groups_{name}": jax.vmap(partitions.num_groups)(label).mean() for name, label in label_SBN.items()
  }


def build(config: Any, run: Run) -> Pretraining:
  """Build the task from the sections data, augment, teacher, student, init_from, mask, morphers, loss, optim
  and probe.

  `init_from.path` names a run's workdir, or weights, from which the student goes on. With `probe.lr` the
  state has "probe", a linear classifier that learns beside the student.

  Raises:
    OptionError: student and teacher have different grids of patches, or a probe has no classes to learn.
  """
  config, _ = device_options.resolve(config)
  image_size = config.data.image_size
  teacher = build_teacher(config, config.student.get("patch_size", vit.Trunk.patch_size))
  student = vit.build(**config.student, out_dim=teacher.width)
  shapes = vit.init_shapes(student, image_size)
  return Pretraining(
    frozen=teacher.params,
    needs_labels=config.probe.lr is not None,
    teacher=teacher,
    noise=config.teacher.get("noise") or 0.0,
    student=student,
    image_size=image_size,
    grid=_shared_grid(student.patch_size, image_size, teacher),
    augmentation=dict(flip=config.augment.flip, color_jitter=config.augment.color_jitter),
    normalization=mean_and_std(config.augment.normalization),
    mask_options=dict(config.mask),
    morphers={
      name: plugins.build("morphers", {k: v for k, v in options.items() if k != "weight"})
      for name, options in config.morphers.items()
    },
    weights={name: options.weight for name, options in config.morphers.items()},
    num_schedules=config.loss.schedules,
    distance=dict(distance=config.loss.distance, normalize_target=config.loss.normalize_target),
    learner=build_learner(config.optim, shapes, run),
    probe=_online_probe(config, student.width, run),
    init_from=dict(config.init_from),
  )


def _online_probe(config: Any, width: int, run: Run) -> OnlineProbe | None:
  if config.probe.lr is None:
    return None
  if run.class_names is None:
    raise OptionError(f"probe.lr={config.probe.lr}, but {config.data.dataset.name!r} has no class names.")
  return OnlineProbe(width, len(run.class_names), config.probe.lr)


def _shared_grid(patch_size: int, image_size: int, teacher: Teacher) -> tuple[int, int]:
  """Return the grid of patches that student and teacher share. Their images may differ in size."""
  grid = (image_size // patch_size,) * 2
  if grid != teacher.grid:
    raise OptionError(
      f"The student's patch grid {grid} (image {image_size}, patch {patch_size}) is not that of teacher "
      f"{teacher.name!r}: {teacher.grid} (image {teacher.image_size}, patch {teacher.patch_size}). They must "
      f"agree: --config.teacher.image_size={grid[0] * teacher.patch_size}, if this teacher can see another "
      f"size, or --config.data.image_size={teacher.grid[0] * patch_size}."
    )
  return grid
