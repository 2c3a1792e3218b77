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

SPLIT = text("split of the data set, or a part of it such as train[:90%]")
PATTERN = regex()
DTYPE = choice("float32", "bfloat16", "float16", about="type of the matrix products")
INTERPOLATION = choice("bicubic", "bilinear", "area", "lanczos", about="filter that resizes images")
SIZE = whole(1, "side of the image in pixels", also=(0,)).or_none(
  "side of the image in pixels; 0: the size of the data set's images"
)
TACTICS = ("replicated", "fsdp")
NORMALIZATIONS = ("imagenet", "clip", "inception")
_TRIPLE = several(number(None), lengths=(3,))
_MEAN_AND_STD = Rule(
  tuple,
  "a pair ((mean, mean, mean), (std, std, std)) with std above 0",
  lambda value: len(value) == 2 and all(_TRIPLE.problem(x) is None for x in value) and min(value[1]) > 0,
)
NORMALIZATION = any_of(
  choice(*NORMALIZATIONS), _MEAN_AND_STD, about="mean and standard deviation of the input channels"
)
TRAIN_NORMALIZATION = any_of(
  choice(*NORMALIZATIONS, "dataset"), _MEAN_AND_STD, about="mean and standard deviation of the input channels"
)

# The table ----------------------------------------------------------------------------------------------

_VIEW = {
  "crop": choice("random_resized", "pad", "none", "joint", about="how a training image is cropped"),
  "scale": interval(0, None, "range of the crop's area, as a share of the image (joint: factor of the side)"),
  "ratio": interval(0, None, "range of the crop's aspect ratio"),
  "padding": whole(0, "black pixels added on each side"),
  "interpolation": INTERPOLATION,
  "antialias": flag("whether the filter widens when it shrinks an image"),
  "rand_augment": Rule(
    str,
    'a policy such as "rand-m9-mstd0.5-inc1"',
    lambda value: (
      re.fullmatch(r"rand(-(m|mstd|n|p|inc)\d+(\.\d+)?)+", value) is not None and "-inc1" in value
    ),
    "RandAugment policy",
    optional=True,
  ),
  "shorter": whole(1, "shorter side of the image before the joint crop").or_none(),
  "longer": whole(1, "longest side of the image before the joint crop").or_none(),
  "max_class_share": number(0, 1, "largest share of one class in a joint crop", above=True),
  "max_pixels": whole(1, "largest image that is read; a larger one counts as corrupt"),
  "prefetch": whole(1, "number of batches that are made ahead"),
}

RUN_OPTIONS: dict[str, Rule] = {
  "task": text("what is learned: a file of dtm_jax/tasks"),
  "seed": whole(0, "seed of all random draws", high=2**32 - 1),
  "batch_size": whole(1, "global batch: images in a step over all devices"),
  **durations("total", "length of the run; 0 only evaluates"),
  "resume": choice("check", "force", about="what to do if the saved config differs").or_none(),
  "replay": text("folder of a flight recording; its steps are run again").or_none(),
  "data.split": SPLIT,
  "data.image_size": SIZE,
  "data.num_threads": whole(1, "number of threads that decode images"),
  **below("data.view", _VIEW),
  "mesh.data": whole(1, "number of devices that split the batch", also=(-1,)),
  "mesh.fsdp": whole(1, "number of devices that also split the parameters", also=(-1,)),
  "mesh.rules": Rule(
    tuple,
    "a tuple of pairs (pattern of parameters, replicated or fsdp)",
    lambda rules: (
      bool(rules) and all(PATTERN.problem(pattern) is None and tactic in TACTICS for pattern, tactic in rules)
    ),
    "which parameters are split",
  ),
  **below("checkpoint", durations("save", "time from one checkpoint to the next", above=True)),
  "checkpoint.keep": whole(1, "number of newest checkpoints that are kept"),
  **below("checkpoint", durations("keep", "checkpoints at multiples of this are always kept", above=True)),
  **below("log", durations("log", "time from one report to the next", above=True)),
  "log.flight_recorder": flag("whether the last good state is kept, to replay steps that are not finite"),
  "log.profile_step": whole(1, "first step of the profile").or_none(),
}
