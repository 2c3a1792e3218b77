"""What the options of a config may be: one rule for each, with its meaning in a few words.

Rules of a socket's options (teachers, datasets, morphers, evaluators) are in `SOCKET_RULES`. An option that
has no rule there is checked against the annotation in the signature of the choice's `build`. This file
imports neither JAX nor TensorFlow, so that a start is refused at once. A test holds the names here equal to
the code's.
"""

import re

from dtm_jax.options.rules import (
  Rule,
  any_of,
  anything,
  choice,
  durations,
  flag,
  interval,
  number,
  regex,
  several,
  text,
  whole,
)

SPLIT = text("split of the data set, also a part such as train[:90%]")
PATTERN = regex()
DTYPE = choice("float32", "bfloat16", "float16", about="type of the matrix products")
INTERPOLATION = choice("bicubic", "bilinear", "area", "lanczos", about="filter that resizes images")
TACTICS = ("replicated", "fsdp")
NORMALIZATIONS = ("imagenet", "clip", "inception")
_TRIPLE = several(number(None), lengths=(3,))
_MEAN_AND_STD = Rule(
  tuple,
  "a pair ((mean, mean, mean), (std, std, std)) with std above 0",
  lambda value: len(value) == 2 and all(_TRIPLE.problem(x) is None for x in value) and min(value[1]) > 0,
)
NORMALIZATION = any_of(
  choice(*NORMALIZATIONS), _MEAN_AND_STD, about="mean and standard deviation of the input's channels"
)
TRAIN_NORMALIZATION = any_of(
  choice(*NORMALIZATIONS, "dataset"), _MEAN_AND_STD, about="mean and standard deviation of the channels"
)
RAND_AUGMENT = Rule(
  str,
  'a policy such as "rand-m9-mstd0.5-inc1"',
  lambda x: re.fullmatch(r"rand(-(m|mstd|n|p|inc)\d+(\.\d+)?)+", x) is not None and "-inc1" in x,
  "RandAugment policy",
  optional=True,
)
SIZE = whole(1, "pixels of a side", also=(0,)).or_none("pixels of a side; 0: that of the data set's images")


def _below(prefix: str, rules: dict[str, Rule]) -> dict[str, Rule]:
  return {f"{prefix}.{key}": rule for key, rule in rules.items()}


TASKS = ("contrastive", "finetune", "frozen", "frozen_clip", "linear_probe", "pretrain", "segment")

COMMON = {
  "task": text("what is learned from what: a file of dtm_jax/tasks"),
  "seed": whole(0, "seed of every random draw", high=2**32 - 1),
  "batch_size": whole(1, "images in a step, of all devices together"),
  **durations("total", "length of the run; 0 only evaluates"),
  "resume": choice("check", "force", about="what to do if the saved config differs").or_none(),
  "replay": text("folder of a flight record whose steps are run again").or_none(),
  "data.split": SPLIT,
  "data.image_size": SIZE,
  "data.num_threads": whole(1, "threads that decode images"),
  **_below(
    "data.view",
    {
      "crop": choice("random_resized", "pad", "none", "joint", about="how a training image is cropped"),
      "scale": interval(0, None, "share of the area (joint: factor of the side) of a crop"),
      "ratio": interval(0, None, "aspect of a crop"),
      "padding": whole(0, "black pixels on each side"),
      "interpolation": INTERPOLATION,
      "antialias": flag("whether the filter widens when it shrinks an image"),
      "rand_augment": RAND_AUGMENT,
      "shorter": whole(1, "shorter side before the joint crop").or_none(),
      "longer": whole(1, "longest side before the joint crop").or_none(),
      "max_class_share": number(0, 1, "largest share of one class in a joint crop", above=True),
      "max_pixels": whole(1, "largest image that is read; a larger one counts as corrupt"),
      "prefetch": whole(1, "batches that are made ahead"),
    },
  ),
  "mesh.data": whole(1, "devices that split the batch", also=(-1,)),
  "mesh.fsdp": whole(1, "devices that also split the parameters", also=(-1,)),
  "mesh.rules": Rule(
    tuple,
    "a tuple of pairs (pattern of parameters, replicated or fsdp)",
    lambda rules: (
      bool(rules)
      and all(PATTERN.problem(p) is None and tactic in ("replicated", "fsdp") for p, tactic in rules)
    ),
    "which parameters are split",
  ),
  **_below("checkpoint", durations("save", "time from one checkpoint to the next", above=True)),
  "checkpoint.keep": whole(1, "newest checkpoints that are kept"),
  **_below("checkpoint", durations("keep", "every such checkpoint is kept for good", above=True)),
  **_below("log", durations("log", "time from one report to the next", above=True)),
  "log.flight_recorder": flag("whether the last good state is kept, to replay steps that were not finite"),
  "log.profile_step": whole(1, "step that is profiled").or_none(),
}

_OPTIM = _below(
  "optim",
  {
    "name": choice("adamw", "muon", "sgd", about="optimiser"),
    "lr": number(0, None, "peak learning rate"),
    "lr_scaling": choice("none", "sqrt", "linear", about="how the rate follows the batch size"),
    "final_lr": number(0, None, "learning rate at the end"),
    "decay": choice("cosine", "linear", about="curve from the peak to the end"),
    **durations("warmup", "time until the peak learning rate"),
    "betas": several(number(0, 1, below=True), "decay of the moments", lengths=(1, 2)),
    "eps": number(0, None, "Adam's epsilon", above=True),
    "weight_decay": number(0, None, "decoupled weight decay"),
    "no_decay": several(PATTERN, "parameters without weight decay", empty=True),
    "clip_norm": number(0, None, "largest norm of the gradients; 0: no clipping").or_none(),
    "accumulate": whole(1, "steps whose gradients make one update"),
    "layer_decay": number(0, 1, "factor of the rate from layer to layer; 0: none").or_none(),
    "frozen": several(PATTERN, "parameters that do not move", empty=True),
  },
)

_TRUNK = {
  "variant": choice("Ti", "S", "B", "L", about="size of the transformer"),
  "patch_size": whole(1, "pixels of a patch's side"),
  "width": whole(1, "channels of a token"),
  "depth": whole(1, "number of blocks"),
  "num_heads": whole(1, "attention heads"),
  "mlp_ratio": number(0, None, "width of the MLP, relative", above=True),
  "shared_rel_pos_bias": flag("one table of relative position biases for all blocks"),
  "rel_pos_bias": flag("a table of relative position biases for each block"),
  "abs_pos_emb": flag("learned absolute positions"),
  "layer_scale_init": number(0, None, "initial factor of residual branches; 0: none").or_none(),
  "drop_path": number(0, 1, "rate of stochastic depth in the last block", below=True),
  "remat": choice("none", "attention", "elementwise", "block", about="what the backward pass computes again"),
  "unroll": whole(1, "blocks in one iteration of the scan"),
  "dtype": DTYPE,
}
TRUNK_SIZES = {"Ti": (192, 3), "S": (384, 6), "B": (768, 12), "L": (1024, 16)}
"""Width and attention heads of a variant."""

_AUGMENT = {
  "augment.flip": number(0, 1, "probability of a mirrored image"),
  "augment.color_jitter": number(0, None, "strength of the colour jitter"),
  "augment.normalization": TRAIN_NORMALIZATION,
}
_CONTAINER = text("the model's name in a file that holds several").or_none()
_INIT_FROM = {
  "init_from.weights": _CONTAINER,
  "init_from.path": text("workdir of a run, or weights, to start from", empty=True).or_none(),
  "init_from.rel_pos": choice("both", "own", "shared", about="which position biases are taken over"),
  "init_from.resize": choice("geometric", "bicubic", about="how position biases are resized"),
  "init_from.old_grid": several(whole(1), "grid of the weights", lengths=(2,)).or_none(),
}
_TOWER = {
  "width": _TRUNK["width"],
  "depth": _TRUNK["depth"],
  "num_heads": _TRUNK["num_heads"],
  "mlp_width": whole(1, "width of the MLP"),
  "activation": choice("quick_gelu", "gelu", "gelu_pytorch_tanh", about="activation of the MLP"),
  "eps": number(0, None, "epsilon of the LayerNorms", above=True),
}
_PROMPTS = text("name of a set of prompts (cifar10, cifar100, imagenet, plain), or a file of them")

TASK_RULES = {
  "pretrain": {
    **_OPTIM,
    **_AUGMENT,
    **_below("student", _TRUNK),
    "init_from.path": _INIT_FROM["init_from.path"],
    "init_from.weights": _CONTAINER,
    "mask.kind": choice("block", "random", about="how the hidden patches are drawn"),
    "mask.share": number(0, 1, "share of the patches that is hidden").or_none(),
    "mask.num_masked": whole(0, "number of hidden patches, in place of `share`").or_none(),
    "mask.min_block": number(0, 1, "share of the patches in the smallest block", above=True).or_none(),
    "mask.min_patches": whole(1, "patches in the smallest block, in place of `min_block`").or_none(),
    "mask.max_patches": whole(0, "patches in the largest block").or_none(),
    "mask.min_aspect": number(0, 1, "smallest aspect of a block", above=True).or_none(),
    "loss.schedules": whole(1, "schedules drawn in a step"),
    "loss.distance": choice("smooth_l1", "l1", "l2", "cosine", about="distance of tokens"),
    "loss.normalize_target": flag("whether the teacher's tokens are normalised one by one"),
    "probe.lr": number(0, None, "learning rate of a classifier beside the student", above=True).or_none(),
  },
  "finetune": {
    **_OPTIM,
    **_AUGMENT,
    "augment.erase_prob": number(0, 1, "probability of random erasing"),
    **_INIT_FROM,
    **_below("model", _TRUNK),
    "model.pooling": choice("mean", "cls", about="what the head reads"),
    "model.head_init_scale": number(0, None, "factor of the head's initial weights"),
    "mix.mixup": number(0, None, "strength of mixup; 0: none"),
    "mix.cutmix": number(0, None, "strength of CutMix; 0: none"),
    "mix.cutmix_prob": number(0, 1, "probability of CutMix in place of mixup"),
    "loss.label_smoothing": number(0, 1, "label smoothing", below=True),
    "ema.decay": number(0, 1, "decay of the averaged parameters; 0: none", below=True).or_none(),
  },
  "segment": {
    **_OPTIM,
    **_AUGMENT,
    **_INIT_FROM,
    **_below("model", _TRUNK),
    "model.head": choice("linear", "upernet", about="head of the segmenter"),
    "model.channels": whole(1, "channels of UPerNet").or_none(),
    "model.auxiliary_channels": whole(0, "channels of the auxiliary head; 0: none"),
    "model.dropout": number(0, 1, "dropout before the last layers", below=True),
    "model.taps": several(whole(1), "blocks that UPerNet reads", lengths=(4,)).or_none(),
    "loss.auxiliary": number(0, None, "weight of the auxiliary loss"),
  },
  "linear_probe": {
    **_OPTIM,
    "augment.flip": _AUGMENT["augment.flip"],
    "probe.rates": several(number(0, None, above=True), "learning rates, times the schedule of optim"),
    "probe.statistics_momentum": number(0, 1, "momentum of the running statistics", below=True),
  },
  "contrastive": {
    **_OPTIM,
    **_AUGMENT,
    "clip.patch_size": _TRUNK["patch_size"],
    **_below("clip.image", _TOWER),
    **_below("clip.text", _TOWER),
    "clip.embed_dim": whole(1, "width of the common space"),
    "clip.patch_dropout": number(0, 1, "share of dropped patches", below=True),
    "clip.dtype": DTYPE,
    "text.prompts": _PROMPTS,
    "text.context_length": whole(3, "tokens of a caption"),
  },
  "frozen": {},
  "frozen_clip": {
    "clip.path": text("file, folder, or repository of the hub"),
    "clip.revision": text("revision of the repository").or_none(),
    "clip.normalization": NORMALIZATION,
    "clip.dtype": DTYPE,
    "clip.heads": several(whole(1), "attention heads of image and text tower", lengths=(2,)).or_none(),
    "clip.activation": _TOWER["activation"].or_none("activation, where the weights do not tell"),
    "clip.weights": _CONTAINER,
  },
}
"""The options of each task, beside `COMMON` and those of its sockets."""

HAS_TEACHER = ("pretrain", "linear_probe", "frozen")
PREDICTS = {
  "pretrain": ("student", "teacher", "student_tokens", "teacher_tokens"),
  "finetune": ("logits", "features", "logits_ema"),
  "segment": ("logits",),
  "linear_probe": ("logits", "rates"),
  "contrastive": ("image", "text"),
  "frozen": ("features", "tokens", "cls"),
  "frozen_clip": ("image", "patches", "text"),
}
"""What evaluators may ask of each task."""

READS_LOGITS = {"finetune": "classification", "segment": "segmentation", "linear_probe": "best_head"}
"""The evaluator of each task's logits, which are of images, of pixels, or of several heads."""

_GROUPS = {
  "groups": whole(1, "number of groups").or_none(),
  "min_groups": whole(1, "fewest groups"),
  "max_groups": whole(1, "most groups").or_none(),
  "drawn_per": choice("image", "step", about="what shares a drawn number of groups"),
  "init": choice("k-means++", "random", about="how the first centres are chosen"),
  "iterations": whole(0, "number of updates"),
  "compactness": number(0, None, "weight of place beside colour", above=True),
}
SOCKET_RULES = {
  "teachers": {
    "path": text("file, folder, repository of the hub, or workdir of a run"),
    "revision": text("revision of the repository").or_none(),
    "tokens": choice("projected", "normalized", about="which of CLIP's outputs are the target"),
    "normalization": NORMALIZATION.or_none(),
    "dtype": DTYPE,
    "attention": choice("xla", "cudnn", about="implementation of attention"),
    "image_size": whole(
      1, "pixels of a side that the teacher sees; None: what gives the run's grid"
    ).or_none(),
    "step": whole(0, "checkpoint of the run; None: the last").or_none(),
    "num_heads": whole(1, "attention heads, where the weights do not tell").or_none(),
    "heads": whole(1, "attention heads, where the weights do not tell").or_none(),
    "activation": _TOWER["activation"].or_none("activation of the MLP, where the weights do not tell"),
    "weights": _CONTAINER,
  },
  "datasets": {
    "data_dir": text("folder of the data set; None: the usual place").or_none(),
    "labels": flag("whether folders are classes"),
    "images": text("folder of the images below data_dir"),
    "segmentation_folder/maps": text("folder of the label maps below data_dir"),
    "zero_is_ignored": flag("whether 0 in a label map is no class"),
    "image": text("feature of the images"),
    "label": text("feature of the labels"),
    "label_map": text("feature of the label maps").or_none(),
    "side": whole(8, "smallest side of a generated picture"),
    "num_examples": whole(1, "number of generated pictures").or_none(),
    "border": whole(0, "rows of a map that are ignored"),
    "num_classes": whole(1, "number of classes", high=255).or_none(),
    "shuffle_buffer": whole(1, "encoded images that are held to shuffle"),
    "variant": text("name of a TFDS data set"),
    "maps": anything(),
  },
  "morphers": {
    **_GROUPS,
    "weight": number(0, None, "weight in the loss; 0 only measures"),
    "schedule": choice("paper", "released", about="rule of the schedule"),
    "bipartite/drawn_per": choice("image", "step", "shard", about="what shares a drawn schedule"),
    "num_shards": whole(1, "equal parts of the batch that draw for themselves"),
    "max_merged": whole(0, "most tokens that the released schedule merges").or_none(),
    "max_rounds": whole(1, "most rounds of matching"),
    "split": choice("random", "alternate", about="how live tokens are split in two sets"),
    "protect_first": flag("whether the first patch never merges"),
    "merged_feature": choice("size_weighted", "mean_of_means", about="feature of merged tokens"),
    "implementation": choice("plain", "pallas", about="how the rounds are computed"),
  },
  "evaluators": {
    "at_start": flag("whether it also runs before the first step"),
    **durations("every", "time from one evaluation to the next; 0: at the end only"),
    "image_size": SIZE,
    "resize": whole(1, "shorter side before the central crop").or_none(),
    "crop_pct": number(0, 1, "share of the shorter side that is cropped", above=True).or_none(),
    "batch_size": whole(1, "images in a step, of all devices together"),
    "text_batch_size": whole(1, "captions that are embedded at once"),
    "features": several(text(), "functions of the task that are evaluated"),
    "outputs": several(text(), "functions of the task that are evaluated").or_none(),
    "output": text("function of the task that gives logits"),
    "tokens": text("function of the task that gives tokens"),
    "bank": SPLIT,
    "queries": SPLIT.or_none(),
    "fit": SPLIT,
    "held_out": SPLIT,
    "split": SPLIT.or_none(),
    "k": any_of(whole(1), several(whole(1)), about="neighbours that vote"),
    "temperature": number(0, None, "how sharply votes fall with the distance", above=True),
    "max_bank": whole(1, "most examples of the bank").or_none(),
    "max_queries": whole(1, "most queries").or_none(),
    "max_fit": whole(1, "images that the probe is fitted on").or_none(),
    "max_images": whole(1, "images that are measured").or_none(),
    "fit_evenly": flag("evenly spaced images in place of the first"),
    "ridges": several(number(0, None, above=True), "strengths to choose from"),
    "prompts": _PROMPTS.or_none(),
    "zeroshot/prompts": _PROMPTS,
    "class_names": text("file of class names").or_none(),
    "crop": whole(1, "side of a window").or_none(),
    "stride": whole(1, "pixels from window to window").or_none(),
    "longer": whole(1, "longest side of a resized image").or_none(),
    "windows": whole(1, "windows in one call of a device"),
    "num_threads": whole(1, "threads that count pixels"),
    "seed": whole(0, "seed of the morphers' draws", high=2**32 - 1),
  },
}

SCHEDULE = ("at_start", *durations("every", ""))
"""Options of a section of `config.evals` that say when an evaluator runs; the evaluator does not see them."""


def of_annotation(annotation: str) -> Rule:
  """The rule of an option that has no own one: what its annotation, such as "int | None", says."""
  kinds = {
    "int": whole(None),
    "float": number(None),
    "bool": flag(),
    "str": text(),
    "Normalization": NORMALIZATION,
    "tuple": Rule(tuple, "a tuple", lambda value: True),
  }
  parts = [part.strip().partition("[")[0] for part in annotation.split("|")]
  optional = "None" in parts
  rules = [kinds.get(part) for part in parts if part != "None"]
  if not rules or None in rules:
    return anything()
  rule = rules[0] if len(rules) == 1 else any_of(*rules)
  return rule.or_none() if optional else rule
