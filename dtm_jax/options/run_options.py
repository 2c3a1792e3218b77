"""List the options that every run has, whatever its task, and the rules that several tables share.

This file imports neither JAX nor TensorFlow, so a wrong start is refused at once. A test compares the names
here with those in the code.
"""

import re

from dtm_jax.options.value_rules import (
  Rule,
  any_of,
  below,
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

# Rules that several options share -----------------------------------------------------------------------

SPLIT = text("Split of the data set, or a part of it such as train[:90%].")
PATTERN = regex()
DTYPE = choice(
  "float32", "bfloat16", "float16", about="Type of the matrix products. Parameters and losses are float32."
)
STREAM_DTYPE = choice(
  "auto", "float32", "bfloat16", about="Type of the residual stream. auto: what suits the device."
)
ATTENTION = choice(
  "auto", "xla", "cudnn", "pallas",
  about="Implementation of attention. cudnn needs a GPU and half precision. auto: what suits the device.",
)  # fmt: skip
INTERPOLATION = choice("bicubic", "bilinear", "area", "lanczos", about="Filter that resizes images.")
SIZE = whole(1, also=(0,)).or_none(
  "Side of the square image that the model sees, in pixels. 0: the size of the data set's images."
)
TACTICS = ("replicated", "fsdp")
NORMALIZATIONS = ("imagenet", "clip", "inception")
_TRIPLE = several(number(None), lengths=(3,))
_MEAN_AND_STD = Rule(
  tuple,
  "a pair ((mean, mean, mean), (std, std, std)) with std above 0",
  lambda value: len(value) == 2 and all(_TRIPLE.problem(x) is None for x in value) and min(value[1]) > 0,
)
_CHANNELS = "Mean and standard deviation that normalise the input channels, whose values are in [0, 1]."
NORMALIZATION = any_of(choice(*NORMALIZATIONS), _MEAN_AND_STD, about=_CHANNELS)
TRAIN_NORMALIZATION = any_of(
  choice(*NORMALIZATIONS, "dataset"),
  _MEAN_AND_STD,
  about=f'{_CHANNELS} "dataset" measures them on the training images.',
)

# The table ----------------------------------------------------------------------------------------------

_CROPS = (
  "How a training image is cropped: a box of random area and aspect; after padding; not at all; or together "
  "with its label map."
)
_SCALE = "Range of the crop's area as a share of the image. For a joint crop: of the factor of the side."
_VIEW = {
  "crop": choice("random_resized", "pad", "none", "joint", about=_CROPS),
  "scale": interval(0, None, _SCALE),
  "ratio": interval(0, None, "Range of the crop's aspect, width / height."),
  "padding": whole(0, "Number of black pixels that are added on each side before the crop."),
  "interpolation": INTERPOLATION,
  "antialias": flag("Whether the filter widens when it shrinks an image."),
  "rand_augment": Rule(
    str,
    'a policy such as "rand-m9-mstd0.5-inc1"',
    lambda value: (
      re.fullmatch(r"rand(-(m|mstd|n|p|inc)\d+(\.\d+)?)+", value) is not None and "-inc1" in value
    ),
    "RandAugment policy in timm's notation, which changes the cropped image. None: no change.",
    optional=True,
  ),
  "shorter": whole(1, "Shorter side of the image before the joint crop, in pixels.").or_none(),
  "longer": whole(1, "Longest side of the image before the joint crop, in pixels.").or_none(),
  "max_class_share": number(0, 1, "Largest share of one class in a joint crop.", above=True),
  "max_pixels": whole(1, "Most pixels of an image that is read. A larger image counts as corrupt."),
  "prefetch": whole(1, "Number of batches that are made ahead."),
}

_RESUME = (
  "What happens if the run's saved config differs in a way that changes its numbers: check refuses, force "
  "goes on."
)
_FLIGHT = (
  "Whether the last good state is kept in the host's memory. If a step is not finite, its steps are written "
  "to WORKDIR/flight."
)
_RESIDENT = (
  "Whether all images of the training set lie on every device, as uint8. Crops are then made there. For sets "
  "of small images of one size, such as CIFAR-10."
)
_STEPS_PER_CALL = (
  "Number of steps that the host gives to the devices at once. Reports, checkpoints and evaluations keep "
  "their steps. A SIGTERM waits for the end of a call."
)
RUN_OPTIONS: dict[str, Rule] = {
  "task": text("What is learned: a file of dtm_jax/tasks."),
  "seed": whole(0, "Seed of all random draws.", high=2**32 - 1),
  "batch_size": whole(1, "Global batch: number of images in a step over all devices and hosts."),
  **durations("total", "Length of the run. 0: the run only evaluates."),
  "resume": choice("check", "force", about=_RESUME).or_none(),
  "replay": text(
    "Folder WORKDIR/flight/STEP of a recording. Its steps are run again, to find the first NaN."
  ).or_none(),
  "data.split": SPLIT,
  "data.image_size": SIZE,
  "data.device_resident": flag(_RESIDENT),
  "data.num_threads": whole(1, "Number of threads of each host that decode images."),
  **below("data.view", _VIEW),
  "mesh.data": whole(
    1, "Number of groups of devices that split the batch. -1: all that mesh.fsdp leaves.", also=(-1,)
  ),
  "mesh.fsdp": whole(
    1, "Number of devices that split the parameters. -1: all that mesh.data leaves.", also=(-1,)
  ),
  "mesh.rules": Rule(
    tuple,
    "a tuple of pairs (pattern of parameters, replicated or fsdp)",
    lambda rules: (
      bool(rules) and all(PATTERN.problem(pattern) is None and tactic in TACTICS for pattern, tactic in rules)
    ),
    "How parameters are laid out. The first pattern that matches the whole path of a parameter decides.",
  ),
  "train.steps_per_call": whole(1, _STEPS_PER_CALL),
  **below("checkpoint", durations("save", "Distance of two checkpoints.", above=True)),
  "checkpoint.keep": whole(1, "Number of newest checkpoints that are kept."),
  **below(
    "checkpoint",
    durations(
      "keep", "Checkpoints at multiples of this are always kept. None: only the newest are.", above=True
    ),
  ),
  **below("log", durations("log", "Distance of two reports of loss and speed.", above=True)),
  "log.flight_recorder": flag(_FLIGHT),
  "log.report": flag("Whether the run writes report.html into its workdir when it ends."),
  "log.writers": several(
    choice("wandb", "mlflow"),
    "Services that get the numbers beside TensorBoard. Each needs the extra of its name.",
    empty=True,
  ),
  "log.profile_step": whole(1, "First of five steps that are profiled. None: no profile.").or_none(),
}
