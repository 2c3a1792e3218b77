"""Zero-shot accuracy of a trained CLIP on CIFAR-10's 10,000 test images, with 18 prompt templates.

    python -m dtm_jax.main --config=configs/zeroshot_cifar10.py [--config.clip.path=FOLDER_OR_REPOSITORY]

The tiny CLIP of this repository takes half a minute on two CPU cores and reaches 75.29 %. For another CLIP
set `--config.evals.zeroshot.image_size=224 --config.evals.zeroshot.resize=224`, its own size.
"""

from ml_collections import config_dict

from configs import tiny_clip_cifar10


def get_config():
  config = tiny_clip_cifar10.get_config()
  config.task = "frozen_clip"
  config.total_steps = 0
  config.clip = dict(
    path="assets/tiny_clip_cifar10",
    revision=config_dict.placeholder(str),
    normalization="clip",
    dtype="float32",
  )
  return config
