"""List the options of each task, and the facts about tasks that the checks need.

This file imports neither JAX nor TensorFlow, so a wrong start is refused at once. A test compares the names
here with those in the code.
"""

from dtm_jax.options.run_options import DTYPE, NORMALIZATION, PATTERN, TRAIN_NORMALIZATION
from dtm_jax.options.value_rules import Rule, below, choice, durations, flag, number, several, text, whole

_OPTIM = below(
  "optim",
  {
    "name": choice("adamw", "muon", "sgd", about="optimizer"),
    "lr": number(0, None, "peak learning rate"),
    "lr_scaling": choice("none", "sqrt", "linear", about="how the learning rate follows the batch size"),
    "final_lr": number(0, None, "learning rate at the end"),
    "decay": choice("cosine", "linear", about="curve of the learning rate after the warm-up"),
    **durations("warmup", "length of the warm-up"),
    "betas": several(number(0, 1, below=True), "decay rates of the moments", lengths=(1, 2)),
    "eps": number(0, None, "Adam's epsilon", above=True),
    "weight_decay": number(0, None, "decoupled weight decay"),
    "no_decay": several(PATTERN, "parameters without weight decay", empty=True),
    "clip_norm": number(0, None, "largest norm of the gradients; 0: no clipping").or_none(),
    "accumulate": whole(1, "number of steps that accumulate gradients for one update"),
    "layer_decay": number(0, 1, "factor of the learning rate from layer to layer; 0: none").or_none(),
    "frozen": several(PATTERN, "parameters that are not trained", empty=True),
  },
)
_TRUNK = {
  "variant": choice("Ti", "S", "B", "L", about="size of the transformer"),
  "patch_size": whole(1, "side of a patch in pixels"),
  "width": whole(1, "channels of a token"),
  "depth": whole(1, "number of blocks"),
  "num_heads": whole(1, "number of attention heads"),
  "mlp_ratio": number(0, None, "width of the MLP as a multiple of the token's width", above=True),
  "shared_rel_pos_bias": flag("whether all blocks share one table of relative position biases"),
  "rel_pos_bias": flag("whether each block has a table of relative position biases"),
  "abs_pos_emb": flag("whether there are learned absolute position embeddings"),
  "layer_scale_init": number(0, None, "initial factor of residual branches; 0: none").or_none(),
  "drop_path": number(0, 1, "rate of stochastic depth in the last block", below=True),
  "remat": choice("none", "attention", "elementwise", "block", about="what the backward pass recomputes"),
  "unroll": whole(1, "number of blocks in one iteration of the scan"),
  "dtype": DTYPE,
}
TRUNK_SIZES: dict[str, tuple[int, int]] = {"Ti": (192, 3), "S": (384, 6), "B": (768, 12), "L": (1024, 16)}
"""Width and number of attention heads of each variant."""

_AUGMENT = {
  "augment.flip": number(0, 1, "probability of a horizontal flip"),
  "augment.color_jitter": number(0, None, "strength of the colour jitter"),
  "augment.normalization": TRAIN_NORMALIZATION,
}
WEIGHTS_IN_FILE = text("name of the model in a file that holds several").or_none()
_INIT_FROM = {
  "init_from.weights": WEIGHTS_IN_FILE,
  "init_from.path": text("workdir of a run, or weights, to start from", empty=True).or_none(),
  "init_from.rel_pos": choice("both", "own", "shared", about="which relative position biases are loaded"),
  "init_from.resize": choice("geometric", "bicubic", about="how position biases are resized"),
  "init_from.old_grid": several(whole(1), "grid of the weights", lengths=(2,)).or_none(),
}
ACTIVATION = choice("quick_gelu", "gelu", "gelu_pytorch_tanh", about="activation of the MLP")
_TOWER = {
  "width": _TRUNK["width"],
  "depth": _TRUNK["depth"],
  "num_heads": _TRUNK["num_heads"],
  "mlp_width": whole(1, "width of the MLP"),
  "activation": ACTIVATION,
  "eps": number(0, None, "epsilon of LayerNorm", above=True),
}
PROMPTS = text("name of a set of prompts (cifar10, cifar100, imagenet, plain), or a file of prompts")

TASK_OPTIONS: dict[str, dict[str, Rule]] = {
  "pretrain": {
    **_OPTIM,
    **_AUGMENT,
    **below("student", _TRUNK),
    "init_from.path": _INIT_FROM["init_from.path"],
    "init_from.weights": WEIGHTS_IN_FILE,
    "mask.kind": choice("block", "random", about="how the masked patches are drawn"),
    "mask.share": number(0, 1, "share of the patches that is masked").or_none(),
    "mask.num_masked": whole(0, "number of masked patches, in place of `share`").or_none(),
    "mask.min_block": number(0, 1, "share of the patches in the smallest block", above=True).or_none(),
    "mask.min_patches": whole(1, "patches in the smallest block, in place of `min_block`").or_none(),
    "mask.max_patches": whole(0, "patches in the largest block").or_none(),
    "mask.min_aspect": number(0, 1, "smallest aspect ratio of a block", above=True).or_none(),
    "loss.schedules": whole(1, "number of schedules drawn in a step"),
    "loss.distance": choice("smooth_l1", "l1", "l2", "cosine", about="distance between tokens"),
    "loss.normalize_target": flag("whether each of the teacher's tokens is normalized"),
    "probe.lr": number(0, None, "learning rate of the linear probe on the student", above=True).or_none(),
  },
  "finetune": {
    **_OPTIM,
    **_AUGMENT,
    "augment.erase_prob": number(0, 1, "probability of random erasing"),
    **_INIT_FROM,
    **below("model", _TRUNK),
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
    **below("model", _TRUNK),
    "model.head": choice("linear", "upernet", about="head of the segmenter"),
    "model.channels": whole(1, "channels of UPerNet").or_none(),
    "model.auxiliary_channels": whole(0, "channels of the auxiliary head; 0: none"),
    "model.dropout": number(0, 1, "dropout rate before the last layer", below=True),
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
    **below("clip.image", _TOWER),
    **below("clip.text", _TOWER),
    "clip.embed_dim": whole(1, "width of the shared embedding space"),
    "clip.patch_dropout": number(0, 1, "share of dropped patches", below=True),
    "clip.dtype": DTYPE,
    "text.prompts": PROMPTS,
    "text.context_length": whole(3, "number of tokens in a caption"),
  },
  "frozen": {},
  "frozen_clip": {
    "clip.path": text("file, folder, or repository of the hub"),
    "clip.revision": text("revision of the repository").or_none(),
    "clip.normalization": NORMALIZATION,
    "clip.dtype": DTYPE,
    "clip.heads": several(whole(1), "attention heads of image and text tower", lengths=(2,)).or_none(),
    "clip.activation": ACTIVATION.or_none("activation of the MLP, if the weights do not give it"),
    "clip.weights": WEIGHTS_IN_FILE,
  },
}
"""The options of each task, in addition to those of every run and those of its sockets."""

REQUIRED: dict[str, tuple[str, ...]] = {
  "pretrain": ("teacher", "student", "mask", "morphers", "loss", "optim", "augment", "init_from", "probe"),
  "finetune": ("model", "mix", "loss", "optim", "ema", "augment", "init_from"),
  "segment": ("model", "loss", "optim", "augment", "init_from"),
  "linear_probe": ("teacher", "probe", "optim", "augment"),
  "contrastive": ("clip", "text", "optim", "augment"),
  "frozen": ("teacher",),
  "frozen_clip": ("clip",),
}
"""The sections that each task reads, in addition to those that every run has."""

PREDICTS: dict[str, tuple[str, ...]] = {
  "pretrain": ("student", "teacher", "student_tokens", "teacher_tokens"),
  "finetune": ("logits", "features", "logits_ema"),
  "segment": ("logits",),
  "linear_probe": ("logits", "rates"),
  "contrastive": ("image", "text"),
  "frozen": ("features", "tokens", "cls"),
  "frozen_clip": ("image", "patches", "text"),
}
"""The outputs of each task that evaluators may ask for."""

READS_LOGITS = {"finetune": "classification", "segment": "segmentation", "linear_probe": "best_head"}
"""The evaluator that reads the logits of each task: logits of images, of pixels, or of several heads."""
