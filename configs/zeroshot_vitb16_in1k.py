"""Zero-shot accuracy of CLIP ViT-B/16 on ImageNet-1k's 50,000 validation images, with OpenAI's 80 templates.

    python -m dtm_jax.main --config=configs/zeroshot_vitb16_in1k.py [--config.clip.path=FOLDER_OR_REPOSITORY]

Expected, at second hand: 68.6 % top-1 by CLIP's paper (arXiv 2103.00020), 68.3 % as the README of open_clip
has measured the same weights. Not run by us. Other templates: `--config.evals.zeroshot.prompts=FILE`, one a
line, {c} for the class; other names: `--config.evals.zeroshot.class_names=FILE`, one a line.
"""

from ml_collections import config_dict

from configs import zeroshot_cifar10
from configs.finetune_vitb16_in1k import references


def get_config():
  config = zeroshot_cifar10.get_config()
  config.batch_size = 512
  config.data.dataset.name = "imagenet"
  config.data.image_size = 224
  config.data.num_threads = 64
  config.clip.path = "openai/clip-vit-base-patch16"
  config.evals.zeroshot = dict(
    dataset=references(config.data.dataset),
    prompts="imagenet",
    class_names=config_dict.placeholder(str),
    split=config_dict.placeholder(str),
    image_size=config.data.get_oneway_ref("image_size"),
    resize=224,
    batch_size=512,
  )
  return config
