"""Test the options that users type: read in order, and checked in one message before anything is loaded."""

import ast
import contextlib
import inspect
import itertools
import re
import subprocess
import sys
from pathlib import Path

import pytest
from absl import flags as absl_flags
from ml_collections import ConfigDict, config_dict

from dtm_jax import loop, main, plugins, signatures
from dtm_jax.data import pools  # noqa: F401  (it sets a flag, and tests replace absl's flags)
from dtm_jax.errors import NotThereError, OptionError, concerning
from dtm_jax.options import command_line, help_text, reference, run_options, validation
from dtm_jax.options.arguments import split_arguments
from dtm_jax.options.config_file import load_config
from dtm_jax.options.overrides import apply, parse_literal
from dtm_jax.options.run_options import RUN_OPTIONS
from dtm_jax.options.sections import dotted_keys, get
from dtm_jax.options.socket_options import ALWAYS, SOCKET_OPTIONS
from dtm_jax.options.task_options import TASK_OPTIONS, TRUNK_SIZES
from dtm_jax.options.value_rules import UNITS
from dtm_jax.training import startup

ROOT = Path(__file__).parents[1]
CONFIGS = sorted({path.stem for path in (ROOT / "configs").glob("*.py")} - {"__init__", "common"})


@pytest.fixture(autouse=True)
def flags_of_main(monkeypatch):
  """Hide all flags but those of main, because other tests import scripts with required flags."""
  own = absl_flags.FlagValues()
  own["workdir"] = absl_flags.FLAGS["workdir"]
  absl_flags.FLAGS.mark_as_parsed()
  monkeypatch.setattr(absl_flags, "FLAGS", own)


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
  monkeypatch.chdir(ROOT)


def read(name, *flags):
  """Return the config `name` with the flags applied, and the problems of the flags."""
  config = load_config(f"configs/{name}.py")
  if get(config, "teacher.name") == "checkpoint" and config.teacher.path is None:
    config.teacher.path = "runs/some"
  typed = split_arguments(["main", *flags]).typed
  return config, apply(config, typed)


def message(name, *flags):
  """Return the message that refuses the config `name` with the flags; "" if nothing is wrong."""
  try:
    validation.check(*read(name, *flags))
  except OptionError as error:
    return str(error)
  return ""


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_passes_the_checks(name):
  assert message(name) == ""


# Values ------------------------------------------------------------------------------------------------

WRONG = [
  *(("vitb16", f"student.drop_path={value}") for value in ("1.5", "1.0", "-0.5", "nan", "inf", "half", "")),
  *(("finetune_cifar10", f"model.drop_path={value}") for value in ("1", "-1e-9")),
  *(("vitb16", f"optim.lr={value}") for value in ("-1e-3", "nan", "inf", "fast")),
  *(
    ("vitb16", f"optim.{key}=-1") for key in ("weight_decay", "clip_norm", "final_lr", "warmup_steps", "eps")
  ),
  *(("vitb16", f"optim.betas={value}") for value in ("(2,2)", "(.9,)", "()", "0.9", "(.9,1.0)", "('a','b')")),
  ("vitb16", "optim.name=adam"),
  ("vitb16", "optim.lr_scaling=cubic"),
  ("vitb16", "optim.layer_decay=1.5"),
  *(("vitb16", f"optim.accumulate={value}") for value in ("0", "-1", "1.5")),
  ("vitb16", "augment.flip=2"),
  ("vitb16", "augment.flip=-0.1"),
  ("vitb16", "augment.color_jitter=-1"),
  ("vitb16", "augment.normalization=imagnet"),
  ("finetune_cifar10", "augment.erase_prob=1.1"),
  *(
    ("vitb16", f"data.view.scale={value}")
    for value in ("(2,3)", "(0,0)", "(1,.4)", "(.5,)", ".5", "(.1,.2,.3)")
  ),
  ("vitb16", "data.view.interpolation=cubic"),
  ("vitb16", "data.view.crop=joint"),
  ("vitb16", "data.view.padding=-1"),
  ("finetune_vitb16_in1k", "data.view.rand_augment=rand-m9"),
  ("finetune_vitb16_in1k", "augment.color_jitter=0.4"),
  ("seg_debug", "data.view.crop=pad"),
  ("seg_debug", "data.view.max_class_share=0"),
  *(("vitb16", f"data.view.max_pixels={value}") for value in ("0", "-1", "1e8", "True", "None")),
  ("seg_debug", "data.view.max_pixels=0"),
  *(("vitb16", f"resume={value}") for value in ("forced", "True", "")),
  *(("knn_cifar10", f"replay={value}") for value in ("", " ")),
  *(("debug", f"log.flight_recorder={value}") for value in ("maybe", "None", "")),
  ("seg_debug", "data.device_resident=True"),
  ("finetune_vitb16_in1k", "data.device_resident=True"),  # its view has RandAugment
  *(("debug", f"train.steps_per_call={value}") for value in ("0", "2.5", "None")),
  ("vitb16", "data.image_size=-1"),
  ("vitb16", "data.image_size=225"),
  ("vitb16", "data.num_threads=0"),
  ("vitb16", "data.split="),
  ("vitb16", "morphers.dtm.weight=-1"),
  ("vitb16", "morphers.dtm.weight=nan"),
  ("vitb16", "morphers.dtm.min_groups=0"),
  ("vitb16", "morphers.dtm.max_groups=197"),
  ("vitb16", "morphers.dtm.drawn_per=batch"),
  ("vitb16", "morphers.dtm.max_rounds=0"),
  ("vitb16", "morphers.dtm.schedule=papers"),
  ("vitb16", "morphers.dtm.implementation=fast"),
  *(("vitb16", f"checkpoint.keep={value}") for value in ("0", "-1", "True")),
  *(
    ("vitb16", f"checkpoint.{key}=0") for key in ("save_steps", "save_epochs", "save_examples", "keep_steps")
  ),
  *(("vitb16", f"log.{key}=0") for key in ("log_steps", "log_epochs", "profile_step")),
  *(("vitb16", f"batch_size={value}") for value in ("0", "-8", "8.5", "many", "True")),
  *(("vitb16", f"seed={value}") for value in ("-1", "1.5", "4294967296")),
  *(("vitb16", f"total_epochs={value}") for value in ("-1", "nan", "two")),
  ("vitb16", "total_steps=1.5"),
  *(("vitb16", f"student.patch_size={value}") for value in ("0", "-16", "17")),
  *(("finetune_cifar10", f"model.patch_size={value}") for value in ("0", "5")),
  ("vitb16", "student.dtype=foo"),
  ("vitb16", "student.variant=XXL"),
  ("vitb16", "student.remat=all"),
  ("vitb16", "student.num_heads=7"),
  ("quickstart", "student.width=97"),
  ("finetune_cifar10", "model.pooling=max"),
  ("seg_debug", "model.head=fcn"),
  ("seg_debug", "model.dropout=1"),
  ("vitb16", "teacher.dtype=float8"),
  ("vitb16", "teacher.attention=flash"),
  ("vitb16", "teacher.tokens=all"),
  ("vitb16", "teacher.path="),
  ("vitb16", "teacher.normalization=((0,0,0),(1,1,0))"),
  ("vitb16", "teacher.image_size=0"),
  ("vitb16", "teacher.layer=0"),
  ("vitb16", "teacher.noise=-1"),
  ("knn_cifar10", "teacher.noise=1"),
  ("vitb16", "teacher.name=clop"),
  ("vitb16", "data.dataset.name=imagnet"),
  ("vitb16", "data.dataset.name=cifar10/x"),
  ("vitb16", "data.dataset.name=tfds"),
  ("vitb16", "morphers.dtm.name=bipartit"),
  ("quickstart", "evals.knn.name=nearest"),
  *(("quickstart", f"evals.knn.k={value}") for value in ("0", "()", "(1,0)", "many")),
  ("quickstart", "evals.knn.features=()"),
  ("quickstart", "evals.knn.features=('teachers',)"),
  ("quickstart", "evals.knn.temperature=0"),
  ("quickstart", "evals.knn.max_bank=0"),
  ("quickstart", "evals.knn.every_steps=-1"),
  ("quickstart", "evals.knn.at_start=maybe"),
  ("finetune_cifar10", "evals.test.crop_pct=0"),
  ("finetune_cifar10", "evals.test.outputs=('logit',)"),
  ("seg_debug", "evals.val.stride=65"),
  ("seg_debug", "evals.val.name=classification"),
  ("linear_probe_cifar10", "evals.test.name=classification"),
  ("zeroshot_cifar10", "evals.zeroshot.prompts="),
  ("consistency", "evals.consistency.morphers.kmeans.groups=0"),
  ("consistency", "evals.consistency.morphers.kmeans.iterations=-1"),
  ("vitb16", "mask.kind=blocks"),
  ("vitb16", "mask.num_masked=197"),
  ("quickstart", "mask.num_masked=75"),
  ("vitb16", "mask.share=1.1"),
  ("vitb16", "loss.schedules=0"),
  ("vitb16", "loss.distance=l3"),
  ("vitb16", "loss.normalize_target=2"),
  ("finetune_cifar10", "loss.label_smoothing=1"),
  ("finetune_cifar10", "mix.cutmix_prob=2"),
  ("finetune_cifar10", "mix.mixup=-1"),
  ("finetune_cifar10", "ema.decay=1"),
  ("vitb16", "probe.lr=-1"),
  ("linear_probe_cifar10", "probe.rates=()"),
  ("linear_probe_cifar10", "probe.rates=(.1,-1)"),
  ("linear_probe_cifar10", "optim.weight_decay=0.1"),
  ("knn_cifar10", "total_epochs=1"),
  ("vitb16", "mesh.data=0"),
  ("vitb16", "mesh.fsdp=-2"),
  ("vitb16", "mesh.rules=()"),
  ("vitb16", "mesh.rules=(('(','fsdp'),)"),
  ("vitb16", "mesh.rules=(('.*','split'),)"),
  ("finetune_cifar10", "init_from.rel_pos=all"),
  ("tiny_clip_cifar10", "clip.patch_dropout=1"),
  ("tiny_clip_cifar10", "clip.image.num_heads=5"),
  ("vitb16", "task=pretraining"),
]


@pytest.mark.parametrize(("name", "flag"), WRONG, ids=lambda each: each)
def test_a_wrong_value_is_named(name, flag):
  key, _, value = flag.partition("=")
  text = message(name, f"--config.{flag}")
  assert key.rpartition(".")[2] in text
  assert len(text.splitlines()) <= 4
  assert re.search(r"must|is missing|Available|needs|has no|goes without|may be|beside|no variants", text), (
    text
  )
  if f"--config.{key}={value}" in text or not value:
    return
  assert str(parse_literal(value)) in text or f"--config.{key}" not in text


def test_views_that_devices_do_not_make_are_named():
  resident = "--config.data.device_resident=True"
  text = message("seg_debug", resident)
  assert "--config.data.device_resident=True: must be False with data.view.crop=joint" in text
  assert "random_resized, pad, none" in text
  text = message("finetune_vitb16_in1k", resident, "--config.data.view.interpolation=area")
  assert "data.view.rand_augment=rand-m9-mstd0.5-inc1: must be None with data.device_resident=True" in text
  assert "data.view.interpolation=area: must be bicubic, bilinear or lanczos with" in text


def test_all_problems_come_in_one_message():
  text = message(
    "debug", "--config.optim.lr=-1", "--config.btach_size=4", "--config.teacher.name=clop",
    "--config.total_steps=abc", "--config.student.dtype=foo",
  )  # fmt: skip
  for part in (
    "5 options",
    "optim.lr=-1",
    "btach_size=4",
    "batch_size",
    "'clip'",
    "total_steps=abc",
    "bfloat16",
  ):
    assert part in text


@pytest.mark.parametrize(
  ("flag", "value"),
  [("optim.lr=0", 0.0), ("ema.decay=0", 0.0), ("evals.test.outputs=logits", ("logits",)),
   ("init_from.path=", ""),
   ("data.image_size=0", 0), ("augment.normalization=dataset", "dataset"), ("optim.fixed=()", ()),
   ("augment.normalization=((0.5,0.5,0.5),(1,1,1))", ((0.5, 0.5, 0.5), (1, 1, 1)))],
)  # fmt: skip
def test_values_of_any_type_are_accepted(flag, value):
  config, problems = read("finetune_cifar10", f"--config.{flag}")
  assert get(config, flag.partition("=")[0]) == value
  validation.check(config, problems)


def test_a_config_without_a_section_or_with_another_option(tmp_path):
  file = tmp_path / "own.py"
  file.write_text(
    "from configs import debug\ndef get_config():\n  c = debug.get_config()\n  c.btach_size = 4\n"
    "  del c.loss\n  c.student.heads = 3\n  return c\n"
  )
  with pytest.raises(OptionError) as caught:
    validation.check(load_config(str(file)))
  for part in ("btach_size=4", "--config.batch_size", "config.loss", "config.student.heads=3", "num_heads"):
    assert part in str(caught.value)


# Durations ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_takes_every_spelling_of_a_duration(name):
  """This includes ml_collections' own flags, for which a field needs a type."""
  config = load_config(f"configs/{name}.py")
  prefixes = ["total", "checkpoint.save", "checkpoint.keep", "log.log"]
  prefixes += ["optim.warmup"] if "optim" in config else []
  prefixes += [f"evals.{each}.every" for each in config.evals]
  for prefix in prefixes:
    for unit, kind in (("steps", int), ("examples", int), ("epochs", float)):
      section = get(config, prefix.rpartition(".")[0])
      assert section.get_type(f"{prefix.rpartition('.')[2]}_{unit}") is kind
      changed, problems = read(name, f"--config.{prefix}_{unit}=2")
      assert not problems
      values = {each: get(changed, f"{prefix}_{each}") for each in UNITS}
      assert values == dict.fromkeys(UNITS) | {unit: 2}


def test_the_duration_typed_last_wins():
  config, _ = read("debug", "--config.total_epochs=3", "--config.total_examples=320")
  assert (config.total_steps, config.total_examples, config.total_epochs) == (None, 320, None)


# Another choice in a socket ------------------------------------------------------------------------------


def test_another_teacher_starts_from_its_own_defaults():
  config, problems = read(
    "vitb16_released",
    "--config.teacher.name=dinov2",
    "--config.teacher.image_size=196",
    "--config.teacher.path=x",
  )
  assert config.teacher.to_dict() == {
    "name": "dinov2", "path": "x", "image_size": 196, "dtype": "bfloat16", "attention": "auto",
    "stream_dtype": "auto",
  }  # fmt: skip
  validation.check(config, problems)
  same, _ = read("vitb16_released", "--config.teacher.name=clip")
  assert same.teacher.normalization == "imagenet"


def test_options_typed_before_the_name_stay():
  config, _ = read("vitb16_released", "--config.teacher.normalization=clip", "--config.teacher.name=siglip")
  assert config.teacher.normalization == "clip"


def test_a_missing_required_option_is_named():
  assert "data.dataset.data_dir: data set 'folder' needs data_dir" in message(
    "vitb16", "--config.data.dataset.name=folder"
  )
  assert message("knn_cifar10", "--config.teacher.name=clip") == ""  # of the hub
  text = message("vitb16", "--config.teacher.name=checkpoint")
  assert "--config.teacher.path: teacher 'checkpoint' needs path, the workdir of a run" in text


def test_an_option_that_the_choice_does_not_have_lists_its_options():
  text = message("vitb16", "--config.teacher.name=dinov2", "--config.teacher.tokens=projected")
  assert "teacher.tokens=projected: teacher 'dinov2' has no option 'tokens'" in text
  assert "revision, normalization, dtype" in text


def test_a_choice_without_options_says_so():
  text = message("quickstart", "--config.morphers.tokens.groups=4")
  assert "morpher 'identity' has no option 'groups'. Its options: weight" in text


def test_another_morpher_keeps_its_weight_alone():
  config, _ = read("vitb16", "--config.morphers.dtm.name=kmeans", "--config.morphers.dtm.groups=49")
  assert config.morphers.dtm.to_dict() == {"name": "kmeans", "weight": 1.0, "groups": 49}


def test_another_evaluator_keeps_its_schedule_and_data_set():
  config, problems = read("quickstart", "--config.evals.knn.name=linear", "--config.evals.knn.every_epochs=1")
  section = config.evals.knn
  assert section.at_start
  assert section.every_epochs == 1
  assert section.dataset.name == "cifar10"
  assert "k" not in section
  assert "max_bank" not in section
  validation.check(config, problems)


def test_the_evaluation_follows_the_training_set():
  flags = ["name=folder", "data_dir=/photos", "labels=False"]
  config, problems = read("quickstart", *(f"--config.data.dataset.{flag}" for flag in flags))
  assert config.evals.knn.dataset.to_dict() == {"name": "folder", "data_dir": "/photos", "labels": False}
  validation.check(config, problems)
  config, _ = read("seg_debug", "--config.data.dataset.name=ade20k")
  assert config.data.dataset.to_dict() == config.evals.val.dataset.to_dict() == {"name": "ade20k"}
  config, _ = read(
    "quickstart", "--config.data.dataset.name=folder", "--config.evals.knn.dataset.name=cifar10"
  )
  assert config.evals.knn.dataset.name == "cifar10"


def test_another_kind_of_mask_drops_the_options_of_blocks():
  config, problems = read("vitb16", "--config.mask.kind=random")
  assert config.mask.to_dict() == {"kind": "random", "share": 75 / 196, "num_masked": None}
  validation.check(config, problems)
  assert "mask.min_patches=4" in message("vitb16", "--config.mask.kind=random", "--config.mask.min_patches=4")


def test_a_placeholder_leaves_an_option_to_the_choice():
  """A user's own config may change only the name."""
  config = load_config("configs/quickstart.py")
  config.teacher.update(name="dinov2", path="x", tokens=None)
  validation.check(config)


SOCKETS = [socket for socket in plugins.SOCKETS if socket != "tasks"]


@pytest.mark.parametrize("socket", SOCKETS)
def test_the_options_of_every_choice_are_those_of_its_signature(socket):
  for name in plugins.available(socket):
    module = plugins.load(socket, name)
    function = module.Evaluator.__init__ if socket == "evaluators" else inspect.unwrap(module.build)
    given = plugins.GIVEN.get(socket, ())
    signature = {
      key: each for key, each in inspect.signature(function).parameters.items() if key not in given
    }
    options = plugins.options_of(socket, name)
    assert list(options) == list(signature)
    for key, option in options.items():
      assert option.required == (signature[key].default is inspect.Parameter.empty)
      assert option.required or ast.literal_eval(option.default) == signature[key].default


def without_meaning(options):
  return [option.key for option in options if not re.fullmatch(r"[^\s`].*\.", option.meaning)]


@pytest.mark.parametrize("title", reference.all_options())
def test_every_option_has_a_meaning(title):
  """A new option of a choice gets its meaning in the `Args` of the docstring of `build` or `Evaluator`.

  Options that several choices share, and those of runs and tasks, have it in the tables of dtm_jax/options.
  """
  assert without_meaning(reference.all_options()[title]) == []


def test_an_option_without_a_meaning_is_found(monkeypatch):
  undocumented = {"speed": signatures.Parameter("speed", "int", "3")}
  monkeypatch.setattr(plugins, "available", lambda socket: ["fast"])
  monkeypatch.setattr(plugins, "options_of", lambda socket, name: undocumented)
  assert without_meaning(reference.all_options()["Morpher fast"]) == ["morphers.NAME.speed"]


def test_a_meaning_is_written_in_one_place():
  """A rule has a meaning only if a choice's docstring leaves it to the rule, or another table has it."""
  elsewhere = {rule.about for table in (RUN_OPTIONS, *TASK_OPTIONS.values()) for rule in table.values()}
  for socket, rules in SOCKET_OPTIONS.items():
    left = {
      key
      for name in plugins.available(socket)
      for option, parameter in plugins.options_of(socket, name).items()
      for key in (option, f"{name}/{option}")
      if not parameter.meaning
    } | {*ALWAYS.get(socket, ())}
    unused = {key for key, rule in rules.items() if rule.about and key not in left}
    assert all(rules[key].about in elsewhere or key == "activation" for key in unused), unused


def test_the_reference_of_a_config_is_complete():
  """Each option of the config is there once, with its value, next to the others of its section."""
  for name in CONFIGS:
    config = read(name)[0]
    options = reference.options_of_config(config)
    assert {*dotted_keys(config)} <= {option.key for option in options}
    assert all(option.value == get(config, option.key, reference.LEFT_OUT) for option in options)
    sections = [section for section, _ in itertools.groupby(option.section for option in options)]
    assert len(sections) == len(set(sections))
    assert without_meaning(options) == []


def test_the_reference_describes_an_option():
  options = {option.key: option for option in reference.options_of_config(read("vitb16")[0])}
  assert options["optim.decay"] == reference.Option(
    "optim.decay", "Curve of the learning rate from its peak to the end.", "text", "one of cosine, linear",
    ("cosine", "linear"), "'cosine'", reference.LEFT_OUT,
  )  # fmt: skip
  assert options["teacher.name"].choices == tuple(plugins.available("teachers"))
  assert options["task"].choices == tuple(plugins.available("tasks"))
  assert options["teacher.image_size"].type == "whole number or None"
  assert options["morphers.dtm.max_rounds"].default == "14"
  assert options["morphers.dtm.weight"].meaning.startswith("Weight of this morpher's loss.")


def test_defaults_are_those_of_the_code():
  from dtm_jax.data import image_decoding
  from dtm_jax.models.vit import model as vit
  from dtm_jax.models.vit import segmenter
  from dtm_jax.training import optim

  tables = {title: {o.key: o for o in options} for title, options in reference.all_options().items()}
  assert tables["Every run"]["data.view.max_pixels"].default == str(image_decoding.MAX_PIXELS)
  for name, parameter in inspect.signature(optim.make_optimizer).parameters.items():
    if f"optim.{name}" in tables["Task pretrain"] and name != "warmup_steps":
      assert ast.literal_eval(tables["Task pretrain"][f"optim.{name}"].default) == parameter.default
  for task, section, model in (("pretrain", "student", vit.Trunk), ("segment", "model", segmenter.Segmenter)):
    table = tables[f"Task {task}"]
    for name, field in model.__dataclass_fields__.items():
      if f"{section}.{name}" in table and name not in ("width", "depth", "num_heads"):
        assert ast.literal_eval(table[f"{section}.{name}"].default) == field.default, name


@pytest.mark.parametrize(
  "flag",
  ["data.view.max_pixels=1", "resume=force", "resume=check", "resume=None", "replay=runs/x/flight/7",
   "replay=None", "log.flight_recorder=False", "log.flight_recorder=true"],
)  # fmt: skip
def test_right_values_of_the_options_of_every_run(flag):
  for name in ("debug", "finetune_cifar10", "seg_debug", "tiny_clip_cifar10"):
    assert message(name, f"--config.{flag}") == ""


def test_names_in_the_rules_are_those_of_the_code():
  from dtm_jax import masking, morphing, normalizations
  from dtm_jax.data import resampling, views
  from dtm_jax.models import attention, layers, positions
  from dtm_jax.models.clip import prompts
  from dtm_jax.models.vit import classifier as vit_classifier
  from dtm_jax.models.vit import model as vit
  from dtm_jax.models.vit import segmenter
  from dtm_jax.models.vit import transfer as vit_transfer
  from dtm_jax.morphers import _clustering as clustering
  from dtm_jax.morphers import bipartite
  from dtm_jax.records import run_config as records
  from dtm_jax.teachers import clip
  from dtm_jax.training import mesh, optim, schedules

  def allowed(rule):
    return {name for name in re.findall(r"[\w+-]+", rule.allowed.removeprefix("one of "))}

  pretrain, segment = (TASK_OPTIONS[task] for task in ("pretrain", "segment"))
  finetune, morphers = TASK_OPTIONS["finetune"], SOCKET_OPTIONS["morphers"]
  for rule, names in (
    (pretrain["mask.kind"], masking.MASKS), (pretrain["optim.name"], optim.OPTIMIZERS),
    (pretrain["optim.decay"], schedules.DECAYS), (pretrain["optim.lr_scaling"], schedules.LR_SCALINGS),
    (pretrain["loss.distance"], morphing.DISTANCES),
    (pretrain["student.variant"], vit.VARIANTS), (pretrain["student.remat"], ("auto", *vit.REMATS)),
    (pretrain["student.attention"], ("auto", *attention.IMPLEMENTATIONS)),
    (pretrain["student.stream_dtype"], ("auto", *vit.STREAM_DTYPES)),
    (segment["model.head"], segmenter.HEADS),
    (finetune["model.pooling"], vit_classifier.POOLINGS),
    (finetune["init_from.rel_pos"], vit_transfer.REL_POS),
    (finetune["init_from.resize"], positions.BIAS_RESIZES), (morphers["split"], morphing.SPLITS),
    (morphers["merged_feature"], morphing.MERGED_FEATURES), (morphers["schedule"], bipartite.SCHEDULES),
    (morphers["bipartite/drawn_per"], bipartite.DRAWN_PER), (morphers["init"], clustering.INITS),
    (morphers["implementation"], ("auto", *bipartite.IMPLEMENTATIONS)),
    (run_options.INTERPOLATION, resampling.CV2_FILTERS),
    (RUN_OPTIONS["data.view.crop"], (*views.CROPS, "joint")),
    (SOCKET_OPTIONS["teachers"]["tokens"], clip.OUTPUTS),
    (TASK_OPTIONS["contrastive"]["clip.image.activation"], layers.ACTIVATIONS),
  ):  # fmt: skip
    assert allowed(rule) == set(names), rule
  assert set(run_options.NORMALIZATIONS) == set(normalizations.NORMALIZATIONS)
  assert allowed(RUN_OPTIONS["resume"]) == set(records.RESUME)
  assert run_options.TACTICS == mesh.TACTICS
  assert sorted(TASK_OPTIONS) == plugins.available("tasks")
  assert {n: (v["width"], v["num_heads"]) for n, v in vit.VARIANTS.items()} == TRUNK_SIZES
  assert all(name in TASK_OPTIONS["contrastive"]["text.prompts"].about for name in prompts.SETS)
  trunk = {name for name in vit.Trunk.__dataclass_fields__ if name not in ("parent", "name")}
  assert {key.removeprefix("student.") for key in pretrain if key.startswith("student.")} == trunk | {
    "variant"
  }


# The command line, the config file, the cluster, the workdir --------------------------------------------


@pytest.mark.parametrize("config", [["--config=a.py"], ["--config", "a.py"], ["-config", "a.py"]])
def test_flags_may_be_written_in_any_way(config):
  flags = ["--config.x=1", "--config.y", "-2", "--noconfig.z", "--config.w", "--workdir=d"]
  arguments = split_arguments(["main", *config, *flags])
  assert arguments.config == "a.py"
  assert arguments.typed == [("x", "1"), ("y", "-2"), ("z", "False"), ("w", None)]
  assert arguments.rest == ["main", "--workdir=d"]


def test_a_boolean_needs_no_value():
  config, problems = read("vitb16", "--config.loss.normalize_target", "--noconfig.student.rel_pos_bias")
  assert not problems
  assert config.loss.normalize_target is True
  assert config.student.rel_pos_bias is False
  assert "optim.lr: must be a number" in message("vitb16", "--config.optim.lr")


@pytest.mark.parametrize(
  ("content", "hints"),
  [("def get_config(:\n  pass\n", ["own.py", "line 1", "SyntaxError"]),
   ("def get_config():\n  return 1 / 0\n", ["own.py", "line 2", "ZeroDivisionError"]),
   ("x = 1\n", ["no function get_config"]), ("def get_config(): return {}\n", ["dict, not a ConfigDict"])],
)  # fmt: skip
def test_a_broken_config_file_is_named(tmp_path, content, hints):
  file = tmp_path / "own.py"
  file.write_text(content)
  with pytest.raises(OptionError) as caught:
    load_config(str(file))
  assert all(hint in str(caught.value) for hint in hints)
  assert "config_file.py" not in str(caught.value)


def test_a_missing_config_file_names_near_ones():
  with pytest.raises(NotThereError, match=r"configs/vitb61.py: there is no such file.*configs/vitb16.py"):
    load_config("configs/vitb61.py")


@pytest.mark.parametrize(
  ("values", "hint"),
  [(("host:1", None, None), "JAX_NUM_PROCESSES and JAX_PROCESS_ID must be set too"),
   ((None, "2", "0"), "JAX_COORDINATOR_ADDRESS must be set"),
   (("host:1", "two", "0"), "JAX_NUM_PROCESSES=two"),
   (("host:1", "2", "2"), "JAX_PROCESS_ID=2 must be below JAX_NUM_PROCESSES=2"),
   (("host:1", "2", "-1"), "JAX_PROCESS_ID=-1"), (("host:1", "0", "0"), "JAX_NUM_PROCESSES=0"),
   (("host", "2", "0"), "must be host:port"), (("host:1", "2", ""), "JAX_PROCESS_ID must be set")],
)  # fmt: skip
def test_an_incomplete_cluster_is_refused(values, hint):
  environment = {
    name: value for name, value in zip(startup.CLUSTER, values, strict=True) if value is not None
  }
  with pytest.raises(OptionError, match=hint):
    startup.check_cluster(environment)


def test_a_complete_cluster_and_no_cluster_are_right():
  assert startup.check_cluster(dict(zip(startup.CLUSTER, ("[::1]:80", "2", "1"), strict=True))) == (2, 1)
  assert startup.check_cluster({}) is None


def test_a_tensorflow_that_was_used_before_is_left_as_it_is(monkeypatch):
  class Config:
    def set_visible_devices(self, devices, kind):
      raise RuntimeError("Visible devices cannot be modified after being initialized")

  monkeypatch.setitem(sys.modules, "tensorflow", type("TensorFlow", (), {"config": Config()}))
  said = []
  monkeypatch.setattr(startup.logging, "warning", said.append)
  startup.hide_accelerators_from_tensorflow()
  assert said == ["TensorFlow was used before this run, so it may hold memory of the accelerators."]


def test_impossible_workdirs_are_refused(tmp_path):
  (tmp_path / "file").write_text("")
  (tmp_path / "link").symlink_to(tmp_path / "nowhere")
  for workdir, hint in (("", "is empty"),
                        (f"{tmp_path}/file", "is a file"), (f"{tmp_path}/file/run", "is a file"),
                        (f"{tmp_path}/link/run", "is no folder")):  # fmt: skip
    with pytest.raises(OptionError, match=hint):
      validation.check_workdir(workdir)
  validation.check_workdir(f"{tmp_path}/new/run")
  assert not (tmp_path / "new").exists()


def test_a_batch_that_the_devices_cannot_share_is_refused():
  config, _ = read("quickstart", "--config.batch_size=12", "--config.mesh.fsdp=3")
  with pytest.raises(OptionError) as caught:
    validation.check_devices(config, device_count=8, process_count=2)
  for part in ("batch_size=12", "8 devices", "8 or 16", "mesh.fsdp=3", "8"):
    assert part in str(caught.value)
  config, _ = read("vitb16", "--config.batch_size=9")
  with pytest.raises(OptionError, match="2 processes must share it evenly; 8 or 10"):
    validation.check_devices(config, device_count=2, process_count=2)


REFUSED = [
  (
    ["--config=configs/debug.py", "--config.optim.lr=-1", "--workdir="],
    ["optim.lr=-1.0", "--workdir= is empty"],
  ),
  (["--config", "configs/debug.py", "--config.btach_size=4"], ["btach_size=4", "--config.batch_size"]),
  (["--config=configs/debug.py", "--wrkdir=x"], ["wrkdir", "workdir"]),
  (["--config=configs/debug.py", "extra"], ["Unexpected arguments: extra"]),
  (["--workdir=x"], ["--config is missing"]),
  (["--config=configs/none.py"], ["configs/none.py: there is no such file"]),
  (["--config=a.py", "--config=b.py"], ["given twice"]),
]


@pytest.mark.parametrize(("flags", "hints"), REFUSED, ids=lambda each: each[-1])
def test_main_refuses_with_one_message_and_exit_code_2(flags, hints, capsys):
  with pytest.raises(SystemExit) as caught:
    main.parse_flags(["main", *flags])
  assert caught.value.code == 2
  text = capsys.readouterr().err
  assert all(hint in text for hint in hints)
  assert "Traceback" not in text


@pytest.mark.parametrize("complete", [True, False])
def test_a_run_that_was_stopped_ends_with_the_code_of_the_environment(monkeypatch, complete):
  for name in ("quiet_orbax", "start_distributed", "keep_compiled_programs", "leave_distributed"):
    monkeypatch.setattr(startup, name, lambda: None)
  monkeypatch.setattr(main, "_run", {"config": ConfigDict({"task": "pretrain"}), "workdir": "x"})
  monkeypatch.setattr(loop, "run", lambda config, workdir: (None, complete))
  monkeypatch.setenv("DTM_JAX_STOPPED_CODE", "75")
  with pytest.raises(SystemExit) if not complete else contextlib.nullcontext() as caught:
    main.main([])
  assert complete or caught.value.code == 75


@pytest.mark.parametrize(
  ("flags", "hint"),
  [(["--config.optim.lr=-1"], "optim.lr=-1.0: must be"), (["--config.task=none"], "must be one of"),
   (["extra"], "Unexpected arguments: extra"), ([], "of the script itself")],
)  # fmt: skip
def test_a_script_that_takes_a_config_refuses_it_as_main_does(monkeypatch, capsys, flags, hint):
  monkeypatch.setattr(command_line, "_log_to_stderr", lambda: None)  # later tests have their own log

  def script():
    argv = ["--config=configs/debug.py", "--config.total_epochs=2", *flags]
    config, _ = command_line.parse_with_config(command_line.script_parser("What it does."), argv)
    assert config.total_epochs == 2
    assert config.total_steps is None
    raise OptionError("of the script itself")

  with pytest.raises(SystemExit) as caught:
    command_line.run_script(script)
  assert caught.value.code == 2
  assert hint in capsys.readouterr().err


def test_only_the_first_process_prints_the_message(monkeypatch, capsys):
  monkeypatch.setenv("SLURM_PROCID", "3")
  with pytest.raises(SystemExit) as caught:
    main.parse_flags(["main", "--config=configs/none.py"])
  assert caught.value.code == 2
  assert capsys.readouterr().err == ""


def test_every_process_reports_a_wrong_cluster(monkeypatch, capsys):
  for name, value in zip(startup.CLUSTER, ("host:1", "2", "2"), strict=True):
    monkeypatch.setenv(name, value)
  with pytest.raises(SystemExit):
    main.parse_flags(["main", "--config=configs/debug.py"])
  assert "JAX_PROCESS_ID=2 must be below JAX_NUM_PROCESSES=2" in capsys.readouterr().err


def test_an_error_names_the_options_that_it_concerns():
  with pytest.raises(OptionError) as caught, concerning(teacher__name="clip", teacher__path=None):
    raise OptionError("No such folder.")
  assert caught.value.__notes__ == ["This concerns --config.teacher.name=clip."]


def test_a_refused_start_imports_neither_jax_nor_tensorflow():
  code = (
    "import sys\nfrom dtm_jax import main\ntry: main.parse_flags(sys.argv)\n"
    "except SystemExit as e: print(e.code, 'jax' in sys.modules, 'tensorflow' in sys.modules)"
  )
  command = [sys.executable, "-c", code, "--config=configs/vitb16.py", "--config.teacher.name=clop"]
  done = subprocess.run(command, capture_output=True, text=True, check=True)
  assert done.stdout.split() == ["2", "False", "False"]
  assert "'clip'" in done.stderr


def help_of(capsys, *flags):
  with pytest.raises(SystemExit) as caught:
    main.parse_flags(["main", *flags])
  assert caught.value.code == 0
  return capsys.readouterr().out


def test_help_lists_the_options_of_a_config(capsys):
  text = help_of(capsys, "--config=configs/debug.py", "--help")
  assert "\n\noptim (adamw)\n" in text
  assert (
    "\n  --config.optim.lr=0.0015\n      Peak learning rate, before lr_scaling. Number of at least 0.\n"
    in text
  )
  words = " ".join(text.split())
  assert "--config.optim.decay Curve of the learning rate from its peak to the end. One of cosine," in words
  assert "cosine, linear. Default: 'cosine'." in words
  assert "One of beit, checkpoint, clip" in words
  assert "--workdir=DIR" in text


def test_the_old_name_of_an_option_is_refused_with_the_new_one():
  text = message("seg_debug", "--config.optim.frozen=blocks/.*")
  assert "--config.optim.frozen" in text
  assert "this option is now --config.optim.fixed" in text


def test_a_dict_that_gives_a_key_twice_is_refused():
  """Python takes the last value without a word."""
  text = message("quickstart", "--config.evals.knn={'name': 'knn', 'k': 3, 'k': 5}")
  assert "gives 'k' twice" in text


@pytest.mark.parametrize("name", ["vitb16", "consistency", "seg_debug", "finetune_cifar10"])
def test_help_fits_80_columns(capsys, name):
  text = help_of(capsys, f"--config=configs/{name}.py", "--help")
  assert [line for line in text.splitlines() if len(line) > 80] == []


def test_help_without_a_config_lists_the_configs(capsys):
  text = help_of(capsys, "--help")
  assert "\n  configs/vitb16.py\n      Pre-train ViT-B/16 with DTM on ImageNet-1k" in text
  assert "configs/common.py" not in text
  assert "With a config, --help lists its options" in text
  assert all(len(line) <= 80 for line in text.splitlines())


def test_help_names_the_configs_of_any_folder(tmp_path, monkeypatch):
  assert help_text.configs_help(str(tmp_path)) == ""
  (tmp_path / "own.py").write_text("'''Train mine.\n\nMore.'''\ndef get_config(): ...")
  (tmp_path / "shared.py").write_text("def durations(): ...")
  assert (
    help_text.configs_help(str(tmp_path)) == f"Configs in {tmp_path}:\n  {tmp_path}/own.py\n      Train mine."
  )
  monkeypatch.chdir(tmp_path)
  assert "configs/quickstart.py" in help_text.configs_help()  # those beside the package


def test_full_help_also_lists_the_flags_of_libraries(capsys):
  text = help_of(capsys, "--helpfull", "--config=configs/debug.py")
  assert "--config.optim.lr=" in text
  assert "Flags of the libraries:" in text


def test_help_imports_neither_jax_nor_tensorflow():
  code = (
    "import sys\nfrom dtm_jax import main\ntry: main.parse_flags(sys.argv)\nexcept SystemExit as e:\n"
    "  heavy = {'jax', 'tensorflow', 'transformers', 'tensorflow_datasets', 'clu', 'orbax', 'grain'}\n"
    "  print(e.code, sorted(heavy & sys.modules.keys()), file=sys.stderr)"
  )
  for flags in (["--help"], ["--config=configs/vitb16.py", "--help"]):
    done = subprocess.run([sys.executable, "-c", code, *flags], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "0 []"


def test_help_may_be_read_in_part():
  command = f"set -o pipefail; {sys.executable} -m dtm_jax.main --config=configs/vitb16.py --help | head -1"
  done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
  assert (done.returncode, done.stdout, done.stderr) == (0, "Train and evaluate.\n", "")


# What is documented --------------------------------------------------------------------------------------

STAND_INS = {"FOLDER", "FILE", "RUN", "WEIGHTS", "BUCKET", "WORKDIR"}


def documented(text):
  """Yield all `--config.x=y` of a text as (key, value)."""
  text = text.replace("\\\n", " ").replace('\\"', "'")
  for match in re.finditer(r"--config\.([\w.]+)=(\"\([^\"]*\)\"|'\([^']*\)'|[^\s\"'`,;)\]]*)", text):
    yield match[1], match[2].strip("\"'").rstrip(".:")


def test_flags_in_the_docstrings_of_configs_fit():
  for name in CONFIGS:
    doc = ast.get_docstring(ast.parse((ROOT / "configs" / f"{name}.py").read_text()))
    for key, value in documented(doc):
      if value in ("", "...") and key != "init_from.path":  # "..." stands for anything
        continue
      flags = [f"--config.{key}={value}"]
      if value == "folder":
        flags.append(f"--config.{key.removesuffix('name')}data_dir=x")
      if value == "segmentation_folder":
        flags.append("--config.data.dataset.data_dir=x")
      assert message(name, *flags) == "", (name, flags)


@pytest.mark.parametrize(
  "file",
  ["README.md"]
  # The page on troubleshooting also shows options that are refused.
  + [f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md") if path.stem != "troubleshooting"]
  + [
    str(path.relative_to(ROOT))
    for path in (ROOT / "scripts").rglob("*.*")
    if path.suffix in (".py", ".sh", ".html")
  ],
)
def test_documented_flags_fit_a_config(file):
  for key, value in documented((ROOT / file).read_text()):
    if "$" in value or "$" in key or "{" in value or (not value and key != "init_from.path"):
      continue
    extra = ["--config.data.dataset.data_dir=x"] if value in ("folder", "segmentation_folder") else []
    if key == "data.dataset.labels":
      extra = ["--config.data.dataset.name=folder", "--config.data.dataset.data_dir=x"]
    if key in ("data.dataset.image", "data.dataset.label"):
      extra = ["--config.data.dataset.name=tfds/x"]
    extra += ["--config.morphers.tokens.weight=1"] if key == "morphers.dtm.weight" else []
    extra += ["--config.teacher.path=x"] if key.startswith("teacher.") and key != "teacher.path" else []
    flags = (f"--config.{key}={value}", *extra)
    assert any(not message(name, *flags) for name in CONFIGS), (file, flags, message("quickstart", *flags))


def test_the_comparisons_of_the_paper_parse():
  """Check all variants of scripts/comparisons.sh, with its shell variables filled in."""
  text = (ROOT / "scripts" / "comparisons.sh").read_text()
  words = {"$instead": re.search(r'instead="(.*)"', text)[1], "$dtm": "--config.morphers.dtm"}
  count = 0
  for variant in re.findall(r'^ +"([^"]*: [^"]*)"', text, re.M) + re.findall(
    r' "([^"]*: [^"]*--[^"]*|S \d:[^"]*)"', text
  ):
    for word, flags in words.items():
      variant = variant.replace(word, flags)
    flags = [word for word in variant.split() if word.startswith("--config.")]
    count += len(flags)
    assert message("comparisons_cifar10", *flags) == "", variant
    assert message("claim_cifar10", *flags) == "", variant
  assert count > 20


def test_placeholders_keep_their_type_when_set_to_none():
  from configs import durations

  config = ConfigDict(durations("total", epochs=3.0))
  config.total_epochs = None
  assert config.get_type("total_epochs") is float
  assert isinstance(config_dict.ConfigDict(config), ConfigDict)
