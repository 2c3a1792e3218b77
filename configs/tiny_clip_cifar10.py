"""Train the quickstart's teacher, a tiny CLIP, on CIFAR-10. Captions are the class names in 18 templates.

    python -m dtm_jax.main --config=configs/tiny_clip_cifar10.py
    # stopped with SIGTERM at step 2551, then continued with all patches:
    python -m dtm_jax.main --config=configs/tiny_clip_cifar10.py --config.clip.patch_dropout=0.0

Hardware: two CPU cores. Time: half an hour, measured.
Expect: 75.3 % zero-shot accuracy on the 10,000 test images. Source: our own run of these two commands, which
made the weights in assets/tiny_clip_cifar10. The captions are labels in text form, so this is supervised
training.
"""

from configs import common
from configs.common import durations


def get_config():
  config = common.run("contrastive", 128, steps=3000)
  config.data = common.cifar10(crop="pad", padding=4)
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
  config.evals = dict(
    zeroshot=dict(**common.same_data(config.data), prompts="cifar10", **durations("every")),
  )
  return config
