"""DTM pre-training of ViT-L/16: `vitb16` with the large student. The teacher stays CLIP ViT-B/16.

    python -m dtm_jax.main --config=configs/vitl16.py --workdir=gs://BUCKET/vitl16

Not yet run at full size: no hours and no accuracy of ours.
"""

from configs import vitb16


def get_config():
  config = vitb16.get_config()
  config.student.variant = "L"
  config.student.drop_path = 0.2
  config.student.layer_scale_init = 1e-5
  return config
