"""Overfit a small segmenter to three real photos, to show that files, labels, loss and mIoU fit together.

    python scripts/get_segmentation_photos.py --out runs/segmentation_photos
    python -m dtm_jax.main --config=configs/seg_photos.py

Hardware: two CPU cores. Time: 3 min 14 s while other programs ran, measured.
Expect: mIoU 0.498 and pixel accuracy 0.911 on the same three photos. Source: our own run, one seed. The
evaluation is on the training photos, so the number says nothing about segmentation.
"""

from configs import seg_debug
from configs.common import references


def get_config():
  config = seg_debug.get_config()
  config.data.dataset = dict(name="segmentation_folder", data_dir="runs/segmentation_photos")
  config.evals.val.dataset = references(config.data.dataset)
  config.data.image_size = 128
  config.model.patch_size = 16
  config.total_steps = 200
  config.checkpoint.save_steps = 200
  config.evals.val.update(split="train", stride=None, every_steps=200)
  return config
