"""Train semantic segmentation with a pre-trained ViT-B/16 and UPerNet on ADE20K, by the recipe of BEiT v2-B.

    python -m dtm_jax.main --config=configs/seg_ade20k_vitb16.py \\
        --config.init_from.path=RUN_OR_WEIGHTS --config.data.dataset.data_dir=ADEChallengeData2016 \\
        --workdir=gs://BUCKET/vitb16_ade20k

Hardware: meant for 16 TPU v4 chips or 8 H100. Hours: not measured. Expect: not measured.
Sources: BEiT v2-B's released configuration. It trains 160,000 steps of 16 images, with 1,500 steps of warm-up
to 5e-5 and then a linear decay to zero. It has layer decay 0.75, drop path 0.15, crops of 512 pixels and
windows every 341 pixels. There are two differences: our loss is the mean over labelled pixels only, and
`color_jitter` replaces mmseg's distortion, which changes the hue too and skips each part half of the time.

A linear head: `--config.model.head=linear`. A linear probe: also
`--config.optim.fixed="('patch_embed/.*','blocks/.*','cls_token','norm/.*')"`. Another data set:
`--config.data.dataset.name=segmentation_folder`, which also gives the evaluation and the classes.
"""

from configs import common
from configs.common import durations, placeholder


def get_config():
  config = common.run("segment", 16, steps=160_000)
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
      max_pixels=common.MAX_PIXELS,
    ),
  )
  config.augment = dict(flip=0.5, color_jitter=0.25, normalization="imagenet")
  config.model = dict(
    variant="B",
    patch_size=16,
    head="upernet",
    channels=placeholder(int),  # default: the width of the ViT
    auxiliary_channels=256,
    dropout=0.1,
    rel_pos_bias=True,
    shared_rel_pos_bias=False,
    abs_pos_emb=False,
    layer_scale_init=0.1,
    drop_path=0.15,
    remat="auto",
    unroll="auto",
    attention="auto",
    dtype="bfloat16",
  )
  config.init_from = common.pretrained()
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
    clip_norm=0.0,  # 0: no clipping
    accumulate=1,
    fixed=(),
  )
  config.evals = dict(
    val=dict(
      name="segmentation",
      **common.same_data(config.data),
      split="val",
      crop=placeholder(int),  # default: image_size
      stride=placeholder(int),  # default: two thirds of crop, 341 of 512
      windows=4,
      **durations("every", steps=16_000),
    ),
  )
  return config
