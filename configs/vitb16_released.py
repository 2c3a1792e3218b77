"""Pre-train ViT-B/16 with DTM as the authors' released code does, where it differs from the paper.

    python -m dtm_jax.main --config=configs/vitb16_released.py --workdir=gs://BUCKET/vitb16_released

Hardware: meant for 32 TPU v4 chips or 8 H100. Hours: not measured. Expect: not measured.

The differences are a constant merge rate with one draw per step, an alternating split, a protected first
patch, a teacher with the student's normalisation, and antialiased crops like Pillow's: see docs/method.md.
The released code ignores the EXIF orientation of photos; we apply it.
"""

from configs import vitb16


def get_config():
  config = vitb16.get_config()
  config.data.view.antialias = True
  config.teacher.normalization = "imagenet"
  config.morphers.dtm.update(schedule="released", drawn_per="step", split="alternate", protect_first=True)
  return config
