"""Fine-tune the quickstart's student on CIFAR-10.

    python -m dtm_jax.main --config=configs/finetune_cifar10.py --workdir=runs/finetune_cifar10

Hardware: two CPU cores. Time: not measured. Expect: not measured at this length. results/cifar10_a/table.md
has numbers for shorter runs.

It starts from runs/quickstart. An empty `--config.init_from.path=` starts from random weights. Another set of
small images: `--config.data.dataset.name=tfds/cifar100`, see finetune_vitb16_in1k.
"""

from configs import common, finetune_vitb16_in1k
from configs.common import durations, placeholder


def get_config():
  config = finetune_vitb16_in1k.get_config()
  config.batch_size = 128
  config.total_epochs = None
  config.total_steps = 400
  config.data = common.cifar10(crop="pad", padding=4)
  config.augment.erase_prob = 0.0
  config.mix.update(mixup=0.0, cutmix=0.0)
  config.model = common.small_vit()
  config.init_from.path = "runs/quickstart"
  config.optim.update(lr=1e-3, warmup_steps=50, layer_decay=0.75)
  config.ema.decay = 0.99
  config.checkpoint.save_steps = 200
  config.log.log_steps = 50
  config.evals = dict(
    test=dict(
      name="classification",
      **common.same_data(config.data),
      split=placeholder(str),  # default: the validation or test split of the data set
      outputs=placeholder(tuple),  # default: logits, and logits_ema if there is a moving average
      crop_pct=1.0,
      **durations("every"),
    ),
  )
  return config
