"""Five minutes of DTM on CIFAR-10, on two CPU cores, with the tiny CLIP of this repository as teacher.

bash scripts/quickstart.sh       or       python -m dtm_jax.main --config=configs/quickstart.py
"""

from ml_collections import config_dict

from configs import durations, references, vitb16


def get_config():
  config = vitb16.get_config()
  config.batch_size = 128
  config.total_epochs = None
  config.total_steps = 300
  config.data = dict(
    dataset=dict(name="cifar10", data_dir=config_dict.placeholder(str)),
    split="train",
    image_size=32,
    num_threads=2,
    view=dict(crop="random_resized", scale=(0.4, 1.0), max_pixels=200_000_000),
  )
  config.augment.color_jitter = 0.0
  config.teacher.update(path="assets/tiny_clip_cifar10", tokens="normalized", dtype="float32")
  config.student = dict(
    variant="Ti", width=96, depth=4, num_heads=3, patch_size=4, remat="none", drop_path=0.0, dtype="float32"
  )
  config.mask.update(share=25 / 64, min_block=4 / 64)
  config.morphers.dtm.max_rounds = 6
  config.morphers.tokens = dict(name="identity", weight=0.0)  # measured beside, not learned
  config.optim.update(lr=1.5e-3, lr_scaling="none", warmup_steps=50, clip_norm=3.0)
  config.checkpoint.save_steps = 200
  config.log.log_steps = 50
  config.evals = dict(
    knn=dict(
      dataset=references(config.data.dataset),
      image_size=config.data.get_oneway_ref("image_size"),
      features=("student", "teacher"),
      k=20,
      temperature=0.07,
      max_bank=10_000,
      max_queries=2_000,
      at_start=True,
      **durations("every"),
    ),
  )
  return config
