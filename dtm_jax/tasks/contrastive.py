"""Contrastive language-image training (CLIP, arXiv 2103.00020) on a labelled set.

A caption is a prompt template with the name of the image's class: label supervision in text form. Images of
one class are therefore not each other's negatives; every image and caption of a batch that share the class
are a positive pair (UniCL, arXiv 2204.03610).
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dtm_jax import rngs
from dtm_jax.arrays import Array, Batch, Float, Int, PyTree, RandomKey
from dtm_jax.augment import augment, normalize, to_float
from dtm_jax.models.clip import model as clip
from dtm_jax.models.clip import prompts
from dtm_jax.models.clip.tokenizer import Tokenizer, special_ids, word_tokenizer
from dtm_jax.normalizations import mean_and_std
from dtm_jax.tasks import Run, Scalars, State, Task, build_optimizer


def build(config, run: Run) -> Task:
  """Sections read: data, augment, clip, text, optim."""
  dataset = f"data set {config.data.dataset.name!r}"
  captions_GP = prompts.captions(run.class_names, config.text.prompts, dataset=dataset)
  tokenize = word_tokenizer(itertools.chain(*captions_GP), config.text.context_length)
  tokens_GPT = np.stack([tokenize(captions_P) for captions_P in captions_GP])
  model = clip.CLIP(
    clip_config(config, tokenize), dtype=config.clip.dtype, patch_dropout=config.clip.patch_dropout
  )
  mean, std = mean_and_std(config.augment.normalization)

  def init_params(key: RandomKey) -> PyTree:
    image = jnp.zeros((1, config.data.image_size, config.data.image_size, 3))
    return model.init(key, image, jnp.asarray(tokens_GPT[0, :1]))["params"]

  shapes = jax.eval_shape(init_params, jax.random.key(0))
  optimizer, learning_rate = build_optimizer(config.optim, shapes, run)

  def init(key: RandomKey, params: PyTree | None = None) -> State:
    params = init_params(key) if params is None else params
    return {"params": params, "opt_state": optimizer.init(params), "step": jnp.int32(0)}

  def train_step(state: State, frozen: PyTree, batch: Batch, key: RandomKey) -> tuple[State, Scalars]:
    step, label_B = state["step"], batch["label"]
    batch_size = len(label_B)
    key_B = rngs.per_example(rngs.stream(key, "augment", step), batch_size)
    image = augment(key_B, batch["image"], flip=config.augment.flip, color_jitter=config.augment.color_jitter)
    prompt_B = jax.random.randint(rngs.stream(key, "prompt", step), (batch_size,), 0, tokens_GPT.shape[1])

    tokens_BT = jnp.asarray(tokens_GPT)[label_B, prompt_B]

    def loss_fn(params: PyTree) -> tuple[Array, Array]:
      image_BP, text_BP, logit_scale = model.apply(
        {"params": params}, normalize(image, mean, std), tokens_BT, train=True,
        rngs={"patch_dropout": rngs.stream(key, "patch_dropout", step)},
      )  # fmt: skip
      logits_BB = jnp.exp(logit_scale) * unit(image_BP) @ unit(text_BP).T
      return unicl_loss(logits_BB, label_B), jnp.mean(label_B[jnp.argmax(logits_BB, axis=1)] == label_B)

    (loss, accuracy), grads = jax.value_and_grad(loss_fn, has_aux=True)(state["params"])
    updates, opt_state = optimizer.update(grads, state["opt_state"], state["params"])
    params = optax.apply_updates(state["params"], updates)
    measurements = {
      "loss": loss, "batch_accuracy": accuracy, "logit_scale": params["logit_scale"],
      "learning_rate": learning_rate(step), "grad_norm": optax.tree.norm(grads),
    }  # fmt: skip
    return {"params": params, "opt_state": opt_state, "step": step + 1}, measurements

  def image(state: State, frozen: PyTree, batch: Batch) -> Float[Array, "B P"]:
    pixels = normalize(to_float(batch["image"]), mean, std)
    return model.apply({"params": state["params"]}, pixels, method="encode_image")

  def text(state: State, frozen: PyTree, batch: Batch) -> Float[Array, "B P"]:
    return model.apply({"params": state["params"]}, batch["tokens"], method="encode_text")

  return Task(
    init=init,
    train_step=train_step,
    frozen={},
    predict={"image": image, "text": text},
    tokenize=tokenize,
    needs_labels=True,
  )


def unicl_loss(logits_BB: Float[Array, "B B"], label_B: Int[Array, "B"]) -> Float[Array, ""]:
  """½ (CE(rows) + CE(columns)) of images against captions, the target spread over all pairs of one class.

  With every label its own this is CLIP's loss.
  """
  same_BB = (label_B[:, None] == label_B[None, :]).astype(logits_BB.dtype)
  target_BB = same_BB / same_BB.sum(axis=1, keepdims=True)
  by_image = optax.softmax_cross_entropy(logits_BB, target_BB).mean()
  by_text = optax.softmax_cross_entropy(logits_BB.T, target_BB).mean()
  return (by_image + by_text) / 2


def unit(x: Float[Array, "B P"]) -> Float[Array, "B P"]:
  """Rows of length one."""
  return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def clip_config(config, tokenize: Tokenizer) -> clip.CLIPConfig:
  """The architecture from the config's sections; the captions' words decide the vocabulary."""
  return clip.CLIPConfig(
    image=clip.ImageConfig(clip.Tower(**config.clip.image), config.data.image_size, config.clip.patch_size),
    text=clip.TextConfig(clip.Tower(**config.clip.text), **special_ids(tokenize)),
    embed_dim=config.clip.embed_dim,
  )
