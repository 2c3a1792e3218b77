"""List the options of teachers, data sets, morphers and evaluators.

An option without a rule here is checked against its type annotation in the signature of the choice's `build`.
Its meaning is in the `Args` of the choice's docstring. A rule has a meaning only if several choices share it.
This file imports neither JAX nor TensorFlow, so a wrong start is refused at once. A test compares the names
here with those in the code.
"""

from dtm_jax.options.run_options import ATTENTION, DTYPE, NORMALIZATION, SIZE, SPLIT, STREAM_DTYPE
from dtm_jax.options.task_options import ACTIVATION, PROMPTS, WEIGHTS_IN_FILE
from dtm_jax.options.value_rules import (
  Rule,
  any_of,
  anything,
  choice,
  durations,
  flag,
  number,
  several,
  text,
  whole,
)

_LAYER = (
  "Block after which the tokens are taken. 1: the first block. -1: the last, -2: the one before it. The "
  "final LayerNorm still applies. None: the last."
)
_NOISE = (
  "Strength of the Gaussian noise that each step adds to the teacher's tokens, before they are grouped and "
  "compared. 1: as strong as the channel's own deviation over the tokens of the image. 0: none."
)
_TEACHERS = {
  "path": text("File, folder, or repository of the Hugging Face hub with the weights."),
  "revision": text("Branch, tag or commit of the repository. None: the main branch.").or_none(),
  "tokens": choice("projected", "normalized"),
  "normalization": NORMALIZATION.or_none(f"{NORMALIZATION.about} None: as the files beside the weights say."),
  "dtype": DTYPE,
  "attention": ATTENTION,
  "stream_dtype": STREAM_DTYPE,
  "image_size": whole(1).or_none(
    "Side of the teacher's input in pixels. None: the size that gives the student's grid of patches."
  ),
  "layer": Rule(
    int, "a block: 1 is the first, and -1 the last", lambda block: block != 0, _LAYER, optional=True
  ),
  "noise": number(0, None, _NOISE),
  "step": whole(0).or_none(),
  "heads": whole(1, "Number of attention heads. Needed only if the weights do not give it.").or_none(),
  "activation": ACTIVATION.or_none(),
  "weights": WEIGHTS_IN_FILE,
}
_DATASETS = {
  "data_dir": text().or_none(),
  "labels": flag(),
  "images": text(),
  "segmentation_folder/maps": text(),
  "zero_is_ignored": flag(),
  "image": text(),
  "label": text(),
  "label_map": text().or_none(),
  "side": whole(8),
  "num_examples": whole(1).or_none(),
  "border": whole(0),
  "num_classes": whole(1, high=255).or_none(),
  "shuffle_buffer": whole(1),
  "variant": text(),
  "maps": anything(),
}
_MORPHERS = {
  "groups": whole(1).or_none("Number of groups n̄. None: it is drawn from min_groups to max_groups."),
  "min_groups": whole(1, "N̄, the smallest number of groups that is drawn."),
  "max_groups": whole(1).or_none("Largest number of groups that is drawn. None: the number of tokens N."),
  "drawn_per": choice("image", "step", about="Whether each image or each step draws its number of groups."),
  "init": choice("k-means++", "random"),
  "iterations": whole(0),
  "compactness": number(0, None, above=True),
  "weight": number(0, None, "Weight of this morpher's loss. 0: its loss is only measured."),
  "schedule": choice("paper", "released"),
  "bipartite/drawn_per": choice("image", "step", "shard"),
  "num_shards": whole(1),
  "max_merged": whole(0).or_none(),
  "max_rounds": whole(1),
  "split": choice("random", "alternate"),
  "protect_first": flag(),
  "merged_feature": choice("size_weighted", "mean_of_means"),
  "implementation": choice("auto", "plain", "gram", "pallas"),
}
_SCHEDULE = {
  "at_start": flag("Whether the evaluator also runs before the first step."),
  **durations("every", "Distance of two evaluations. 0 or None: only at the end."),
}
_EVALUATORS = {
  **_SCHEDULE,
  "image_size": SIZE,
  "resize": whole(1).or_none(),
  "crop_pct": number(0, 1, above=True).or_none(),
  "batch_size": whole(1),
  "text_batch_size": whole(1),
  "features": several(text()),
  "outputs": several(text()).or_none(),
  "output": text(),
  "tokens": text(),
  "snapshots/tokens": several(text()),
  "snapshots/images": whole(1),
  "snapshots/groups": whole(1).or_none(),
  "bank": SPLIT,
  "queries": SPLIT.or_none(),
  "fit": SPLIT,
  "held_out": SPLIT,
  "split": SPLIT.or_none(),
  "k": any_of(whole(1), several(whole(1))),
  "temperature": number(0, None, above=True),
  "max_bank": whole(1).or_none(),
  "max_queries": whole(1).or_none(),
  "max_fit": whole(1).or_none(),
  "max_images": whole(1).or_none(),
  "fit_evenly": flag(),
  "ridges": several(number(0, None, above=True)),
  "prompts": PROMPTS.or_none(),
  "zeroshot/prompts": PROMPTS,
  "class_names": text().or_none(),
  "crop": whole(1).or_none(),
  "stride": whole(1).or_none(),
  "longer": whole(1).or_none(),
  "windows": whole(1),
  "num_threads": whole(1),
  "seed": whole(0, high=2**32 - 1),
}
SOCKET_OPTIONS: dict[str, dict[str, Rule]] = {
  "teachers": _TEACHERS,
  "datasets": _DATASETS,
  "morphers": _MORPHERS,
  "evaluators": _EVALUATORS,
}
"""The rules of each socket by option. A rule "choice/option" holds for that choice alone."""

SCHEDULE = tuple(_SCHEDULE)
"""Options of a section of `config.evals` that say when an evaluator runs. The evaluator does not get them."""

ALWAYS: dict[str, tuple[str, ...]] = {
  "teachers": ("noise",),
  "morphers": ("weight",),
  "evaluators": SCHEDULE,
}
"""Options of every choice of a socket that its `build` does not get."""

KEPT: dict[str, tuple[str, ...]] = {
  "teachers": ("noise", "dtype", "attention", "stream_dtype"),
  "datasets": (),
  "morphers": ("weight",),
  "evaluators": (*SCHEDULE, "dataset", "image_size", "batch_size", "features"),
}
"""Options that belong to the run, so they stay if the user types another choice."""
