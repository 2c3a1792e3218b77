"""Supervised training of a segmenter, from a pre-trained student or from scratch."""

import jax
import jax.numpy as jnp
import optax

from dtm_jax import rngs
from dtm_jax.arrays import Array, Batch, Float, Key, PyTree, RandomKey, UInt8
from dtm_jax.augment import augment, normalize, to_float
from dtm_jax.data.label_maps import IGNORE
from dtm_jax.errors import OptionError
from dtm_jax.models.vit import model as vit
from dtm_jax.models.vit import segmenter
from dtm_jax.models.vit import transfer as vit_transfer
from dtm_jax.models.vit.upernet import upsample
from dtm_jax.normalizations import mean_and_std
from dtm_jax.tasks import Run, Scalars, State, Task, build_optimizer
from dtm_jax.training import pretrained


def build(config, run: Run) -> Task:
  """Sections read: data, augment, model, init_from, loss, optim.

  `init_from.path` names a run's workdir or weights, of a student, a classifier or a segmenter. The state has
  "batch_stats", the running statistics of the heads' BatchNorms. `optim.frozen` = (patch_embed/.*, blocks/.*,
  cls_token, norm/.*) leaves a linear probe of the linear head. `predict` gives scores coarser than the image.

  Raises:
    OptionError: the data set has no class names, or data.view.crop is not "joint".
  """
  if run.class_names is None:
    raise OptionError(
      f"Data set {config.data.dataset.name!r} has no class names: there is nothing to segment."
    )
  if config.data.view.get("crop") != "joint":
    raise OptionError(f"data.view.crop={config.data.view.get('crop')!r}, but segmentation needs 'joint'.")
  num_classes, image_size = len(run.class_names), config.data.image_size
  model = segmenter.build(**config.model, num_classes=num_classes)
  mean, std = mean_and_std(config.augment.normalization)

  def init_params(key: RandomKey) -> PyTree:
    return vit.init(model, key, image_size)

  shapes = jax.eval_shape(init_params, jax.random.key(0))
  optimizer, learning_rate = build_optimizer(config.optim, shapes, run)

  def init(key: RandomKey, params: PyTree | None = None) -> State:
    params = init_params(key) if params is None else params
    statistics = segmenter.fresh_statistics(model, image_size)
    return {
      "params": params, "opt_state": optimizer.init(params), "batch_stats": statistics, "step": jnp.int32(0)
    }  # fmt: skip

  def train_step(state: State, frozen: PyTree, batch: Batch, key: RandomKey) -> tuple[State, Scalars]:
    """One update: augment, segment, cross-entropy at the size of the crop."""
    step, batch_size = state["step"], len(batch["image"])
    each = lambda name: rngs.per_example(rngs.stream(key, name, step), batch_size)
    image = augment(each("augment"), batch["image"], flip=0.0, color_jitter=config.augment.color_jitter)
    image, label_map = flip_together(each("flip"), image, batch["map"], config.augment.flip)
    image = normalize(image, mean, std)
    keys = {name: rngs.stream(key, name, step) for name in ("drop_path", "dropout")}

    def loss_fn(params: PyTree) -> tuple[Array, tuple]:
      variables = {"params": params, "batch_stats": state["batch_stats"]}
      outputs, updated = model.apply(variables, image, train=True, mutable=["batch_stats"], rngs=keys)
      loss, accuracy = cross_entropy(outputs["logits"], label_map)
      if "auxiliary" in outputs:
        loss += config.loss.auxiliary * cross_entropy(outputs["auxiliary"], label_map)[0]
      return loss, (accuracy, updated["batch_stats"])

    (loss, (accuracy, statistics)), grads = jax.value_and_grad(loss_fn, has_aux=True)(state["params"])
    updates, opt_state = optimizer.update(grads, state["opt_state"], state["params"])
    after = {
      "params": optax.apply_updates(state["params"], updates), "opt_state": opt_state,
      "batch_stats": statistics, "step": step + 1,
    }  # fmt: skip
    measurements = {
      "loss": loss, "batch_accuracy": accuracy, "learning_rate": learning_rate(step),
      "grad_norm": optax.tree.norm(grads),
    }  # fmt: skip
    return after, measurements

  def logits(state: State, frozen: PyTree, batch: Batch) -> Float[Array, "B h w G"]:
    image = normalize(to_float(batch["image"]), mean, std)
    variables = {"params": state["params"], "batch_stats": state["batch_stats"]}
    return model.apply(variables, image)["logits"]

  def params_to_start_from(key: RandomKey) -> PyTree:
    given = pretrained.load(
      config.init_from.path, num_heads=model.num_heads, weights=config.init_from.get("weights")
    )
    options = {name: value for name, value in config.init_from.items() if name not in ("path", "weights")}
    grid = (image_size // model.patch_size,) * 2
    return vit_transfer.to_finetune(given, jax.jit(init_params)(key), grid=grid, **options)

  return Task(
    init=init,
    train_step=train_step,
    frozen={},
    predict={"logits": logits},
    pretrained=params_to_start_from if config.init_from.path else None,
  )


def flip_together(
  keys_B: Key[Array, "B"], image: Float[Array, "B H W 3"], label_map: UInt8[Array, "B H W"], prob: float
) -> tuple[Float[Array, "B H W 3"], UInt8[Array, "B H W"]]:
  """Each image and its map mirrored left to right with probability `prob`."""
  flip_B = jax.vmap(lambda key: jax.random.bernoulli(key, prob))(keys_B)
  mirror = lambda x: jnp.where(flip_B.reshape((-1,) + (1,) * (x.ndim - 1)), x[:, :, ::-1], x)
  return mirror(image), mirror(label_map)


def cross_entropy(
  logits: Float[Array, "B h w G"], label_map: UInt8[Array, "B H W"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
  """Mean over the labelled pixels of the whole batch of -log softmax(scores)[label], and the accuracy there.

  The scores are those logits, bilinear at the size of the map.
  """
  scores = upsample(logits, label_map.shape[1:])
  valid = label_map != IGNORE
  label = jnp.where(valid, label_map, 0).astype(jnp.int32)
  count = jnp.maximum(valid.sum(), 1)
  loss = jnp.where(valid, optax.softmax_cross_entropy_with_integer_labels(scores, label), 0.0)
  right = valid & (jnp.argmax(scores, axis=-1) == label)
  return loss.sum() / count, right.sum() / count
