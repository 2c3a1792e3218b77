"""Writes a student or a fine-tuned classifier for timm, transformers, or under the authors' names.

    python scripts/export.py --source=runs/vitb16 --format=timm --to=exported
    timm.create_model("local-dir:exported", pretrained=True)          # features; transformers: BeitModel

The source is a run's workdir, or weights that `dtm_jax.models.vit.model.weights.load` reads: a folder, or a
repository of the hub, with the authors', BEiT's, timm's or transformers' names. The folder gets
model.safetensors and config.json, and for transformers preprocessor_config.json. config.json names a run's
classes: `id2label`, `label_names` for timm, `class_names` for the authors' names.
"""

from pathlib import Path

from absl import app, flags

from dtm_jax.models.vit import weights as vit_weights
from dtm_jax.normalizations import NORMALIZATIONS, mean_and_std
from dtm_jax.records import run_config as records
from dtm_jax.storage import writing
from dtm_jax.training import pretrained

_SOURCE = flags.DEFINE_string(
  "source", None, "A run's workdir, a folder of weights, or a repository.", required=True
)
_FORMAT = flags.DEFINE_enum("format", "transformers", list(vit_weights.LAYOUTS), "Whose names and files.")
_TO = flags.DEFINE_string("to", None, "The folder to write.", required=True)
_STEP = flags.DEFINE_integer("step", None, "The step of a run; by default its last.")
_NORMALIZATION = flags.DEFINE_enum(
  "normalization", None, list(NORMALIZATIONS), "What it was trained with; by default the run's, or imagenet."
)
_NUM_HEADS = flags.DEFINE_integer("num_heads", None, "Of weights without tables of relative positions.")


def export(
  source: str,
  layout: str,
  folder: str | Path,
  *,
  step: int | None = None,
  normalization: str | None = None,
  num_heads: int | None = None,
) -> None:
  """Writes `folder` from `source`; see the module's docstring.

  Raises:
    FileNotFoundError: there is neither run nor weights.
    ValueError: names or shapes do not match, or the layout is unknown.
  """
  config, class_names = pretrained.run_config(source), None
  if config is not None:
    normalization = normalization or config["augment"]["normalization"]
    num_heads = num_heads or pretrained.num_heads_of(config)
    class_names = records.class_names(source)
  params = pretrained.load(source, step=step, num_heads=num_heads)
  mean, std = mean_and_std(normalization or "imagenet")
  with writing.local_folder_for(folder) as local:
    vit_weights.save(local, params, layout, num_heads=num_heads, mean=mean, std=std, class_names=class_names)


def main(_) -> None:
  export(
    _SOURCE.value, _FORMAT.value, _TO.value,
    step=_STEP.value, normalization=_NORMALIZATION.value, num_heads=_NUM_HEADS.value,
  )  # fmt: skip


if __name__ == "__main__":
  app.run(main)
