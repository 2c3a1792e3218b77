"""An earlier run's own student as the teacher: its patch tokens after the final LayerNorm."""

import json
from pathlib import Path

from dtm_jax import checkpoints
from dtm_jax.models import vit
from dtm_jax.normalizations import mean_and_std
from dtm_jax.teachers import Teacher, of_student


def build(path: str | None, *, step: int | None = None, dtype: str = "float32") -> Teacher:
  """The student of a pre-training run, in the size, the resolution and the normalisation of that run.

  Args:
    path: the run's workdir: config.json and checkpoints/.
    step: by default its last.
    dtype: of the matrix products.

  Raises:
    FileNotFoundError: there is no such run or step.
    ValueError: no path, or the run trained no student.
  """
  if path is None:
    raise ValueError("Teacher 'checkpoint' needs a run: --config.teacher.path=WORKDIR.")
  config_file = Path(path) / "config.json"
  if not config_file.exists():
    raise FileNotFoundError(f"No config.json in {path}: it is not the workdir of a run.")
  config = json.loads(config_file.read_text())
  params = checkpoints.load_params(f"{path}/checkpoints", step=step)
  if "mask_token" not in params:
    raise ValueError(f"The run {path} trained no student: its parameters are {', '.join(sorted(params))}.")
  params = {name: part for name, part in params.items() if name != "head"}
  model = vit.build(**config["student"] | {"dtype": dtype, "out_dim": None})
  mean, std = mean_and_std(config["augment"]["normalization"])
  return of_student(f"checkpoint {path}", model, params, config["data"]["image_size"], mean, std)
