"""List the options of each task, and the facts about tasks that the checks need.

This file imports neither JAX nor TensorFlow, so a wrong start is refused at once. A test compares the names
here with those in the code.
"""

from dtm_jax.options.run_options import (
  ATTENTION,
  DTYPE,
  NORMALIZATION,
  PATTERN,
  STREAM_DTYPE,
  TRAIN_NORMALIZATION,
)
from dtm_jax.options.value_rules import (
  Rule,
  any_of,
  below,
  choice,
  durations,
  flag,
  number,
  several,
  text,
  whole,
)

_LR_SCALING = "How lr grows with the images of an update. sqrt: sqrt(images / 2048). linear: images / 256."
_LAYER_DECAY = "Factor of the learning rate from one layer to the layer below. 0 or None: none."
_REMAT = (
  "What the backward pass computes again to save memory: none; attention (logits and softmax); activations "
  "(those and the GELU); elementwise (all but the products with kernels); or the whole block. auto: what "
  "suits the device."
)
_UNROLL = "Number of blocks in one iteration of the scan. More compile longer. auto: what suits the device."
_REL_POS = "Which relative position biases start the model: each block's own, the shared ones, or their sum."
_MIN_BLOCK = "Share of the patches in the smallest block. At least one patch."
_ONLINE_PROBE = (
  "Learning rate of a linear classifier that learns beside the student and does not change it. None: none."
)
_RATES = "Factors of the learning rate. One linear head is trained for each of them."
_CLIP_HEADS = "Numbers of attention heads of the image and the text tower. None: as the weights say."

_OPTIM = below(
  "optim",
  {
    "name": choice(
      "adamw", "muon", "sgd", about="Optimizer. muon updates the kernels of the blocks, and adamw the rest."
    ),
    "lr": number(0, None, "Peak learning rate, before lr_scaling."),
    "lr_scaling": choice("none", "sqrt", "linear", about=_LR_SCALING),
    "final_lr": number(0, None, "Learning rate at the end of the run. lr_scaling does not apply."),
    "decay": choice("cosine", "linear", about="Curve of the learning rate from its peak to the end."),
    **durations("warmup", "Length of the linear warm-up from a learning rate of 0."),
    "betas": several(
      number(0, 1, below=True),
      "Decay rates of the first and the second moment. sgd uses the first one.",
      lengths=(1, 2),
    ),
    "eps": number(0, None, "Epsilon in the denominator of adamw and muon.", above=True),
    "weight_decay": number(0, None, "Decoupled weight decay, times the learning rate."),
    "no_decay": several(PATTERN, "Patterns of the paths of parameters without weight decay.", empty=True),
    "clip_norm": number(0, None, "Largest global norm of the gradients. 0 or None: no clipping.").or_none(),
    "accumulate": whole(1, "Number of steps that make one update from the mean of their gradients."),
    "layer_decay": number(0, 1, _LAYER_DECAY).or_none(),
    "fixed": several(PATTERN, "Patterns of the paths of parameters that are not trained.", empty=True),
  },
)
_TRUNK = {
  "variant": choice(
    "Ti", "S", "B", "L", about="Size of the transformer: it gives width, depth and num_heads."
  ),
  "patch_size": whole(1, "Side of a patch in pixels."),
  "width": whole(1, "D, the number of channels of a token."),
  "depth": whole(1, "L, the number of blocks."),
  "num_heads": whole(1, "Number of attention heads. It must divide the width."),
  "mlp_ratio": number(0, None, "Width of the MLP's hidden layer as a multiple of D.", above=True),
  "shared_rel_pos_bias": flag("Whether all blocks share one table of relative position biases."),
  "rel_pos_bias": flag("Whether each block has its own table of relative position biases."),
  "abs_pos_emb": flag("Whether a learned embedding of its position is added to each patch."),
  "layer_scale_init": number(
    0, None, "Initial factor of every residual branch. 0 or None: no factors."
  ).or_none(),
  "drop_path": number(
    0, 1, "Rate of stochastic depth in the last block. It grows linearly from 0.", below=True
  ),
  "remat": choice("auto", "none", "attention", "activations", "elementwise", "block", about=_REMAT),
  "unroll": any_of(choice("auto"), whole(1), about=_UNROLL),
  "dtype": DTYPE,
  "stream_dtype": STREAM_DTYPE,
  "attention": ATTENTION,
}
TRUNK_SIZES: dict[str, tuple[int, int]] = {"Ti": (192, 3), "S": (384, 6), "B": (768, 12), "L": (1024, 16)}
"""Width and number of attention heads of each variant."""

_AUGMENT = {
  "augment.flip": number(0, 1, "Probability of a horizontal flip."),
  "augment.color_jitter": number(
    0, None, "Strength of the jitter of brightness, contrast and saturation. 0: none."
  ),
  "augment.normalization": TRAIN_NORMALIZATION,
}
WEIGHTS_IN_FILE = text("Name of the model in a file that holds several.").or_none()
_INIT_FROM = {
  "init_from.weights": WEIGHTS_IN_FILE,
  "init_from.path": text(
    "Workdir of a run, or weights, to start from. None: random parameters.", empty=True
  ).or_none(),
  "init_from.rel_pos": choice("both", "own", "shared", about=_REL_POS),
  "init_from.resize": choice(
    "geometric", "bicubic", about="How tables of relative position biases are resized."
  ),
  "init_from.old_grid": several(
    whole(1), "Grid (rows, columns) of patches of the weights. None: it is square.", lengths=(2,)
  ).or_none(),
}
ACTIVATION = choice("quick_gelu", "gelu", "gelu_pytorch_tanh", about="Activation of the MLP.")
_TOWER = {
  "width": _TRUNK["width"],
  "depth": _TRUNK["depth"],
  "num_heads": _TRUNK["num_heads"],
  "mlp_width": whole(1, "Width of the MLP's hidden layer."),
  "activation": ACTIVATION,
  "eps": number(0, None, "Epsilon of LayerNorm.", above=True),
}
PROMPTS = text(
  "Name of a set of prompts (cifar10, cifar100, imagenet, plain), or a file with one prompt on each line."
)

TASK_OPTIONS: dict[str, dict[str, Rule]] = {
  "pretrain": {
    **_OPTIM,
    **_AUGMENT,
    **below("student", _TRUNK),
    "init_from.path": _INIT_FROM["init_from.path"],
    "init_from.weights": WEIGHTS_IN_FILE,
    "mask.kind": choice(
      "block", "random", about="How the masked patches are drawn: in rectangles, or one by one."
    ),
    "mask.share": number(0, 1, "Share of the patches that is masked.").or_none(),
    "mask.num_masked": whole(0, "Number of masked patches. It wins over share.").or_none(),
    "mask.min_block": number(0, 1, _MIN_BLOCK, above=True).or_none(),
    "mask.min_patches": whole(
      1, "Number of patches in the smallest block. It wins over min_block."
    ).or_none(),
    "mask.max_patches": whole(0, "Number of patches in the largest block. None: num_masked.").or_none(),
    "mask.min_aspect": number(0, 1, "Smallest aspect ratio of a block.", above=True).or_none(),
    "loss.schedules": whole(1, "S, the number of schedules that are drawn in a step for each morpher."),
    "loss.distance": choice(
      "smooth_l1", "l1", "l2", "cosine", about="Distance of the student's tokens to the teacher's."
    ),
    "loss.normalize_target": flag("Whether each of the teacher's tokens is normalised."),
    "probe.lr": number(0, None, _ONLINE_PROBE, above=True).or_none(),
  },
  "finetune": {
    **_OPTIM,
    **_AUGMENT,
    "augment.erase_prob": number(0, 1, "Probability that a random rectangle of an image is erased."),
    **_INIT_FROM,
    **below("model", _TRUNK),
    "model.pooling": choice(
      "mean", "cls", about="What the head reads: the mean of the patch tokens, or the class token."
    ),
    "model.head_init_scale": number(0, None, "Factor of the head's initial weights."),
    "mix.mixup": number(0, None, "Strength a of mixup, which draws its weight from Beta(a, a). 0: no mixup."),
    "mix.cutmix": number(
      0, None, "Strength a of CutMix, which draws its weight from Beta(a, a). 0: no CutMix."
    ),
    "mix.cutmix_prob": number(0, 1, "Probability of CutMix for a batch, if both methods are on."),
    "loss.label_smoothing": number(
      0, 1, "Share of the target that is spread evenly over all classes.", below=True
    ),
    "ema.decay": number(
      0, 1, "Decay of the average of the parameters in each step. 0 or None: none.", below=True
    ).or_none(),
  },
  "segment": {
    **_OPTIM,
    **_AUGMENT,
    **_INIT_FROM,
    **below("model", _TRUNK),
    "model.head": choice("linear", "upernet", about="Head of the segmenter."),
    "model.channels": whole(1, "Number of channels of UPerNet's maps. None: the width.").or_none(),
    "model.auxiliary_channels": whole(0, "Number of channels of the auxiliary head. 0: no such head."),
    "model.dropout": number(0, 1, "Rate of dropped channels before the last layer of the heads.", below=True),
    "model.taps": several(
      whole(1), "Numbers of the four blocks that UPerNet reads, from 1.", lengths=(4,)
    ).or_none(),
    "loss.auxiliary": number(0, None, "Weight of the auxiliary head's loss."),
  },
  "linear_probe": {
    **_OPTIM,
    "augment.flip": _AUGMENT["augment.flip"],
    "probe.rates": several(number(0, None, above=True), _RATES),
    "probe.statistics_momentum": number(
      0, 1, "Share of the running statistics that stays in a step.", below=True
    ),
  },
  "contrastive": {
    **_OPTIM,
    **_AUGMENT,
    "clip.patch_size": _TRUNK["patch_size"],
    **below("clip.image", _TOWER),
    **below("clip.text", _TOWER),
    "clip.embed_dim": whole(1, "Width of the space in which images and texts are compared."),
    "clip.patch_dropout": number(
      0, 1, "Share of the patches that are dropped in a training step.", below=True
    ),
    "clip.dtype": DTYPE,
    "text.prompts": PROMPTS,
    "text.context_length": whole(3, "Number of tokens in a caption. Longer captions are cut."),
  },
  "frozen": {},
  "frozen_clip": {
    "clip.path": text("File, folder, or repository of the Hugging Face hub with the weights."),
    "clip.revision": text("Branch, tag or commit of the repository. None: the main branch.").or_none(),
    "clip.normalization": NORMALIZATION,
    "clip.dtype": DTYPE,
    "clip.heads": several(whole(1), _CLIP_HEADS, lengths=(2,)).or_none(),
    "clip.activation": ACTIVATION.or_none("Activation of the MLP. None: as the weights say."),
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
  "pretrain": ("student", "teacher", "student_patches", "student_tokens", "teacher_tokens"),
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
