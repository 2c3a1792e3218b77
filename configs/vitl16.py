"""Pre-train ViT-L/16 with DTM: `vitb16` with the large student. The teacher stays CLIP ViT-B/16.

    python -m dtm_jax.main --config=configs/vitl16.py --workdir=gs://BUCKET/vitl16

Hardware: not chosen. Hours: not measured. Expect: not measured.
"""

from configs import vitb16


def get_config():
  config = vitb16.get_config()
  config.student.update(variant="L", drop_path=0.2, layer_scale_init=1e-5)
  return config
