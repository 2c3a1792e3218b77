"""Supervised training of a classifier, from a pre-trained student or from scratch."""

import jax
import jax.numpy as jnp
import optax

from dtm_jax import rngs
from dtm_jax.arrays import Array, Batch, Float, PyTree, RandomKey
from dtm_jax.augment import augment, mix, normalize, random_erase, to_float
from dtm_jax.errors import OptionError
from dtm_jax.models.vit import classifier as vit_classifier
from dtm_jax.models.vit import model as vit
from dtm_jax.models.vit import transfer as vit_transfer
from dtm_jax.normalizations import mean_and_std
from dtm_jax.tasks import Run, Scalars, State, Task, build_optimizer, count_classes
from dtm_jax.training import pretrained


def build(config, run: Run) -> Task:
  """Sections read: data, augment, model, init_from, mix, loss, optim, ema.

  `init_from.path` names a run's workdir or weights, of a student or a classifier. With `ema.decay` the state
  has "ema", the parameters' exponential moving average, and `predict` has its "logits_ema".

  Raises:
    OptionError: the data set has no class names, or colour jitter comes on top of RandAugment.
  """
  num_classes, image_size = count_classes(config, run), config.data.image_size
  model = vit_classifier.build(**config.model, num_classes=num_classes)
  mean, std = mean_and_std(config.augment.normalization)
  decay, accumulate = config.ema.decay, config.optim.accumulate

  def init_params(key: RandomKey) -> PyTree:
    return vit.init(model, key, image_size)

  shapes = jax.eval_shape(init_params, jax.random.key(0))
  optimizer, learning_rate = build_optimizer(config.optim, shapes, run)

  def init(key: RandomKey, params: PyTree | None = None) -> State:
    params = init_params(key) if params is None else params
    state = {"params": params, "opt_state": optimizer.init(params), "step": jnp.int32(0)}
    return state | ({"ema": jax.tree.map(jnp.copy, params)} if decay else {})

  def train_step(state: State, frozen: PyTree, batch: Batch, key: RandomKey) -> tuple[State, Scalars]:
    """One update: augment, mix, classify, soft cross-entropy."""
    step, batch_size = state["step"], len(batch["label"])
    each = lambda name: rngs.per_example(rngs.stream(key, name, step), batch_size)
    image = augment(
      each("augment"), batch["image"], flip=config.augment.flip, color_jitter=config.augment.color_jitter
    )
    image = random_erase(each("erase"), normalize(image, mean, std), config.augment.erase_prob)
    target = optax.smooth_labels(jax.nn.one_hot(batch["label"], num_classes), config.loss.label_smoothing)
    image, target = mix(rngs.stream(key, "mix", step), image, target, **config.mix)

    def loss_fn(params: PyTree) -> tuple[Array, Array]:
      logits = model.apply(
        {"params": params}, image, train=True,
        rngs={"drop_path": rngs.stream(key, "drop_path", step)},
      )["logits"]  # fmt: skip
      return optax.softmax_cross_entropy(logits, target).mean(), logits

    (loss, logits), grads = jax.value_and_grad(loss_fn, has_aux=True)(state["params"])
    updates, opt_state = optimizer.update(grads, state["opt_state"], state["params"])
    params = optax.apply_updates(state["params"], updates)
    after = {"params": params, "opt_state": opt_state, "step": step + 1}
    if decay:
      updated = (step + 1) % accumulate == 0
      after["ema"] = optax.incremental_update(params, state["ema"], (1 - decay) * updated)

    measurements = {
      "loss": loss, "batch_accuracy": jnp.mean(jnp.argmax(logits, axis=1) == jnp.argmax(target, axis=1)),
      "learning_rate": learning_rate(step), "grad_norm": optax.tree.norm(grads),
    }  # fmt: skip
    return after, measurements

  def predict(weights: str, output: str):
    def function(state: State, frozen: PyTree, batch: Batch) -> Float[Array, "B _"]:
      image = normalize(to_float(batch["image"]), mean, std)
      return model.apply({"params": state[weights]}, image)[output]

    return function

  def params_to_start_from(key: RandomKey) -> PyTree:
    given = pretrained.load(
      config.init_from.path, num_heads=model.num_heads, weights=config.init_from.get("weights")
    )
    options = {name: value for name, value in config.init_from.items() if name not in ("path", "weights")}
    grid = (image_size // model.patch_size,) * 2
    try:
      return vit_transfer.to_finetune(given, jax.jit(init_params)(key), grid=grid, **options)
    except ValueError as error:
      raise OptionError(f"init_from.path={config.init_from.path}: {error}") from error

  return Task(
    init=init,
    train_step=train_step,
    frozen={},
    predict={"logits": predict("params", "logits"), "features": predict("params", "features")}
    | ({"logits_ema": predict("ema", "logits")} if decay else {}),
    pretrained=params_to_start_from if config.init_from.path else None,
    needs_labels=True,
  )
