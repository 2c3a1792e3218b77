"""A linear probe of the quickstart's student on CIFAR-10.

    python -m dtm_jax.main --config=configs/linear_probe_cifar10.py --workdir=runs/linear_probe_cifar10

It probes runs/quickstart; the teacher instead, with
`--config.teacher.name=clip --config.teacher.path=assets/tiny_clip_cifar10`.
"""

from ml_collections import config_dict

from configs import durations, linear_probe_vitb16_in1k, references


def get_config():
  config = linear_probe_vitb16_in1k.get_config()
  config.batch_size = 256
  config.total_epochs = None
  config.total_steps = 400
  config.data = dict(
    dataset=dict(name="cifar10", data_dir=config_dict.placeholder(str)),
    split="train[:90%]",
    image_size=32,
    num_threads=2,
    view=dict(crop="random_resized", scale=(0.4, 1.0), max_pixels=200_000_000),
  )
  config.teacher.path = "runs/quickstart"
  config.checkpoint.save_steps = 200
  config.log.log_steps = 50
  config.evals = dict(
    test=dict(
      name="best_head",
      dataset=references(config.data.dataset),
      held_out="train[90%:]",
      split=config_dict.placeholder(str),
      image_size=config.data.get_oneway_ref("image_size"),
      crop_pct=1.0,
      **durations("every"),
    ),
  )
  return config
