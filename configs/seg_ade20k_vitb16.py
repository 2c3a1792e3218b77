"""Semantic segmentation with a pre-trained ViT-B/16 and UPerNet on ADE20K, by the recipe of BEiT v2-B.

    python -m dtm_jax.main --config=configs/seg_ade20k_vitb16.py \\
        --config.init_from.path=RUN_OR_WEIGHTS --config.data.dataset.data_dir=ADEChallengeData2016 \\
        --workdir=gs://BUCKET/vitb16_ade20k

Hardware: made for 16 TPU v4 chips or 8 H100; not yet run at this scale, so no hours and no mIoU of ours.
160,000 steps of 16 images, rate 5e-5 after 1,500 steps of warm-up and then straight down to zero, layer decay
0.75, drop path 0.15, crops of 512 pixels and windows every 341 are BEiT v2-B's released configuration. Two
differences: the loss is the mean over labelled pixels only, and the colours change by `color_jitter` in place
of mmseg's distortion, which has hue too and leaves each part out half of the time.

A linear head: `--config.model.head=linear`; a linear probe: also
`--config.optim.frozen="('patch_embed/.*','blocks/.*','cls_token','norm/.*')"`. Another data set:
`--config.data.dataset.name=segmentation_folder`; it is evaluated on that too. Classes are the data set's.
"""

from ml_collections import config_dict

from configs import durations, finetune_vitb16_in1k, references, vitb16

placeholder = config_dict.placeholder


def get_config():
  base, finetune = vitb16.get_config(), finetune_vitb16_in1k.get_config()
  config = config_dict.ConfigDict()
  config.task = "segment"
  config.seed = 0
  config.resume = "check"  # "force": go on in a workdir whose run had other settings
  config.replay = placeholder(str)  # WORKDIR/flight/STEP: runs these steps again, to find what is not finite
  config.batch_size = 16
  config.update(durations("total", steps=160_000))

  config.data = dict(
    dataset=dict(name="ade20k", data_dir=placeholder(str)),
    split="train",
    image_size=512,
    num_threads=64,
    view=dict(
      crop="joint",
      scale=(0.5, 2.0),
      max_class_share=0.75,
      interpolation="bilinear",
      antialias=False,
      max_pixels=200_000_000,
    ),
  )
  config.augment = dict(flip=0.5, color_jitter=0.25, normalization="imagenet")
  config.model = dict(
    variant="B",
    patch_size=16,
    head="upernet",
    channels=placeholder(int),  # None: the trunk's width
    auxiliary_channels=256,
    dropout=0.1,
    rel_pos_bias=True,
    shared_rel_pos_bias=False,
    abs_pos_emb=False,
    layer_scale_init=0.1,
    drop_path=0.15,
    remat="elementwise",
    dtype="bfloat16",
  )
  config.init_from = finetune.init_from
  config.loss = dict(auxiliary=0.4)
  config.optim = dict(
    name="adamw",
    lr=5e-5,
    lr_scaling="none",
    final_lr=0.0,
    decay="linear",
    **durations("warmup", steps=1500),
    betas=(0.9, 0.999),
    weight_decay=0.05,
    layer_decay=0.75,
    clip_norm=0.0,
    accumulate=1,
    frozen=(),
  )
  config.mesh = base.mesh
  config.checkpoint = base.checkpoint
  config.log = base.log
  config.evals = dict(
    val=dict(
      name="segmentation",
      dataset=references(config.data.dataset),
      split="val",
      image_size=config.data.get_oneway_ref("image_size"),
      crop=placeholder(int),  # None: image_size
      stride=placeholder(int),  # None: two thirds of crop, so 341 of 512
      windows=4,
      **durations("every", steps=16_000),
    ),
  )
  return config
