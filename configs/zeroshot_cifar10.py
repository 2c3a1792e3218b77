"""Measure the zero-shot accuracy of a CLIP on CIFAR-10's 10,000 test images, with 18 prompt templates.

    python -m dtm_jax.main --config=configs/zeroshot_cifar10.py [--config.clip.path=FOLDER_OR_REPOSITORY]

Hardware: two CPU cores. Time: half a minute, measured.
Expect: 75.29 % for the tiny CLIP of this repository. Source: our own run.

Another CLIP needs its own size: `--config.data.image_size=224 --config.evals.zeroshot.resize=224`. Another
data set: `--config.data.dataset.name=tfds/cifar100`. `prompts` and `class_names` may be files.
"""

from configs import common
from configs.common import durations, placeholder


def get_config():
  config = common.evaluation_only("frozen_clip", 128)
  config.data = common.cifar10(crop="pad", padding=4)
  config.clip = dict(
    path="assets/tiny_clip_cifar10",
    revision=placeholder(str),
    normalization="clip",
    dtype="float32",
    heads=placeholder(tuple),  # of the image and text towers, if the files do not give them
    activation=placeholder(str),  # if the files do not give it
    weights=placeholder(str),
  )
  config.evals = dict(
    zeroshot=dict(
      **common.same_data(config.data),
      prompts="cifar10",
      class_names=placeholder(str),  # default: the names of the data set
      split=placeholder(str),  # default: the validation or test split of the data set
      resize=placeholder(int),  # default: image_size
      batch_size=512,
      **durations("every"),
    ),
  )
  return config
