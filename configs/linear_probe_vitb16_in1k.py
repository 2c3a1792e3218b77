"""A linear probe of a pre-trained ViT-B/16 on ImageNet-1k: frozen features, nine learning rates in one pass.

    python -m dtm_jax.main --config=configs/linear_probe_vitb16_in1k.py \\
        --config.teacher.path=RUN_OR_WEIGHTS --workdir=gs://BUCKET/vitb16_probe

Any other teacher can be probed: `--config.teacher.name=clip --config.teacher.path=...`. The head is chosen on
the 1 % of the training images that are held out, never on the validation set. Another labelled set is a name
away, as in finetune_vitb16_in1k.
Hardware: made for 32 TPU v4 chips or 8 H100; not yet run at this scale, so no hours and no accuracy of ours.
"""

from ml_collections import config_dict

from configs import durations, references, vitb16

placeholder = config_dict.placeholder


def get_config():
  base = vitb16.get_config()
  config = config_dict.ConfigDict()
  config.task = "linear_probe"
  config.seed = 0
  config.resume = "check"  # "force": go on in a workdir whose run had other settings
  config.replay = placeholder(str)  # WORKDIR/flight/STEP: runs these steps again, to find what is not finite
  config.batch_size = 4096
  config.update(durations("total", epochs=20.0))

  config.data = dict(
    dataset=dict(name="imagenet", data_dir=placeholder(str)),
    split="train[:99%]",
    image_size=224,
    num_threads=64,
    view=dict(
      crop="random_resized",
      scale=(0.08, 1.0),
      interpolation="bicubic",
      antialias=False,
      max_pixels=200_000_000,
    ),
  )
  config.augment = dict(flip=0.5)
  config.teacher = dict(name="checkpoint", path=placeholder(str), image_size=placeholder(int))
  config.probe = dict(
    rates=(0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0),  # times the schedule of optim
    statistics_momentum=0.9,  # of the features' running mean and variance
  )
  config.optim = dict(
    name="sgd",
    lr=0.1,
    lr_scaling="linear",
    final_lr=0.0,
    **durations("warmup"),
    betas=(0.9,),
    weight_decay=0.0,
    clip_norm=0.0,
    accumulate=1,
  )
  config.mesh = base.mesh
  config.checkpoint = base.checkpoint
  config.log = base.log
  config.evals = dict(
    test=dict(
      name="best_head",
      dataset=references(config.data.dataset),
      held_out="train[99%:]",
      split=placeholder(str),
      image_size=config.data.get_oneway_ref("image_size"),
      crop_pct=0.875,
      batch_size=1536,
      **durations("every", epochs=5.0),
    ),
  )
  return config
