"""Zero-shot accuracy of CLIP ViT-B/16 on ImageNet-1k's 50,000 validation images, with OpenAI's 80 templates.

    python -m dtm_jax.main --config=configs/zeroshot_vitb16_in1k.py [--config.clip.path=FOLDER_OR_REPOSITORY]

Expected, at second hand: 68.6 % top-1 by CLIP's paper (arXiv 2103.00020), 68.3 % as the README of open_clip
has measured the same weights. Not run by us. Other templates: `--config.evals.zeroshot.prompts=FILE`, one a
line, {c} for the class; other names: `--config.evals.zeroshot.class_names=FILE`, one a line.
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
