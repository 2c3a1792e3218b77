"""Measure the zero-shot accuracy of CLIP ViT-B/16 on ImageNet-1k, with 80 templates.

    python -m dtm_jax.main --config=configs/zeroshot_vitb16_in1k.py [--config.clip.path=FOLDER_OR_REPOSITORY]

Hardware: not chosen. Time: not measured.
Expect: not measured. Second-hand numbers: 68.6 % in CLIP's paper (arXiv 2103.00020), and 68.3 % for the same
weights in open_clip's README. The templates are OpenAI's.

The run uses the 50,000 validation images. `--config.evals.zeroshot.prompts=FILE` reads other templates, one
per line, with {c} for the class. `--config.evals.zeroshot.class_names=FILE` reads other class names, one per
line.
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
