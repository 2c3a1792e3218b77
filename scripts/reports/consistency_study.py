"""The run of a consistency study: what it left in its workdir, and its evaluator."""

import dataclasses
import datetime
import json

import jax
from etils import epath
from ml_collections import config_dict

from dtm_jax import evaluators, plugins
from dtm_jax.arrays import PyTree
from dtm_jax.errors import NotThereError, OptionError
from dtm_jax.evaluators import Context
from dtm_jax.evaluators.consistency import UNMORPHED, Evaluator
from dtm_jax.storage import paths
from dtm_jax.tasks import Run
from dtm_jax.training import mesh as meshes
from dtm_jax.training.sharded_step import place_frozen


@dataclasses.dataclass(frozen=True)
class Study:
  """A finished run of a consistency study.

  Attributes:
    workdir: the folder of the run.
    config: its config.json.
    options: the section of its evaluator.
    numbers: the evaluator's numbers by name, such as "tokens_zeroshot".
    measured: when the numbers were written.
  """

  workdir: epath.Path
  config: config_dict.ConfigDict
  options: config_dict.ConfigDict
  numbers: dict[str, float]
  measured: datetime.datetime

  @classmethod
  def read(cls, workdir: str) -> "Study":
    """Return the study in this workdir.

    Raises:
      NotThereError: there is no such run, or a file of it is missing.
      OptionError: the run is not a consistency study with prompts, or it has not ended.
    """
    folder = paths.resolve(workdir)
    if not folder.is_dir():
      raise NotThereError(
        f"There is no run {folder}. Make one: python -m dtm_jax.main --config=configs/consistency.py"
      )
    files = {name: folder / name for name in ("config.json", "metrics.jsonl")}
    if missing := [name for name, file in files.items() if not file.exists()]:
      raise NotThereError(f"The run {folder} has no {' and no '.join(missing)}.")
    config = config_dict.ConfigDict(json.loads(files["config.json"].read_text()))
    name, options = _only_evaluator(config, folder)
    lines = [json.loads(line) for line in files["metrics.jsonl"].read_text().splitlines()]
    wanted = f"{name}/{UNMORPHED}_zeroshot"
    found = [line for line in lines if wanted in line]
    if not found:
      raise OptionError(f"{files['metrics.jsonl']} has no {wanted}: the run has not ended.")
    numbers = {key.removeprefix(f"{name}/"): value for key, value in found[-1].items()}
    measured = datetime.datetime.fromtimestamp(files["metrics.jsonl"].stat().mtime, datetime.UTC)
    return cls(folder, config, options, numbers, measured)

  def evaluator(self) -> tuple[Evaluator, PyTree]:
    """Return the evaluator of the study and the state to give it."""
    config, mesh = self.config, meshes.make_mesh(self.config.mesh.data, self.config.mesh.fsdp)
    dataset = plugins.build("datasets", config.data.dataset, split=config.data.split)
    run = Run(0, dataset.num_examples / config.batch_size, config.batch_size, dataset.class_names)
    task = plugins.load("tasks", config.task).build(config, run)
    frozen = place_frozen(task, mesh, config.mesh.rules)
    context = Context.bind(task.outputs, frozen, mesh, tokenize=task.tokenize)
    return evaluators.make("consistency", self.options, context), task.init(jax.random.key(0))


def _only_evaluator(config: config_dict.ConfigDict, folder: epath.Path) -> tuple[str, config_dict.ConfigDict]:
  """Return the name and the section of the study's evaluator."""
  found = {
    name: options for name, options in config.evals.items() if options.get("name", name) == "consistency"
  }
  if len(found) != 1 or config.total_steps != 0:
    raise OptionError(
      f"The run {folder} is not a consistency study of a frozen network: it has {len(found)} evaluators of "
      f"that kind, not 1, and total_steps={config.total_steps}, not 0."
    )
  ((name, options),) = found.items()
  if options.get("prompts") is None:
    raise OptionError(f"The run {folder} has prompts=None in evals.{name}, so it has no zero-shot classes.")
  return name, options
