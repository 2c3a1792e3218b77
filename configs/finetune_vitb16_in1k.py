"""Fine-tune a pre-trained ViT-B/16 on ImageNet-1k with DTM's recipe, which is BEiT v2's.

    python -m dtm_jax.main --config=configs/finetune_vitb16_in1k.py \\
        --config.init_from.path=RUN_OR_WEIGHTS --workdir=gs://BUCKET/vitb16_finetuned

Hardware: meant for 32 TPU v4 chips or 8 H100. Hours: not measured. Expect: not measured.
Sources: BEiT v2-B (arXiv 2208.06366) trains for 100 epochs with 20 epochs of warm-up. The rest is from the
DTM authors.

For another labelled data set, use `--config.data.dataset.name=tfds/oxford_iiit_pet`, or
`--config.data.dataset.name=folder --config.data.dataset.data_dir=FOLDER`. The data set sets the number of
classes. Evaluation uses the first split that it has of "val", "validation" and "test";
`--config.evals.val.split=...` chooses another one. If all images have one size,
`--config.data.image_size=0` uses it. `--config.augment.normalization=dataset` uses the mean and standard
deviation of the data set's channels.
"""

from configs import common
from configs.common import durations, placeholder


def get_config():
  config = common.run("finetune", 1024, epochs=100.0)
  config.data = common.imagenet(
    **common.random_resized((0.08, 1.0), rand_augment="rand-m9-mstd0.5-inc1"),
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
    remat="auto",
    unroll="auto",
    attention="auto",
    dtype="bfloat16",
  )
  config.init_from = common.pretrained()
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
    clip_norm=0.0,  # 0: no clipping
    accumulate=1,
  )
  config.ema = dict(decay=placeholder(float))  # default: no moving average of the weights
  config.evals = dict(
    val=dict(
      name="classification",
      **common.same_data(config.data),
      split=placeholder(str),  # default: the validation or test split of the data set
      outputs=("logits",),
      batch_size=1536,
      **durations("every", epochs=1.0),
    ),
  )
  return config
