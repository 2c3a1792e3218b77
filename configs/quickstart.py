"""Pre-train a small student with DTM on CIFAR-10, with the tiny CLIP of this repository as teacher.

    bash scripts/quickstart.sh
    python -m dtm_jax.main --config=configs/quickstart.py     # the same without making an environment

Hardware: two CPU cores. Time: two to seven minutes, measured on two machines.
Expect: kNN accuracy 26.2 % untrained, 37.4 % after 300 steps, and 64.1 % for the teacher, with 10,000 images
in the bank and 2,000 queries. Source: our own run. Three seeds with all test images: 38.1 % +- 0.6
(docs/results.md).
"""

from configs import common, vitb16
from configs.common import durations


def get_config():
  config = vitb16.get_config()
  config.batch_size = 128
  config.total_epochs = None
  config.total_steps = 300
  config.data = common.cifar10(crop="random_resized", scale=(0.4, 1.0))
  config.augment.color_jitter = 0.0
  config.teacher.update(path="assets/tiny_clip_cifar10", tokens="normalized", dtype="float32")
  config.student = common.small_vit()
  config.mask.update(share=25 / 64, min_block=4 / 64)
  config.morphers.dtm.max_rounds = 6
  config.morphers.tokens = dict(name="identity", weight=0.0)  # weight 0: the token-wise loss is only measured
  config.optim.update(lr=1.5e-3, lr_scaling="none", warmup_steps=50, clip_norm=3.0)
  config.checkpoint.save_steps = 200
  config.log.log_steps = 50
  config.evals = dict(
    knn=dict(
      **common.same_data(config.data),
      features=("student", "teacher"),
      k=20,
      temperature=0.07,
      max_bank=10_000,
      max_queries=2_000,
      at_start=True,
      **durations("every"),
    ),
    snapshots=common.snapshots(steps=100),
  )
  return config
