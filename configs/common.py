"""Provide what the configs share: options of a run, durations in any unit, data, and evaluation on it."""

from ml_collections import config_dict

placeholder = config_dict.placeholder

UNITS = {"steps": int, "examples": int, "epochs": float}
MAX_PIXELS = 200_000_000


def run(task, batch_size, **total):
  """Return the options that every run has. `total` is its length, such as `epochs=300.0`."""
  config = config_dict.ConfigDict()
  config.task = task
  config.seed = 0
  config.resume = "check"  # "force": continue a run although its settings have changed
  config.replay = placeholder(str)  # WORKDIR/flight/STEP: repeat these steps, to find where NaN begins
  config.batch_size = batch_size  # of all devices and hosts together
  config.update(durations("total", **total))
  config.mesh = dict(data=-1, fsdp=1, rules=((".*", "fsdp"),))  # data=-1: all devices that fsdp leaves
  config.train = dict(steps_per_call=1)
  config.checkpoint = dict(**durations("save", steps=1000), keep=2, **durations("keep"))
  config.log = dict(
    **durations("log", steps=50),
    profile_step=placeholder(int),
    flight_recorder=True,
    report=True,  # the run writes report.html at its end
    writers=(),  # "wandb", "mlflow": services that also get the numbers
  )
  return config


def evaluation_only(task, batch_size):
  """Return the options of a run without training steps, which evaluates and ends."""
  return run(task, batch_size, steps=0)


def durations(name, **given):
  """Return the options {name}_steps, {name}_examples and {name}_epochs, with a value for one of them.

  If several are set, steps win over examples and examples over epochs. An option that is None keeps its type,
  so each can be set on the command line: `--config.total_epochs=2`.
  """
  return {
    f"{name}_{unit}": config_dict.FieldReference(given.get(unit), field_type=kind)
    for unit, kind in UNITS.items()
  }


def imagenet(split="train", **view):
  """Return the data section for ImageNet-1k at 224 pixels. `view` says how training images are cropped."""
  return dict(
    dataset=dict(name="imagenet", data_dir=placeholder(str)),
    split=split,
    image_size=224,
    num_threads=64,
    view=view,
  )


def random_resized(scale, **more):
  """Return a view for ImageNet: a random crop of this share of the area, resized by bicubic interpolation."""
  return dict(
    crop="random_resized",
    scale=scale,
    interpolation="bicubic",
    antialias=False,
    max_pixels=MAX_PIXELS,
    **more,
  )


def cifar10(split="train", **view):
  """Return the data section for CIFAR-10 at 32 pixels. `view` says how training images are cropped."""
  return dict(
    dataset=dict(name="cifar10", data_dir=placeholder(str)),
    split=split,
    image_size=32,
    num_threads=2,
    device_resident=False,  # True: the images lie on the devices, which also crop them
    view=dict(max_pixels=MAX_PIXELS, **view),
  )


def small_vit():
  """Return the student, or classifier, of the runs on CIFAR-10."""
  return dict(
    variant="Ti", width=96, depth=4, num_heads=3, patch_size=4, remat="none", drop_path=0.0, dtype="float32"
  )


def pretrained():
  """Return the section that names the run or the weights to fine-tune."""
  return dict(path=placeholder(str), weights=placeholder(str), rel_pos="both", resize="geometric")


def frozen_run():
  """Return a teacher that is the student of an earlier run, or any weights that `path` names."""
  return dict(name="checkpoint", path=placeholder(str), image_size=placeholder(int))


def references(section):
  """Return a section with references to the values of another section. A set value replaces its reference."""
  return {name: section.get_oneway_ref(name) for name in section}


def snapshots(**every):
  """Return the evaluator that records the tokens of the same training images over time, for the report."""
  return dict(at_start=True, **durations("every", **every))


def same_data(data):
  """Return the data set and image size of an evaluator, which follow the section `data` of the training."""
  return dict(dataset=references(data.dataset), image_size=data.get_oneway_ref("image_size"))
