"""Measure the zero-shot accuracy of CLIP ViT-B/16 on ImageNet-1k's 50,000 validation images, with 80
templates.

    python -m dtm_jax.main --config=configs/zeroshot_vitb16_in1k.py [--config.clip.path=FOLDER_OR_REPOSITORY]

Hardware: not chosen. Time: not measured.
Expect: not measured. At second hand: 68.6 % by CLIP's paper (arXiv 2103.00020), and 68.3 % for the same
weights by the README of open_clip. The templates are OpenAI's.

Other templates: `--config.evals.zeroshot.prompts=FILE`, one per line, with {c} for the class. Other names:
`--config.evals.zeroshot.class_names=FILE`, one per line.
"""

from configs import zeroshot_cifar10


def get_config():
  config = zeroshot_cifar10.get_config()
  config.batch_size = 512
  config.data.dataset.name = "imagenet"
  config.data.image_size = 224
  config.data.num_threads = 64
  config.clip.path = "openai/clip-vit-base-patch16"
  config.evals.zeroshot.prompts = "imagenet"
  config.evals.zeroshot.resize = 224
  return config
