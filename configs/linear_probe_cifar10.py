"""Train a linear probe on the quickstart's frozen student on CIFAR-10, with nine learning rates in one pass.

    python -m dtm_jax.main --config=configs/linear_probe_cifar10.py --workdir=runs/linear_probe_cifar10

Hardware: two CPU cores. Time: not measured. Expect: not measured.

It probes runs/quickstart. To probe its teacher:
`--config.teacher.name=clip --config.teacher.path=assets/tiny_clip_cifar10`.
"""

from configs import common, linear_probe_vitb16_in1k
from configs.common import durations, placeholder


def get_config():
  config = linear_probe_vitb16_in1k.get_config()
  config.batch_size = 256
  config.total_epochs = None
  config.total_steps = 400
  config.data = common.cifar10(split="train[:90%]", crop="random_resized", scale=(0.4, 1.0))
  config.teacher.path = "runs/quickstart"
  config.checkpoint.save_steps = 200
  config.log.log_steps = 50
  config.evals = dict(
    test=dict(
      name="best_head",
      **common.same_data(config.data),
      held_out="train[90%:]",
      split=placeholder(str),  # default: the validation or test split of the data set
      crop_pct=1.0,
      **durations("every"),
    ),
  )
  return config
