"""Pre-train one variant of the paper's comparisons on CIFAR-10, in a few minutes on two CPU cores.

    bash scripts/comparisons.sh a                                   # all variants of one comparison
    python -m dtm_jax.main --config=configs/comparisons_cifar10.py  # a single run

Hardware: two CPU cores. Time: three to four minutes, measured.
Expect: kNN 29.5 % +- 0.3 and linear probe 36.2 % +- 0.1, from three seeds (results/cifar10_a/table.md).

A run does a sixth of the quickstart's work: 200 steps of 64 images with a student of width 64. kNN and the
linear probe use 5,000 training images and the first 5,000 test images.
"""

from configs import common, quickstart
from configs.common import durations


def get_config():
  config = quickstart.get_config()
  config.batch_size = 64
  config.total_steps = 200
  config.student.update(width=64, num_heads=2, unroll=4)
  config.optim.update(lr=2e-3, warmup_steps=20)
  frozen = dict(features=("student",), **common.same_data(config.data), **durations("every"))
  config.evals = dict(
    knn=dict(**frozen, bank="train[:5000]", queries="test[:5000]", k=20, temperature=0.07),
    linear=dict(**frozen, fit="train[:5000]", held_out="train[5000:6000]", split="test[:5000]"),
  )
  return config
