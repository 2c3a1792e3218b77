"""A tiny CLIP on CIFAR-10: the teacher of the quickstart. Captions are the class names in 18 templates.

    python -m dtm_jax.main --config=configs/tiny_clip_cifar10.py
    # stopped (SIGTERM) at step 2551, then for the rest with all patches:
    python -m dtm_jax.main --config=configs/tiny_clip_cifar10.py --config.clip.patch_dropout=0.0

That is label supervision in text form. The weights in assets/tiny_clip_cifar10 are what these two commands
gave in half an hour on two CPU cores: 75.3 % zero-shot on the 10,000 test images.
"""

from ml_collections import config_dict

from configs import durations, references, vitb16

placeholder = config_dict.placeholder


def get_config():
  base = vitb16.get_config()
  config = config_dict.ConfigDict()
  config.task = "contrastive"
  config.seed = 0
  config.resume = "check"  # "force": go on in a workdir whose run had other settings
  config.replay = placeholder(str)  # WORKDIR/flight/STEP: runs these steps again, to find what is not finite
  config.batch_size = 128
  config.update(durations("total", steps=3000))
  config.data = dict(
    dataset=dict(name="cifar10", data_dir=placeholder(str)),
    split="train",
    image_size=32,
    num_threads=2,
    view=dict(crop="pad", padding=4, max_pixels=200_000_000),
  )
  config.augment = dict(flip=0.5, color_jitter=0.0, normalization="clip")
  config.clip = dict(
    patch_size=4,
    image=dict(width=96, depth=4, num_heads=3, mlp_width=384),
    text=dict(width=32, depth=2, num_heads=2, mlp_width=64),
    embed_dim=64,
    patch_dropout=0.5,
    dtype="float32",
  )
  config.text = dict(prompts="cifar10", context_length=16)
  config.optim = dict(
    name="muon",
    lr=5e-3,
    lr_scaling="none",
    final_lr=0.0,
    **durations("warmup", steps=100),
    betas=(0.9, 0.98),
    weight_decay=0.05,
  )
  config.mesh = base.mesh
  config.checkpoint = base.checkpoint
  config.log = base.log
  config.evals = dict(
    zeroshot=dict(
      dataset=references(config.data.dataset),
      prompts="cifar10",
      image_size=config.data.get_oneway_ref("image_size"),
      **durations("every"),
    ),
  )
  return config
