"""Fine-tuning of a pre-trained ViT-B/16 on ImageNet-1k, by the recipe of DTM, which is that of BEiT v2.

    python -m dtm_jax.main --config=configs/finetune_vitb16_in1k.py \\
        --config.init_from.path=RUN_OR_WEIGHTS --workdir=gs://BUCKET/vitb16_finetuned

Hardware: made for 32 TPU v4 chips or 8 H100; not yet run at this scale, so no hours and no accuracy of ours.
100 epochs with 20 of warm-up are BEiT v2-B's (arXiv 2208.06366); the rest is what the DTM authors run.

Any other labelled set is a name away: `--config.data.dataset.name=tfds/oxford_iiit_pet`, or
`--config.data.dataset.name=folder --config.data.dataset.data_dir=FOLDER`. Its classes are its own; it is
evaluated on its split "val", "validation" or "test", whichever there is first, or on
`--config.evals.val.split=...`. `--config.data.image_size=0` takes the size of its images where they have
one, and `--config.augment.normalization=dataset` the mean and standard deviation of their channels.
"""

from ml_collections import config_dict

from configs import durations, references, vitb16

placeholder = config_dict.placeholder


def get_config():
  base = vitb16.get_config()
  config = config_dict.ConfigDict()
  config.task = "finetune"
  config.seed = 0
  config.resume = "check"  # "force": go on in a workdir whose run had other settings
  config.replay = placeholder(str)  # WORKDIR/flight/STEP: runs these steps again, to find what is not finite
  config.batch_size = 1024
  config.update(durations("total", epochs=100.0))

  config.data = dict(
    dataset=dict(name="imagenet", data_dir=placeholder(str)),
    split="train",
    image_size=224,
    num_threads=64,
    view=dict(
      crop="random_resized",
      scale=(0.08, 1.0),
      interpolation="bicubic",
      antialias=False,
      rand_augment="rand-m9-mstd0.5-inc1",
      max_pixels=200_000_000,
    ),
  )
  config.augment = dict(flip=0.5, color_jitter=0.0, erase_prob=0.25, normalization="imagenet")
  config.mix = dict(mixup=0.8, cutmix=1.0, cutmix_prob=0.5)
  config.model = dict(
    variant="B",
    patch_size=16,
    pooling="mean",
    rel_pos_bias=True,
    shared_rel_pos_bias=False,
    abs_pos_emb=False,
    layer_scale_init=0.1,
    drop_path=0.1,
    head_init_scale=0.001,
    remat="elementwise",
    dtype="bfloat16",
  )
  config.init_from = dict(path=placeholder(str), weights=placeholder(str), rel_pos="both", resize="geometric")
  config.loss = dict(label_smoothing=0.1)
  config.optim = dict(
    name="adamw",
    lr=5e-4,
    lr_scaling="none",
    final_lr=1e-6,
    **durations("warmup", epochs=20.0),
    betas=(0.9, 0.999),
    weight_decay=0.05,
    layer_decay=0.65,
    clip_norm=0.0,
    accumulate=1,
  )
  config.ema = dict(decay=placeholder(float))
  config.mesh = base.mesh
  config.checkpoint = base.checkpoint
  config.log = base.log
  config.evals = dict(
    val=dict(
      name="classification",
      dataset=references(config.data.dataset),
      split=placeholder(str),
      outputs=("logits",),
      image_size=config.data.get_oneway_ref("image_size"),
      batch_size=1536,
      **durations("every", epochs=1.0),
    ),
  )
  return config
