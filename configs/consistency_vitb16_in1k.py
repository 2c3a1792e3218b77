"""Study single tokens of CLIP ViT-B/16 on ImageNet-1k's 50,000 validation images, in 98 groups of 196 tokens.

    python -m dtm_jax.main --config=configs/consistency_vitb16_in1k.py [--config.clip.path=FOLDER]
    python scripts/consistency_report.py --workdir=runs/consistency_vitb16_in1k --out=consistency.html

Hardware: meant for one GPU or more. A batch needs about 2 GB on the devices, and 0.4 GB on the host while the
probes are fitted. Hours: not measured.
Expect: not measured. At second hand, without and with morphing: zero-shot 26.5 and 30.8 %, linear probe 44.2
and 46.3 % (perhaps another probe than ours), cosine of neighbours 0.53 and 0.56.

The probes are fitted on 20,000 training images at even distances, 20 of each class if the images are sorted
by class.
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
