"""Zero-shot accuracy of a trained CLIP on CIFAR-10's 10,000 test images, with 18 prompt templates.

    python -m dtm_jax.main --config=configs/zeroshot_cifar10.py [--config.clip.path=FOLDER_OR_REPOSITORY]

The tiny CLIP of this repository takes half a minute on two CPU cores and reaches 75.29 %. For another CLIP
set `--config.data.image_size=224 --config.evals.zeroshot.resize=224`, its own size. Another data set is
a name away, `--config.data.dataset.name=tfds/cifar100`; `prompts` and `class_names` may be files.
"""

from ml_collections import config_dict

from configs import durations, references, tiny_clip_cifar10

placeholder = config_dict.placeholder


def get_config():
  config = tiny_clip_cifar10.get_config()
  config.task = "frozen_clip"
  for section in ("augment", "text", "optim"):  # nothing is learned
    del config[section]
  config.total_steps = 0
  config.clip = dict(
    path="assets/tiny_clip_cifar10",
    revision=placeholder(str),
    normalization="clip",
    dtype="float32",
    heads=placeholder(tuple),  # of image and text tower; with activation only where the files do not tell
    activation=placeholder(str),
    weights=placeholder(str),
  )
  config.evals.zeroshot = dict(
    dataset=references(config.data.dataset),
    prompts="cifar10",
    class_names=placeholder(str),
    split=placeholder(str),
    image_size=config.data.get_oneway_ref("image_size"),
    resize=placeholder(int),
    batch_size=512,
    **durations("every"),
  )
  return config
