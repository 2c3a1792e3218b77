"""DTM pre-training of ViT-B/16 on ImageNet-1k with CLIP ViT-B/16: the paper's equations.

    python -m dtm_jax.main --config=configs/vitb16.py --workdir=gs://BUCKET/vitb16

Hardware: made for 32 TPU v4 chips or 8 H100; not yet run at this scale, so no hours and no accuracy of ours.
Expected after fine-tuning, by the paper (arXiv 2401.00254), for 300 epochs: see its Table 1.
ImageNet is looked for as a TensorFlow Dataset; `--config.data.dataset.data_dir=FOLDER` names another place,
and `--config.data.dataset.name=folder` reads any tree of images.
"""

from ml_collections import config_dict

from configs import durations

placeholder = config_dict.placeholder


def get_config():
  config = config_dict.ConfigDict()
  config.task = "pretrain"
  config.seed = 0
  config.resume = "check"  # "force": go on in a workdir whose run had other settings
  config.replay = placeholder(str)  # WORKDIR/flight/STEP: runs these steps again, to find what is not finite
  config.batch_size = 2048
  config.update(durations("total", epochs=300.0))

  config.data = dict(
    dataset=dict(name="imagenet", data_dir=placeholder(str)),
    split="train",
    image_size=224,
    num_threads=64,
    view=dict(
      crop="random_resized",
      scale=(0.2, 1.0),
      interpolation="bicubic",
      antialias=False,
      max_pixels=200_000_000,
    ),
  )
  config.augment = dict(flip=0.5, color_jitter=0.4, normalization="imagenet")
  config.teacher = dict(
    name="clip",
    path="openai/clip-vit-base-patch16",
    # None leaves an option to the teacher: CLIP's projected tokens and its own normalisation.
    tokens=placeholder(str),
    normalization=placeholder(object),
    image_size=placeholder(int),  # None: the size that gives the student's grid of patches
    dtype="bfloat16",
    attention=placeholder(str),
  )
  config.student = dict(
    variant="B",
    patch_size=16,
    shared_rel_pos_bias=True,
    rel_pos_bias=True,
    abs_pos_emb=False,
    layer_scale_init=0.1,
    drop_path=0.1,
    remat="elementwise",
    unroll=1,
    dtype="bfloat16",
  )
  config.init_from = dict(path=placeholder(str), weights=placeholder(str))  # a run, or weights
  config.mask = dict(
    kind="block",
    share=75 / 196,
    min_block=16 / 196,
    num_masked=placeholder(int),  # in place of share
    min_patches=placeholder(int),  # in place of min_block
  )
  config.morphers = dict(
    dtm=dict(
      name="bipartite",
      weight=1.0,
      schedule="paper",
      drawn_per="image",
      min_groups=1,
      max_groups=placeholder(int),  # of the tokens' number
      max_rounds=14,
      split="random",
      protect_first=False,
      merged_feature="size_weighted",
      implementation="plain",
    ),
  )
  config.loss = dict(schedules=2, distance="smooth_l1", normalize_target=False)
  config.optim = dict(
    name="adamw",
    lr=1.5e-3,
    lr_scaling="sqrt",
    final_lr=1e-5,
    **durations("warmup", epochs=10.0),
    betas=(0.9, 0.98),
    weight_decay=0.05,
    clip_norm=3.0,
    accumulate=1,
  )
  config.probe = dict(lr=placeholder(float))  # of a linear classifier beside the student; None: there is none
  config.mesh = dict(data=-1, fsdp=1, rules=((".*", "fsdp"),))
  config.checkpoint = dict(**durations("save", steps=1000), keep=2, **durations("keep"))
  config.log = dict(**durations("log", steps=50), profile_step=placeholder(int), flight_recorder=True)
  config.evals = dict()
  return config
