"""The student of an earlier run as the teacher."""

import json
import os

from dtm_jax.checkpoints.contents import load_params
from dtm_jax.errors import NotThereError, OptionError
from dtm_jax.models.layers import grid_of
from dtm_jax.models.vit import model as vit
from dtm_jax.normalizations import mean_and_std
from dtm_jax.storage import paths
from dtm_jax.teachers import Teacher
from dtm_jax.teachers._student import of_student


def build(
  path: str | None,
  *,
  step: int | None = None,
  dtype: str = "float32",
  attention: str = "xla",
  stream_dtype: str = "float32",
  image_size: int | None = None,
  layer: int | None = None,
) -> Teacher:
  """Return the student of a pre-training run with its patch tokens after the final LayerNorm.

  Args:
    path: the run's workdir, with config.json and checkpoints/. The run's config gives the normalisation.
    step: step of the checkpoint. Default: the last one.
    image_size: side of the image in pixels. Default: that of the run. The positions are resized for another
      size.

  Raises:
    NotThereError: the run or the step does not exist.
    OptionError: there is no path or no block `layer`, the run trained no student, or the image is not a
      whole number of patches.
  """
  if path is None:
    raise OptionError("Teacher 'checkpoint' needs a run: --config.teacher.path=WORKDIR.")
  config_file = paths.resolve(path) / "config.json"
  if not config_file.exists():
    raise NotThereError(f"No config.json in {path}, so it is not the workdir of a run.")
  config = json.loads(config_file.read_text())
  params = load_params(os.fspath(config_file.parent / "checkpoints"), step=step)
  if "mask_token" not in params:
    raise OptionError(f"The run {path} trained no student. Its parameters are {', '.join(sorted(params))}.")
  params = {name: part for name, part in params.items() if name != "head"}
  by_device = {"dtype": dtype, "attention": attention, "stream_dtype": stream_dtype}
  model = vit.build(**config["student"] | by_device | {"out_dim": None})
  mean, std = mean_and_std(config["augment"]["normalization"])
  own_size = config["data"]["image_size"]
  grid = grid_of((own_size, own_size, 3), model.patch_size)
  return of_student(
    f"checkpoint {path}", model, params, grid=grid, image_size=image_size, layer=layer, mean=mean, std=std
  )
