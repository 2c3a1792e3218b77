"""Masked pre-training on a frozen teacher's morphed tokens (Dynamic Token Morphing, arXiv 2401.00254)."""

import jax
import jax.numpy as jnp
import optax

from dtm_jax import masking, morphing, plugins, rngs
from dtm_jax.arrays import Array, Batch, Float, Int, Key, PyTree, RandomKey
from dtm_jax.augment import augment, normalize, to_float
from dtm_jax.errors import OptionError
from dtm_jax.models.vit import model as vit
from dtm_jax.models.vit import transfer as vit_transfer
from dtm_jax.normalizations import mean_and_std
from dtm_jax.tasks import Run, Scalars, State, Task, build_optimizer, build_teacher, teacher_input
from dtm_jax.tasks._online_probe import OnlineProbe
from dtm_jax.teachers import Teacher
from dtm_jax.training import pretrained


def build(config, run: Run) -> Task:
  """Sections read: data, augment, teacher, student, init_from, mask, morphers, loss, optim, probe.

  `init_from.path` names a run's workdir or weights that the student goes on from. With `probe.lr` the state
  has "probe", a linear classifier that learns beside the student and never moves it.

  Raises:
    OptionError: the student's patch grid is not the teacher's, and the message has both; or a probe of a data
      set without classes.
  """
  image_size = config.data.image_size
  teacher = build_teacher(config, config.student.get("patch_size", vit.Trunk.patch_size))
  student = vit.build(**config.student, out_dim=teacher.width)
  mean, std = mean_and_std(config.augment.normalization)
  grid = _shared_grid(student.patch_size, image_size, teacher)
  labels = _labels(config.morphers, config.loss.schedules)
  weights = {name: options.weight for name, options in config.morphers.items()}
  distance = dict(distance=config.loss.distance, normalize_target=config.loss.normalize_target)

  probe = _online_probe(config, student.width, run)

  params_shape = jax.eval_shape(lambda key: vit.init(student, key, image_size), jax.random.key(0))
  optimizer, learning_rate = build_optimizer(config.optim, params_shape, run)

  def init(key: RandomKey, params: PyTree | None = None) -> State:
    params = vit.init(student, key, image_size) if params is None else params
    state = {"params": params, "opt_state": optimizer.init(params), "step": jnp.int32(0)}
    return state | ({"probe": probe.init()} if probe else {})

  def train_step(state: State, frozen: PyTree, batch: Batch, key: RandomKey) -> tuple[State, Scalars]:
    """One update, in the order of the paper's figure."""
    step, batch_size = state["step"], len(batch["image"])
    each = lambda name: rngs.per_example(rngs.stream(key, name, step), batch_size)
    image = augment(
      each("augment"), batch["image"], flip=config.augment.flip, color_jitter=config.augment.color_jitter
    )

    target_BNC = teacher.tokens(frozen, teacher_input(teacher, image))
    target_BNC = jax.lax.stop_gradient(target_BNC)
    mask_BN = masking.masks(keys_B=each("mask"), grid=grid, **config.mask)
    label_SBN = labels(rngs.stream(key, "morph", step), target_BNC, image)

    def loss_fn(params: PyTree) -> tuple[Array, tuple[dict[str, Array], Array]]:
      output = student.apply(
        {"params": params}, normalize(image, mean, std), mask_BN, train=True,
        rngs={"drop_path": rngs.stream(key, "drop_path", step)},
      )  # fmt: skip
      losses = {
        f"loss_{name}": morphing.dtm_loss(output["prediction"], target_BNC, label, **distance)
        for name, label in label_SBN.items()
      }
      return sum(weights[name] * losses[f"loss_{name}"] for name in label_SBN), (losses, output["patches"])

    (loss, (losses, patches_BND)), grads = jax.value_and_grad(loss_fn, has_aux=True)(state["params"])
    updates, opt_state = optimizer.update(grads, state["opt_state"], state["params"])
    params = optax.apply_updates(state["params"], updates)

    groups = {
      f"groups_{name}": jax.vmap(morphing.num_groups)(label).mean() for name, label in label_SBN.items()
    }
    measurements = {
      "loss": loss, **losses, **groups,
      "learning_rate": learning_rate(step), "grad_norm": optax.tree.norm(grads),
    }  # fmt: skip
    after = {"params": params, "opt_state": opt_state, "step": step + 1}
    if probe:
      after["probe"], probed = probe.update(state["probe"], patches_BND.mean(axis=1), batch["label"])
      measurements |= probed
    return after, measurements

  def student_features(state: State, frozen: PyTree, batch: Batch) -> Float[Array, "B D"]:
    """The mean of the student's final patch tokens; no patch is hidden."""
    image = normalize(to_float(batch["image"]), mean, std)
    return student.apply({"params": state["params"]}, image)["patches"].mean(axis=1)

  def teacher_features(state: State, frozen: PyTree, batch: Batch) -> Float[Array, "B C"]:
    """The mean of the teacher's patch tokens."""
    return teacher_tokens(state, frozen, batch).mean(axis=1)

  def teacher_tokens(state: State, frozen: PyTree, batch: Batch) -> Float[Array, "B N C"]:
    return teacher.tokens(frozen, teacher_input(teacher, to_float(batch["image"])))

  def student_tokens(state: State, frozen: PyTree, batch: Batch) -> Float[Array, "B N C"]:
    """What the student says the teacher's tokens are; no patch is hidden."""
    image = normalize(to_float(batch["image"]), mean, std)
    return student.apply({"params": state["params"]}, image)["prediction"]

  def params_to_go_on_from(key: RandomKey) -> PyTree:
    given = pretrained.load(
      config.init_from.path, num_heads=student.num_heads, weights=config.init_from.get("weights")
    )
    return vit_transfer.to_student(given, vit.init(student, key, image_size), grid=grid)

  return Task(
    init=init,
    train_step=train_step,
    frozen=teacher.params,
    predict={
      "student": student_features,
      "teacher": teacher_features,
      "student_tokens": student_tokens,
      "teacher_tokens": teacher_tokens,
    },
    pretrained=params_to_go_on_from if config.init_from.path else None,
    needs_labels=probe is not None,
  )


def _online_probe(config, width: int, run: Run) -> OnlineProbe | None:
  if config.probe.lr is None:
    return None
  if run.class_names is None:
    raise OptionError(f"probe.lr={config.probe.lr}, but {config.data.dataset.name!r} has no class names.")
  return OnlineProbe(width, len(run.class_names), config.probe.lr)


def _shared_grid(patch_size: int, image_size: int, teacher: Teacher) -> tuple[int, int]:
  """The grid of patches of the student and the teacher, who may see different sizes of one picture."""
  grid = (image_size // patch_size,) * 2
  if grid != teacher.grid:
    raise OptionError(
      f"The student's patch grid {grid} (image {image_size}, patch {patch_size}) is not that of teacher "
      f"{teacher.name!r}: {teacher.grid} (image {teacher.image_size}, patch {teacher.patch_size}). They must "
      f"agree: --config.teacher.image_size={grid[0] * teacher.patch_size}, if this teacher can see another "
      f"size, or --config.data.image_size={teacher.grid[0] * patch_size}."
    )
  return grid


def _labels(morphers, num_schedules: int):
  """(key, target, image) -> {name: label_SBN}: S label maps from every morpher of the config."""
  assign = {
    name: plugins.build("morphers", {k: v for k, v in options.items() if k != "weight"})
    for name, options in morphers.items()
  }

  def labels(
    key: RandomKey, target_BNC: Float[Array, "B N C"], image: Float[Array, "B H W 3"]
  ) -> dict[str, Int[Array, "S B N"]]:
    def draw(name: str) -> Int[Array, "S B N"]:
      keys_S: Key[Array, "S"] = jax.random.split(rngs.stream(key, name), num_schedules)
      return jax.vmap(assign[name], (0, None, None))(keys_S, target_BNC, image)

    return {name: draw(name) for name in assign}

  return labels
