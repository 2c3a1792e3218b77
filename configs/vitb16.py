"""Pre-train ViT-B/16 with DTM on ImageNet-1k, with CLIP ViT-B/16 as teacher, by the paper's equations.

    python -m dtm_jax.main --config=configs/vitb16.py --workdir=gs://BUCKET/vitb16

Hardware: meant for 32 TPU v4 chips or 8 H100. Hours: not measured.
Expect: not measured. For fine-tuning accuracy after 300 epochs see Table 1 of the paper (arXiv 2401.00254).

Options with the value "auto" suit the device; the first lines of the log say what they became. On a CPU or a
TPU the numerics are those of earlier versions. On an NVIDIA GPU two of them change the rounding only:
`stream_dtype` becomes bfloat16 (the residual streams of student and teacher), and `attention` becomes cudnn
(it rounds the position biases to bfloat16). LayerNorm statistics, softmax, matching, loss and parameters stay
float32. `--config.student.stream_dtype=float32` and `--config.teacher.stream_dtype=float32` undo the first.
tests/test_device_options.py bounds the difference in the losses of ten steps.

Sources: docs/method.md says which values are the paper's, the released code's and BEiT v2's.

ImageNet is read as a TensorFlow Dataset. `--config.data.dataset.data_dir=FOLDER` names another place, and
`--config.data.dataset.name=folder` reads any tree of images.
"""

from configs import common
from configs.common import durations, placeholder


def get_config():
  config = common.run("pretrain", 2048, epochs=300.0)
  config.data = common.imagenet(**common.random_resized((0.2, 1.0)))
  config.augment = dict(flip=0.5, color_jitter=0.4, normalization="imagenet")
  config.teacher = dict(
    name="clip",
    path="openai/clip-vit-base-patch16",
    tokens=placeholder(str),  # default: the teacher's choice; for CLIP "projected"
    normalization=placeholder(object),  # default: the teacher's own mean and std
    image_size=placeholder(int),  # default: the size that gives the student's grid of patches
    dtype="bfloat16",
    attention="auto",
    stream_dtype="auto",
  )
  config.student = dict(
    variant="B",
    patch_size=16,
    shared_rel_pos_bias=True,
    rel_pos_bias=True,
    abs_pos_emb=False,
    layer_scale_init=0.1,
    drop_path=0.1,
    remat="auto",
    unroll="auto",
    dtype="bfloat16",
    stream_dtype="auto",
    attention="auto",
  )
  config.init_from = dict(path=placeholder(str), weights=placeholder(str))  # default: random weights
  config.mask = dict(
    kind="block",
    share=75 / 196,
    min_block=16 / 196,
    num_masked=placeholder(int),  # default: share of the patches
    min_patches=placeholder(int),  # default: min_block of the patches
  )
  config.morphers = dict(
    dtm=dict(
      name="bipartite",
      weight=1.0,
      schedule="paper",
      drawn_per="image",
      min_groups=1,
      max_groups=placeholder(int),  # default: the number of tokens N
      max_rounds=14,
      split="random",
      protect_first=False,
      merged_feature="size_weighted",
      implementation="auto",
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
  config.probe = dict(lr=placeholder(float))  # learning rate of an online linear probe; default: no probe
  config.evals = dict(snapshots=common.snapshots(epochs=5.0))
  return config
