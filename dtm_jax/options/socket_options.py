"""List the options of teachers, data sets, morphers and evaluators.

An option without a rule here is checked against its type annotation in the signature of the choice's `build`.
This file imports neither JAX nor TensorFlow, so a wrong start is refused at once. A test compares the names
here with those in the code.
"""

from dtm_jax.options.run_options import DTYPE, NORMALIZATION, SIZE, SPLIT
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

_TEACHERS = {
  "path": text("file, folder, repository of the hub, or workdir of a run"),
  "revision": text("revision of the repository").or_none(),
  "tokens": choice("projected", "normalized", about="which of CLIP's outputs is the target"),
  "normalization": NORMALIZATION.or_none(),
  "dtype": DTYPE,
  "attention": choice("xla", "cudnn", about="implementation of attention"),
  "image_size": whole(
    1, "side of the teacher's input in pixels; None: the size that gives the student's grid"
  ).or_none(),
  "step": whole(0, "checkpoint of the run; None: the last").or_none(),
  "num_heads": whole(1, "number of attention heads, if the weights do not give it").or_none(),
  "heads": whole(1, "number of attention heads, if the weights do not give it").or_none(),
  "activation": ACTIVATION.or_none("activation of the MLP, if the weights do not give it"),
  "weights": WEIGHTS_IN_FILE,
}
_DATASETS = {
  "data_dir": text("folder of the data set; None: the usual place").or_none(),
  "labels": flag("whether folders are classes"),
  "images": text("folder of the images below data_dir"),
  "segmentation_folder/maps": text("folder of the label maps below data_dir"),
  "zero_is_ignored": flag("whether 0 in a label map means no class"),
  "image": text("feature that holds the image"),
  "label": text("feature that holds the label"),
  "label_map": text("feature that holds the label map").or_none(),
  "side": whole(8, "smallest side of a generated picture in pixels"),
  "num_examples": whole(1, "number of generated pictures").or_none(),
  "border": whole(0, "rows of a label map that are ignored"),
  "num_classes": whole(1, "number of classes", high=255).or_none(),
  "shuffle_buffer": whole(1, "number of encoded images that are held to shuffle"),
  "variant": text("name of a TFDS data set"),
  "maps": anything(),
}
_MORPHERS = {
  "groups": whole(1, "number of groups").or_none(),
  "min_groups": whole(1, "smallest number of groups"),
  "max_groups": whole(1, "largest number of groups").or_none(),
  "drawn_per": choice("image", "step", about="who shares a drawn number of groups"),
  "init": choice("k-means++", "random", about="how the first centres are chosen"),
  "iterations": whole(0, "number of k-means updates"),
  "compactness": number(0, None, "weight of the position beside the colour", above=True),
  "weight": number(0, None, "weight in the loss; 0 only measures"),
  "schedule": choice("paper", "released", about="rule that draws the schedule"),
  "bipartite/drawn_per": choice("image", "step", "shard", about="who shares a drawn schedule"),
  "num_shards": whole(1, "number of equal parts of the batch; each draws its own schedule"),
  "max_merged": whole(0, "largest number of tokens that the released schedule merges").or_none(),
  "max_rounds": whole(1, "largest number of matching rounds"),
  "split": choice("random", "alternate", about="how live tokens are split into two sets"),
  "protect_first": flag("whether the first patch never merges"),
  "merged_feature": choice("size_weighted", "mean_of_means", about="feature of merged tokens"),
  "implementation": choice("plain", "gram", "pallas", about="how the matching rounds are computed"),
}
_SCHEDULE = {
  "at_start": flag("whether the evaluator also runs before the first step"),
  **durations("every", "time from one evaluation to the next; 0: only at the end"),
}
_EVALUATORS = {
  **_SCHEDULE,
  "image_size": SIZE,
  "resize": whole(1, "shorter side of the image before the central crop").or_none(),
  "crop_pct": number(0, 1, "share of the shorter side that is cropped", above=True).or_none(),
  "batch_size": whole(1, "global batch: images in a step over all devices"),
  "text_batch_size": whole(1, "number of captions that are embedded at once"),
  "features": several(text(), "outputs of the task that are evaluated"),
  "outputs": several(text(), "outputs of the task that are evaluated").or_none(),
  "output": text("output of the task that gives logits"),
  "tokens": text("output of the task that gives tokens"),
  "bank": SPLIT,
  "queries": SPLIT.or_none(),
  "fit": SPLIT,
  "held_out": SPLIT,
  "split": SPLIT.or_none(),
  "k": any_of(whole(1), several(whole(1)), about="number of neighbours that vote"),
  "temperature": number(0, None, "temperature of the votes", above=True),
  "max_bank": whole(1, "largest number of examples in the bank").or_none(),
  "max_queries": whole(1, "largest number of queries").or_none(),
  "max_fit": whole(1, "number of images that the probe is fitted on").or_none(),
  "max_images": whole(1, "number of images that are measured").or_none(),
  "fit_evenly": flag("whether the images to fit on are evenly spaced; otherwise they are the first ones"),
  "ridges": several(number(0, None, above=True), "regularization strengths to choose from"),
  "prompts": PROMPTS.or_none(),
  "zeroshot/prompts": PROMPTS,
  "class_names": text("file of class names").or_none(),
  "crop": whole(1, "side of a window in pixels").or_none(),
  "stride": whole(1, "pixels from one window to the next").or_none(),
  "longer": whole(1, "longest side of a resized image").or_none(),
  "windows": whole(1, "number of windows in one call of a device"),
  "num_threads": whole(1, "number of threads that count pixels"),
  "seed": whole(0, "seed of the morphers' random draws", high=2**32 - 1),
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

ALWAYS: dict[str, tuple[str, ...]] = {"morphers": ("weight",), "evaluators": SCHEDULE}
"""Options of every choice of a socket that its `build` does not get."""

KEPT: dict[str, tuple[str, ...]] = {
  "teachers": ("dtype", "attention"),
  "datasets": (),
  "morphers": ("weight",),
  "evaluators": (*SCHEDULE, "dataset", "image_size", "batch_size", "features"),
}
"""Options that belong to the run, so they stay if the user types another choice."""
