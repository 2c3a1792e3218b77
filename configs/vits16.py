"""Pre-train ViT-S/16 with DTM: `vitb16` with the small student. The teacher stays CLIP ViT-B/16.

    python -m dtm_jax.main --config=configs/vits16.py --workdir=gs://BUCKET/vits16

Hardware: not chosen. Hours: not measured. Expect: not measured.
"""

from configs import vitb16


def get_config():
  config = vitb16.get_config()
  config.student.update(variant="S", drop_path=0.0)
  return config
