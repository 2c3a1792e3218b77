"""Train a linear classifier during pre-training. No gradient flows from it to the student.

In every step it measures how well the student's tokens predict the classes. It reads the tokens of the
masked forward pass and needs no other pass. Its accuracy is somewhat below that of a probe on whole images.
"""

import jax
import jax.numpy as jnp
import optax
from absl import logging

from dtm_jax.arrays import Array, Float, Int, PyTree

EPS = 1e-6


class OnlineProbe:
  """Softmax regression, trained by Adam on features that are standardised within the batch.

  Args:
    width: D, the channels of the features.
    num_classes: G.
    lr: the constant learning rate.
  """

  def __init__(self, width: int, num_classes: int, lr: float):
    self._shape = (width, num_classes)
    self._optimizer = optax.adam(lr)
    logging.info(
      "Online probe: %d x %d parameters, %.3g MFLOP per image and step, no extra forward pass.",
      width, num_classes, 6e-6 * width * num_classes,
    )  # fmt: skip

  def init(self) -> PyTree:
    """Return the state of the probe: "params" and "opt_state"."""
    params = {"kernel": jnp.zeros(self._shape), "bias": jnp.zeros(self._shape[1])}
    return {"params": params, "opt_state": self._optimizer.init(params)}

  def update(
    self, state: PyTree, feature_BD: Float[Array, "B D"], label_B: Int[Array, " B"]
  ) -> tuple[PyTree, dict[str, Array]]:
    """Make one update. Return the next state, and "probe_loss" and "probe_accuracy" before the update."""
    feature_BD = jax.lax.stop_gradient(feature_BD)
    feature_BD -= feature_BD.mean(axis=0, keepdims=True)
    feature_BD *= jax.lax.rsqrt(feature_BD.var(axis=0, keepdims=True) + EPS)

    def loss_fn(params: PyTree) -> tuple[Array, Array]:
      logits_BG = feature_BD @ params["kernel"] + params["bias"][None]
      loss_B = optax.softmax_cross_entropy_with_integer_labels(logits_BG, label_B)
      return loss_B.mean(), jnp.mean(jnp.argmax(logits_BG, axis=1) == label_B)

    (loss, accuracy), grads = jax.value_and_grad(loss_fn, has_aux=True)(state["params"])
    updates, opt_state = self._optimizer.update(grads, state["opt_state"], state["params"])
    after = {"params": optax.apply_updates(state["params"], updates), "opt_state": opt_state}
    return after, {"probe_loss": loss, "probe_accuracy": accuracy}
