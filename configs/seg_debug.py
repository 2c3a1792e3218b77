"""Train semantic segmentation of generated shapes from random weights: minutes on a laptop, no files needed.

    python -m dtm_jax.main --config=configs/seg_debug.py

Hardware: one CPU core. Time: 182 seconds, measured.
Expect: on the 64 images of evals.val, mIoU 0.308, pixel accuracy 0.846 and mean accuracy 0.391. Untrained:
0.042, 0.101 and 0.247. Source: our own run, one seed. Predicting "background" everywhere would give about
0.20, 0.80 and 0.25.
"""

from configs import seg_ade20k_vitb16
from configs.common import placeholder, references


def get_config():
  config = seg_ade20k_vitb16.get_config()
  config.batch_size = 8
  config.total_steps = 250
  config.data.dataset = dict(name="shapes", side=64, num_examples=placeholder(int))
  config.evals.val.dataset = references(config.data.dataset)
  config.data.update(image_size=64, num_threads=2)
  config.data.view.scale = (0.75, 1.5)
  config.augment.color_jitter = 0.0
  config.model.update(
    variant="Ti", width=64, depth=4, num_heads=4, patch_size=8, channels=32, auxiliary_channels=16,
    drop_path=0.0, remat="none", dtype="float32",
  )  # fmt: skip
  config.optim.update(lr=2e-3, warmup_steps=25, layer_decay=1.0)
  config.checkpoint.save_steps = 250
  config.log.log_steps = 50
  config.evals.val.update(split="val[:64]", stride=43, num_threads=2, every_steps=250, at_start=True)
  return config
