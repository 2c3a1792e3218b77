"""The consistency study: do the tokens of a CLIP know their image's class, alone and averaged in groups?

    python -m dtm_jax.main --config=configs/consistency.py [--config.clip.path=FOLDER_OR_REPOSITORY]

The tiny CLIP of this repository on CIFAR-10, 64 tokens in 32 groups by every morpher; "random" is the
control: what averaging alone does. Two minutes on two CPU cores; scripts/consistency_report.py makes a page
of it. Another CLIP needs its own size, `--config.evals.consistency.image_size=224` and `resize=224`.
"""

from ml_collections import config_dict

from configs import durations, zeroshot_cifar10

GROUPS = 32


def get_config():
  config = zeroshot_cifar10.get_config()
  evaluation = config.evals.zeroshot
  config.evals = dict(
    consistency=dict(
      dataset=evaluation.dataset,
      fit="train",
      max_fit=5000,
      fit_evenly=False,
      batch_size=250,
      split="test",
      prompts=evaluation.prompts,
      image_size=evaluation.image_size,
      resize=config_dict.placeholder(int),
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
