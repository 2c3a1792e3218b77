"""DTM pre-training of ViT-S/16: `vitb16` with the small student. The teacher stays CLIP ViT-B/16.

    python -m dtm_jax.main --config=configs/vits16.py --workdir=gs://BUCKET/vits16

Not yet run at full size: no hours and no accuracy of ours.
"""

from configs import vitb16


def get_config():
  config = vitb16.get_config()
  config.student.variant = "S"
  config.student.drop_path = 0.0
  return config
