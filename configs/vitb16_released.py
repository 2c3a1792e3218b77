"""DTM pre-training of ViT-B/16 as the authors' released code computes it, where that differs from the paper.

    python -m dtm_jax.main --config=configs/vitb16_released.py --workdir=gs://BUCKET/vitb16_released

The constant merge rate with one draw a step, alternating split, protected first patch, a teacher that sees
the student's normalisation, and crops that Pillow resizes with antialiasing. That code ignores the EXIF
orientation of photos, which we apply. Not yet run at full size: no hours and no accuracy of ours.
"""

from configs import vitb16


def get_config():
  config = vitb16.get_config()
  config.data.view.antialias = True
  config.teacher.normalization = "imagenet"
  config.morphers.dtm.update(schedule="released", drawn_per="step", split="alternate", protect_first=True)
  return config
