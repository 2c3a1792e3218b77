"""kNN accuracy of frozen features on ImageNet-1k's validation set: an earlier run's student, or any teacher.

    python -m dtm_jax.main --config=configs/knn_vitb16_in1k.py \\
        --config.teacher.path=RUN --workdir=gs://BUCKET/vitb16_knn

Another network: `--config.teacher.name=dinov2 --config.teacher.path=FOLDER_OR_REPOSITORY`; its class token
instead of the mean of its patch tokens: `--config.evals.knn.features="('cls',)"`. Another labelled set is
a name away, as in finetune_vitb16_in1k. Four k in one pass.
Hardware: one GPU, or more, which share the bank of 3.9 GB; not yet run at this scale, so no time and no
accuracy of ours.
"""

from ml_collections import config_dict

from configs import durations, references, vitb16

placeholder = config_dict.placeholder


def get_config():
  base = vitb16.get_config()
  config = config_dict.ConfigDict()
  config.task = "frozen"
  config.seed = 0
  config.resume = "check"  # "force": go on in a workdir whose run had other settings
  config.replay = placeholder(str)  # WORKDIR/flight/STEP: runs these steps again, to find what is not finite
  config.batch_size = 1024
  config.update(durations("total", steps=0))
  config.data = dict(
    dataset=dict(name="imagenet", data_dir=placeholder(str)),
    split="train",
    image_size=224,
    num_threads=64,
    view=dict(),
  )
  config.teacher = dict(name="checkpoint", path=placeholder(str), image_size=placeholder(int))
  config.mesh = base.mesh
  config.checkpoint = base.checkpoint
  config.log = base.log
  config.evals = dict(
    knn=dict(
      dataset=references(config.data.dataset),
      features=("features",),
      bank="train",
      queries=placeholder(str),
      k=(10, 20, 100, 200),
      temperature=0.07,
      image_size=config.data.get_oneway_ref("image_size"),
      resize=256,
      batch_size=1024,
      **durations("every"),
    ),
  )
  return config
