"""Pre-train one run of the study of the paper's claim: does morphing help more with a noisier teacher?

    bash scripts/comparisons.sh f                              # all runs, on a GPU
    bash scripts/comparisons.sh g --minutes=60                 # a smaller version for two CPU cores
    python -m dtm_jax.main --config=configs/claim_cifar10.py   # a single run

Hardware: meant for one GPU. Time: not measured. Expect: not measured at this size; docs/results.md has the
smaller version.
"""

from configs import common, quickstart
from configs.common import durations


def get_config():
  config = quickstart.get_config()
  config.batch_size = 256
  config.data.device_resident = True
  config.train.steps_per_call = 50
  config.total_steps = None
  config.total_epochs = 50.0
  config.student.update(width=192, depth=12, num_heads=3, drop_path=0.1)
  config.optim.update(warmup_steps=None, warmup_epochs=5.0)
  config.checkpoint.save_steps = 1000
  frozen = dict(features=("student",), **common.same_data(config.data), **durations("every"))
  config.evals = dict(
    knn=dict(**frozen, bank="train", queries="test", k=20, temperature=0.07),
    linear=dict(**frozen, fit="train[:45000]", held_out="train[45000:]", split="test"),
  )
  return config
