"""Export a student or a fine-tuned classifier for timm or transformers, or under the authors' names.

    python scripts/export.py --source=runs/vitb16 --format=timm --to=exported
    timm.create_model("local-dir:exported", pretrained=True)          # or transformers.BeitModel

The source is the workdir of a run, or weights that `dtm_jax.models.vit.weights.load` reads: a folder or a
repository of the hub in the format of the authors, BEiT, timm or transformers. The folder gets
model.safetensors and config.json, and for transformers preprocessor_config.json too. config.json holds the
class names of a run: as `id2label` for transformers, `label_names` for timm, `class_names` for the authors'
format.
"""

from collections.abc import Sequence
from pathlib import Path

from dtm_jax.models.vit import weights as vit_weights
from dtm_jax.normalizations import NORMALIZATIONS, mean_and_std
from dtm_jax.options.command_line import run_script, script_parser
from dtm_jax.records import run_config as records
from dtm_jax.storage import writing
from dtm_jax.training import pretrained


def export(
  source: str,
  layout: str,
  folder: str | Path,
  *,
  step: int | None = None,
  normalization: str | None = None,
  num_heads: int | None = None,
) -> None:
  """Write the weights of `source` to `folder`.

  Args:
    source: the workdir of a run, a folder of weights, or a repository of the hub.
    layout: format to write, one of `vit_weights.LAYOUTS`.
    folder: a local folder or one in a bucket.
    step: step of a run. By default the last one.
    normalization: normalisation of the images in training. By default the one of the run, or "imagenet".
    num_heads: number of attention heads, for weights without relative position tables.

  Raises:
    FileNotFoundError: there is neither a run nor weights.
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


def main(argv: Sequence[str] | None = None) -> None:
  """Run the command line of the module's docstring."""
  parser = script_parser(__doc__)
  add = parser.add_argument
  add("--source", required=True, help="workdir of a run, folder of weights, or repository of the hub")
  add("--to", required=True, help="the folder to write")
  add("--format", default="transformers", choices=list(vit_weights.LAYOUTS), help="format to write")
  add("--step", type=int, help="step of a run (default: its last)")
  add(
    "--normalization", choices=list(NORMALIZATIONS),
    help="normalisation of the images in training (default: the one of the run, or imagenet)",
  )  # fmt: skip
  add("--num_heads", type=int, help="number of heads, for weights without relative position tables")
  args = parser.parse_args(argv)
  export(
    args.source, args.format, args.to,
    step=args.step, normalization=args.normalization, num_heads=args.num_heads,
  )  # fmt: skip


if __name__ == "__main__":
  run_script(main)
