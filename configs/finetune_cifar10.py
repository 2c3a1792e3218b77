"""Fine-tuning of the quickstart's student on CIFAR-10.

    python -m dtm_jax.main --config=configs/finetune_cifar10.py --workdir=runs/finetune_cifar10

It starts from runs/quickstart; an empty `--config.init_from.path=` starts from random weights instead.
Another set of small images is a name away, `--config.data.dataset.name=tfds/cifar100`: see
finetune_vitb16_in1k.
"""

from ml_collections import config_dict

from configs import durations, finetune_vitb16_in1k, references


def get_config():
  config = finetune_vitb16_in1k.get_config()
  config.batch_size = 128
  config.total_epochs = None
  config.total_steps = 400
  config.data = dict(
    dataset=dict(name="cifar10", data_dir=config_dict.placeholder(str)),
    split="train",
    image_size=32,
    num_threads=2,
    view=dict(crop="pad", padding=4, max_pixels=200_000_000),
  )
  config.augment.erase_prob = 0.0
  config.mix.update(mixup=0.0, cutmix=0.0)
  config.model = dict(
    variant="Ti", width=96, depth=4, num_heads=3, patch_size=4, remat="none", drop_path=0.0, dtype="float32"
  )
  config.init_from.path = "runs/quickstart"
  config.optim.update(lr=1e-3, warmup_steps=50, layer_decay=0.75)
  config.ema.decay = 0.99
  config.checkpoint.save_steps = 200
  config.log.log_steps = 50
  config.evals = dict(
    test=dict(
      name="classification",
      dataset=references(config.data.dataset),
      split=config_dict.placeholder(str),
      outputs=config_dict.placeholder(tuple),  # None: logits, and logits_ema if there is one
      image_size=config.data.get_oneway_ref("image_size"),
      crop_pct=1.0,
      **durations("every"),
    ),
  )
  return config
