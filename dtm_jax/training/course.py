"""Count how far a run is and how far it goes, in examples, even if the batch size changes on the way."""

import dataclasses
from typing import Any

from dtm_jax.training import schedules


@dataclasses.dataclass(frozen=True)
class Course:
  """The place of this start in the whole run.

  A run that is resumed with another batch size B goes on at the example where it stopped. If its length is
  given in epochs or examples, it ends at the same number of examples, and its schedules go on at the same
  place: they are made for the first batch size B0 and evaluated at `scale` · step + `shift`. A length given
  in steps stays in steps.

  Attributes:
    batch_size: B, the global batch of this start.
    epoch_size: number of examples in an epoch.
    first_batch_size: B0, the global batch of the run's first start.
    step, examples: the steps done and the examples seen before this start.
  """

  batch_size: int
  epoch_size: int
  first_batch_size: int
  step: int = 0
  examples: int = 0

  @classmethod
  def fresh(cls, batch_size: int, epoch_size: int) -> "Course":
    """Return the course of a run that starts at step 0."""
    return cls(batch_size, epoch_size, batch_size)

  def resumed(self, step: int, meta: dict[str, Any]) -> "Course":
    """Return the course that goes on from a checkpoint. Old ones have only the batch size in their meta."""
    before = meta["batch_size"]
    return dataclasses.replace(
      self,
      step=step,
      examples=meta.get("examples", step * before),
      first_batch_size=meta.get("first_batch_size", before),
    )

  @property
  def changed(self) -> bool:
    """Whether the batch size has changed since the first start."""
    return self.batch_size != self.first_batch_size or self.examples != self.step * self.batch_size

  def examples_at(self, step: int) -> int:
    """Return the number of examples that the run has seen after `step`, which is not before this start."""
    return self.examples + (step - self.step) * self.batch_size

  def epoch_at(self, step: int) -> float:
    """Return the number of epochs that the run has seen after `step`."""
    return self.examples_at(step) / self.epoch_size

  def meta_at(self, step: int) -> dict[str, int]:
    """Return the meta of a checkpoint of `step`, which `resumed` reads."""
    return {
      "batch_size": self.batch_size,
      "examples": self.examples_at(step),
      "first_batch_size": self.first_batch_size,
    }

  def steps(self, name: str, section: Any, default: int | None = None) -> int:
    """Return the duration `name` of a section of the config, in steps of this start's batch size."""
    return schedules.duration(
      name, section, default=default, batch_size=self.batch_size,
      steps_per_epoch=self.epoch_size / self.batch_size,
    )  # fmt: skip

  def total_steps(self, config: Any) -> int:
    """Return the step at which the run ends."""
    if not self.changed or config.get("total_steps") is not None:
      return self.steps("total", config)
    total_examples = config.get("total_examples")
    if total_examples is None:
      total_examples = config.total_epochs * self.epoch_size
    return self.step + max(round((total_examples - self.examples) / self.batch_size), 0)

  def for_schedules(self, config: Any) -> dict[str, Any]:
    """Return the fields of `tasks.Run` that place the schedules."""
    size = self.first_batch_size
    epoch = self.epoch_size / size
    total = schedules.duration("total", config, steps_per_epoch=epoch, batch_size=size)
    fields = {"total_steps": total, "steps_per_epoch": epoch, "first_batch_size": size}
    if not self.changed or config.get("total_steps") is not None:
      return fields
    shift = (self.examples - self.step * self.batch_size) / size
    return fields | {"scale": self.batch_size / size, "shift": shift}
