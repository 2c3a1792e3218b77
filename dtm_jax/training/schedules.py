"""Durations in steps, and learning-rate schedules."""

from typing import Any

import jax.numpy as jnp
import optax
from absl import logging

from dtm_jax.errors import OptionError, check_choice

DECAYS = ("cosine", "linear")
LR_SCALINGS = {
  "none": lambda batch: 1.0,
  "sqrt": lambda batch: (batch / 2048) ** 0.5,
  "linear": lambda batch: batch / 256,
}


def duration(
  name: str,
  config: Any,
  *,
  steps_per_epoch: int | float | None,
  batch_size: int,
  default: int | None = None,
) -> int:
  """Return the steps of the duration `{name}_steps`, `{name}_examples` or `{name}_epochs` of `config`.

  If several are given (present and not None), the first of this order wins. A duration above zero is at least
  one step.

  Args:
    config: a dict or a section of the config.
    steps_per_epoch: None if the size of the data set is unknown.
    batch_size: the global batch.

  Raises:
    OptionError: none is given and there is no default; or it is negative; or it counts epochs of an unknown
      length.
  """
  per_unit: dict[str, float | None] = {"steps": 1, "examples": 1 / batch_size, "epochs": steps_per_epoch}
  for unit, factor in per_unit.items():
    value = config.get(f"{name}_{unit}")
    if value is None:
      continue
    if factor is None:
      raise OptionError(f"{name}_epochs={value} needs a data set of known size; give {name}_steps instead.")
    if value < 0:
      raise OptionError(f"{name}_{unit} must not be negative, got {value}.")
    return max(round(value * factor), int(value > 0))
  if default is None:
    choices = " or ".join(f"{name}_{unit}" for unit in per_unit)
    raise OptionError(f"No duration is given for {name!r}: set {choices}.")
  return default


def as_typed(name: str, config: Any) -> str:
  """Return the option that `duration` reads, with its value: "log_steps=50"."""
  found = (f"{name}_{unit}" for unit in ("steps", "examples", "epochs"))
  return next((f"{option}={config[option]}" for option in found if config.get(option) is not None), name)


def make_schedule(
  *, peak: float, total_steps: int, warmup_steps: int, final: float, decay: str = "cosine"
) -> optax.Schedule:
  """Return a linear warm-up over W steps, followed by a decay over T = total_steps - W steps.

      lr(t) = peak · t / (W-1)                              t < W: from 0 to peak, both included
      lr(t) = final + (peak-final)/2 · (1 + cos(π i/T))     i = t - W, decay="cosine"
      lr(t) = final + (peak-final) · (1 - i/T)              i = t - W, decay="linear"

  So the first step of a run with a warm-up has a rate of zero, the peak comes twice, and the last step lies
  just above `final`. From `total_steps` on the rate is `final`.

  Raises:
    OptionError: `decay` is unknown.
  """
  check_choice("decay", decay, DECAYS)
  if warmup_steps >= total_steps:
    logging.warning("The warm-up (%d steps) is as long as the run (%d steps).", warmup_steps, total_steps)
  decay_steps = max(total_steps - warmup_steps, 1)

  def schedule(step):
    step = jnp.asarray(step, jnp.float32)
    warmup = peak * (step / max(warmup_steps - 1, 1))
    # sin²((π-x)/2) equals (1 + cos x)/2 and does not cancel at the end of the run.
    remaining = jnp.clip(total_steps - step, 0, decay_steps) / decay_steps
    share = remaining if decay == "linear" else jnp.sin(0.5 * jnp.pi * remaining) ** 2
    return jnp.where(step < warmup_steps, warmup, final + (peak - final) * share)

  return schedule


def scale_by_batch(lr: float, total_batch: int, rule: str = "sqrt") -> float:
  """Return lr · sqrt(total_batch/2048) for "sqrt", lr · total_batch/256 for "linear", and lr for "none".

  Raises:
    OptionError: `rule` is unknown.
  """
  check_choice("lr_scaling", rule, LR_SCALINGS)
  return lr * LR_SCALINGS[rule](total_batch)
