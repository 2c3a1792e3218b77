"""Study how well single tokens of a CLIP know their image's class, alone and averaged in groups, on CIFAR-10.

    python -m dtm_jax.main --config=configs/consistency.py [--config.clip.path=FOLDER_OR_REPOSITORY]
    python scripts/consistency_report.py --workdir=runs/consistency --out=consistency.html

Hardware: two CPU cores. Time: two minutes, measured.
Expect: zero-shot accuracy of single tokens 35.0 %, 35.4 % after bipartite matching and 38.4 % in random
groups. Source: our own run of all 10,000 test images; the table is in docs/results.md.

It groups the 64 tokens of this repository's tiny CLIP into 32 groups by every morpher. "random" is the
control, which shows the effect of averaging alone. Another CLIP needs its own size:
`--config.evals.consistency.image_size=224 --config.evals.consistency.resize=224`.
"""

from configs import common, zeroshot_cifar10
from configs.common import durations, placeholder

GROUPS = 32


def get_config():
  config = zeroshot_cifar10.get_config()
  config.evals = dict(
    consistency=dict(
      **common.same_data(config.data),
      fit="train",
      max_fit=5000,
      fit_evenly=False,
      batch_size=250,
      split="test",
      prompts="cifar10",
      resize=placeholder(int),  # default: image_size
      **durations("every"),
      morphers=dict(
        bipartite=dict(name="bipartite", min_groups=GROUPS, max_groups=GROUPS),
        kmeans=dict(name="kmeans", groups=GROUPS),
        kmedoids=dict(name="kmedoids", groups=GROUPS),
        superpixel=dict(name="superpixel", groups=GROUPS),
        random=dict(name="random", groups=GROUPS),
        image=dict(name="image"),
      ),
    ),
  )
  return config
