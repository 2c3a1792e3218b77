"""Measure what single tokens of CLIP ViT-B/16 know about ImageNet-1k's 50,000 validation images.

    python -m dtm_jax.main --config=configs/consistency_vitb16_in1k.py [--config.clip.path=FOLDER]
    python scripts/consistency_report.py --workdir=runs/consistency_vitb16_in1k --out=consistency.html

Hardware: meant for one GPU or more. A batch needs about 2 GB on the devices, and 0.4 GB on the host while the
probes are fitted. Hours: not measured.
Expect: not measured. Second-hand numbers without and with morphing: zero-shot 26.5 and 30.8 %, linear probe
44.2 and 46.3 % (their probe may differ from ours), cosine of neighbours 0.53 and 0.56.

Morphing makes 98 groups from the 196 tokens of an image. The probes are fitted on 20,000 evenly spaced
training images. If the images are sorted by class, these are 20 of each class.
"""

from configs import consistency

GROUPS = 98


def get_config():
  config = consistency.get_config()
  config.batch_size = 128
  config.data.dataset.name = "imagenet"
  config.data.image_size = 224
  config.clip.path = "openai/clip-vit-base-patch16"
  study = config.evals.consistency
  study.update(
    max_fit=20_000,
    fit_evenly=True,
    split="val",
    prompts="imagenet",
    resize=224,
    batch_size=128,
  )
  study.morphers.bipartite.update(min_groups=GROUPS, max_groups=GROUPS)
  for name in ("kmeans", "kmedoids", "superpixel", "random"):
    study.morphers[name].groups = GROUPS
  return config
