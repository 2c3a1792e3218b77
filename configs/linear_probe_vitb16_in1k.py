"""Train a linear probe on a frozen ViT-B/16 on ImageNet-1k, with nine learning rates in one pass.

    python -m dtm_jax.main --config=configs/linear_probe_vitb16_in1k.py \\
        --config.teacher.path=RUN_OR_WEIGHTS --workdir=gs://BUCKET/vitb16_probe

Hardware: meant for 32 TPU v4 chips or 8 H100. Hours: not measured. Expect: not measured.

The head is chosen on 1 % of the training images, which are held out, and never on the validation set. Any
teacher can be
probed: `--config.teacher.name=clip --config.teacher.path=...`. For another labelled data set see
finetune_vitb16_in1k.
"""

from configs import common
from configs.common import durations, placeholder


def get_config():
  config = common.run("linear_probe", 4096, epochs=20.0)
  config.data = common.imagenet(split="train[:99%]", **common.random_resized((0.08, 1.0)))
  config.augment = dict(flip=0.5)
  config.teacher = common.frozen_run()
  config.probe = dict(
    rates=(0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0),  # each multiplies the learning rate of optim
    statistics_momentum=0.9,  # for the running mean and variance of the features
  )
  config.optim = dict(
    name="sgd",
    lr=0.1,
    lr_scaling="linear",
    final_lr=0.0,
    **durations("warmup"),
    betas=(0.9,),
    weight_decay=0.0,
    clip_norm=0.0,  # 0: no clipping
    accumulate=1,
  )
  config.evals = dict(
    test=dict(
      name="best_head",
      **common.same_data(config.data),
      held_out="train[99%:]",
      split=placeholder(str),  # default: the validation or test split of the data set
      crop_pct=0.875,
      batch_size=1536,
      **durations("every", epochs=5.0),
    ),
  )
  return config
