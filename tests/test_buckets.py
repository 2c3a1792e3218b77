"""Paths in buckets, gs:// and s3://, on object stores of the loopback address."""

import functools
import json
import os
import signal
import tempfile
from pathlib import Path

import emulators
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import small_runs
import small_world

from dtm_jax import loop, plugins, report
from dtm_jax.checkpoints.contents import load_params
from dtm_jax.checkpoints.manager import Checkpoints
from dtm_jax.errors import NotThereError, OptionError, UserError
from dtm_jax.models.clip import prompts
from dtm_jax.models.clip import weights as clip_weights
from dtm_jax.models.files import weight_files
from dtm_jax.models.vit import config as vit_config
from dtm_jax.models.vit import model as vit
from dtm_jax.records import snapshots
from dtm_jax.storage import local_copies, paths, writing
from dtm_jax.storage.mirror import Mirror
from dtm_jax.training import pretrained, startup
from scripts.reports import report as report_command
from scripts.weights import convert_clip, export
from tests.campaign import runs

ROOT = Path(__file__).parents[1]
SCHEMES = ("gs", "s3")


@pytest.fixture(scope="session")
def stores():
  """Both object stores; the environment leads this process and those that it starts to them."""
  with emulators.s3() as s3, pytest.MonkeyPatch.context() as patch:
    for name, value in (emulators.google() | s3).items():
      patch.setenv(name, value)
    yield


@pytest.fixture(params=SCHEMES)
def bucket(request, stores, tmp_path, monkeypatch):
  """The URL of an empty folder in a bucket; copies of its files go to a cache of the test."""
  monkeypatch.setenv("DTM_JAX_CACHE", str(tmp_path / "cache"))
  return f"{request.param}://{emulators.BUCKET}/{tmp_path.name}"


def test_a_local_path_is_absolute_and_a_url_stays_as_it_is(stores, monkeypatch, tmp_path):
  monkeypatch.chdir(tmp_path)
  assert os.fspath(paths.resolve("runs/x")) == str(tmp_path / "runs/x")
  assert os.fspath(paths.resolve("~/x")) == str(Path.home() / "x")
  for url in ("gs://bucket/x", "s3://bucket/x/"):
    assert os.fspath(paths.resolve(url) / "y") == f"{url.rstrip('/')}/y"


@pytest.mark.parametrize(
  ("path", "message"),
  [
    ("gs:/bucket/x", "two slashes"),
    ("gs://", "names no bucket"),
    ("s3:///", "names no bucket"),
    ("http://host/x", "http:// is not supported"),
    ("hdfs://host/x", "gs://, s3://"),
  ],
)
def test_a_wrong_url_is_refused(path, message):
  with pytest.raises(OptionError, match=message):
    paths.resolve(path)


@pytest.mark.parametrize(("url", "package"), [("gs://bucket/x", "gcsfs"), ("s3://bucket/x", "s3fs")])
def test_a_missing_package_is_named(url, package, monkeypatch):
  monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
  with pytest.raises(OptionError, match=f"pip install {package}"):
    paths.resolve(url)


def test_a_folder_is_proven_writable(bucket):
  folder = writing.make_writable_folder(f"{bucket}/run", "--workdir")
  assert not folder.exists()  # the proof is gone
  missing = bucket.replace(emulators.BUCKET, "missing")
  with pytest.raises(OptionError, match=f"--workdir={missing}: No such bucket"):
    writing.make_writable_folder(missing, "--workdir")


def test_a_file_in_the_way_is_refused(tmp_path):
  (tmp_path / "file").write_text("x")
  with pytest.raises(OptionError, match=f"--workdir={tmp_path}/file: .*FileExistsError"):
    writing.make_writable_folder(tmp_path / "file", "--workdir")


def test_a_folder_moves(bucket, tmp_path):
  for root in (paths.resolve(bucket), paths.resolve(tmp_path)):
    for name in ("4/state/data", "4/commit_success.txt"):
      (root / name).parent.mkdir(parents=True, exist_ok=True)
      (root / name).write_text(name)
    writing.move_folder(root / "4", root / "corrupt" / "4-now")
    assert not (root / "4").exists()
    assert (root / "corrupt/4-now/state/data").read_text() == "4/state/data"
    assert (root / "corrupt/4-now/commit_success.txt").exists()


def test_only_one_creates_a_file(bucket, tmp_path):
  for root in (paths.resolve(bucket), paths.resolve(tmp_path)):
    assert writing.create_file(root / "lock", "first")
    assert not writing.create_file(root / "lock", "second")
    assert (root / "lock").read_text() == "first"


def test_what_is_written_locally_goes_to_the_bucket(bucket):
  with writing.local_folder_for(f"{bucket}/out") as folder:
    (folder / "sub").mkdir()
    (folder / "sub" / "a.bin").write_bytes(b"a")
  with writing.local_file_for(f"{bucket}/out/b.png") as file:
    file.write_bytes(b"b")
  root = paths.resolve(f"{bucket}/out")
  assert (root / "sub" / "a.bin").read_bytes() == b"a"
  assert (root / "b.png").read_bytes() == b"b"


def test_a_local_copy_follows_the_bucket(bucket):
  root = paths.resolve(bucket)
  for name in ("a.json", "b.bin", "sub/c.bin"):
    (root / name).write_text(name)
  folder = local_copies.local_copy(bucket)
  assert sorted(path.name for path in folder.iterdir()) == ["a.json", "b.bin"]
  assert local_copies.local_copy(bucket) == folder  # not fetched again
  assert [path.name for path in local_copies.local_copy(bucket, ["b.bin", "z"]).iterdir()] == ["b.bin"]
  (root / "b.bin").write_text("other content")
  assert local_copies.local_copy(f"{bucket}/b.bin").read_text() == "other content"
  with pytest.raises(NotThereError, match="no file or folder"):
    local_copies.local_copy(f"{bucket}/missing")


def test_the_cache_is_local():
  with pytest.raises(OptionError, match="data_dir=gs://bucket/x: this folder has to be local"):
    local_copies.cache_folder("gs://bucket/x")


@pytest.mark.parametrize(
  ("name", "options"),
  [
    ("folder", {}),
    ("segmentation_folder", {"num_classes": 2}),
    ("cifar10", {}),
  ],
)
def test_a_data_set_that_needs_local_files_is_refused(bucket, name, options):
  with pytest.raises(OptionError, match=rf"data_dir={bucket}: this (path|folder) has to be local, because"):
    plugins.build("datasets", {"name": name, "data_dir": bucket, **options}, split="train")


def test_a_folder_of_classes_in_a_bucket_is_refused_as_imagenet(bucket):
  (paths.resolve(bucket) / "train" / "cat" / "1.jpg").write_bytes(b"")
  with pytest.raises(OptionError, match="has to be local, because"):
    plugins.build("datasets", {"name": "imagenet", "data_dir": bucket}, split="train")


def test_prompts_and_class_names_are_read_from_a_bucket(bucket):
  root = paths.resolve(bucket)
  (root / "templates.txt").write_text("a photo of a {c}\n# a comment\nthe {c}\n")
  (root / "names.txt").write_text("Kätzchen\nHund\n")
  captions = prompts.captions(("cat", "dog"), f"{bucket}/templates.txt", names_file=f"{bucket}/names.txt")
  assert captions == [["a photo of a Kätzchen", "the Kätzchen"], ["a photo of a Hund", "the Hund"]]
  with pytest.raises(NotThereError, match=r"class_names='.*missing\.txt': there is no such file"):
    prompts.captions(("cat", "dog"), "plain", names_file=f"{bucket}/missing.txt")


@pytest.fixture
def compilation_cache():
  """JAX's persistent cache, which the test may move; it is moved back afterwards."""
  from jax.experimental.compilation_cache import compilation_cache

  names = (
    "jax_compilation_cache_dir",
    "jax_persistent_cache_enable_xla_caches",
    "jax_persistent_cache_min_compile_time_secs",
  )
  before = {name: getattr(jax.config, name) for name in names}
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
  compilation_cache.reset_cache()
  yield
  for name, value in before.items():
    jax.config.update(name, value)
  compilation_cache.reset_cache()


def test_compiled_programs_are_kept_in_a_bucket(bucket, compilation_cache):
  jax.config.update("jax_compilation_cache_dir", f"{bucket}/xla")
  startup.keep_compiled_programs()
  hits = []
  listen = lambda event, **_: hits.append(event) if event.endswith("/cache_hits") else None
  jax.monitoring.register_event_listener(listen)
  for expected in (0, 1):
    program = jax.jit(lambda x: jnp.tanh(x @ x).sum() * 17)
    program.lower(jax.ShapeDtypeStruct((5, 5), jnp.float32)).compile()
    assert len(hits) == expected
  jax.monitoring.unregister_event_listener(listen)
  assert list((paths.resolve(bucket) / "xla").glob("*-cache"))


@pytest.mark.parametrize(
  ("folder", "message"), [("hdfs://host/x", "hdfs:// is not supported"), ("gs:/bucket/x", "two slashes")]
)
def test_a_wrong_place_of_compiled_programs_is_refused(compilation_cache, folder, message):
  jax.config.update("jax_compilation_cache_dir", folder)
  with pytest.raises(OptionError, match=f"JAX_COMPILATION_CACHE_DIR={folder}: .*{message}"):
    startup.keep_compiled_programs()


STATE = {"params": {"a": np.arange(1000, dtype=np.float32).reshape(10, 100)}, "step": np.int32(0)}


def save(folder: str, *steps: int) -> Checkpoints:
  """Save a checkpoint for each step, with the step in its arrays."""
  checkpoints = Checkpoints(folder, keep=3, retry_delays=())
  for step in steps:
    state = {"params": {"a": jnp.asarray(STATE["params"]["a"] + step)}, "step": jnp.int32(step)}
    checkpoints.save(step, state, {"seed": step})
  checkpoints.wait()
  return checkpoints


def damage(checkpoint) -> None:
  """Flip one bit of the largest file of the arrays."""
  files = [
    file for folder in ("d", "ocdbt.process_0/d") for file in (checkpoint / "state" / folder).iterdir()
  ]
  largest = max(files, key=lambda file: file.stat().length)
  content = bytearray(largest.read_bytes())
  content[len(content) // 2] ^= 1
  largest.write_bytes(content)


@pytest.mark.parametrize("bucket", ["gs", pytest.param("s3", marks=pytest.mark.long)], indirect=True)
def test_a_damaged_checkpoint_moves_aside_and_stays_there(bucket):
  folder = paths.resolve(bucket) / "checkpoints"
  checkpoints = save(os.fspath(folder), 1, 2)
  damage(folder / "2")
  abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), STATE)
  state, meta, step = checkpoints.restore(abstract)
  assert (meta, step) == ({"seed": 1}, 1)
  np.testing.assert_array_equal(state["params"]["a"], STATE["params"]["a"] + 1)
  checkpoints.close()
  checkpoints = save(os.fspath(folder), 3)  # Orbax deletes what it takes for the rest of a save
  (moved,) = [path for path in (folder / "corrupt").iterdir() if path.is_dir()]
  assert moved.name.startswith("2-")
  assert (moved / "state" / "manifest.ocdbt").exists()
  assert checkpoints.restore(abstract)[1:] == ({"seed": 3}, 3)
  checkpoints.close()


def test_an_unfinished_checkpoint_is_no_checkpoint(bucket):
  folder = paths.resolve(bucket) / "checkpoints"
  save(os.fspath(folder), 1).close()
  (folder / "5" / "state" / "half").write_text("cut off")
  np.testing.assert_array_equal(load_params(os.fspath(folder))["a"], STATE["params"]["a"] + 1)
  checkpoints = save(os.fspath(folder), 5)
  assert checkpoints.all_steps == [1, 5]
  checkpoints.close()


def test_weights_are_read_from_a_bucket(bucket, world, tmp_path):
  for file in (world / "clip").iterdir():
    writing.upload(file, paths.resolve(bucket) / "clip" / file.name)
  (paths.resolve(bucket) / "clip" / "optimizer.bin").write_text("not fetched")
  local = clip_weights.load(world / "clip")[1]
  for source in (f"{bucket}/clip", f"{bucket}/clip/model.safetensors"):
    jax.tree.map(np.testing.assert_array_equal, clip_weights.load(source)[1], local)
  assert not list((tmp_path / "cache").rglob("optimizer.bin"))
  with pytest.raises(NotThereError, match=rf"{bucket}/missing"):
    weight_files.find(f"{bucket}/missing")
  with pytest.raises(NotThereError, match=rf"There is no file {bucket}/missing\.pt"):
    weight_files.find(f"{bucket}/missing.pt")


def test_shards_are_read_from_a_bucket(bucket):
  root = paths.resolve(bucket)
  index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
  (root / "model.safetensors.index.json").write_text(json.dumps(index))
  (root / "config.json").write_text("{}")
  for name, file in index["weight_map"].items():
    (root / file).write_bytes(safetensors.numpy.save({name: np.ones(3, np.float32)}))
  assert sorted(weight_files.read(weight_files.find(bucket))) == ["a", "b"]


def test_a_clip_is_converted_from_bucket_to_bucket(bucket, world):
  for file in (world / "clip").iterdir():
    writing.upload(file, paths.resolve(bucket) / "clip" / file.name)
  convert_clip.convert(f"{bucket}/clip", f"{bucket}/converted")
  expected, found = clip_weights.load(f"{bucket}/clip"), clip_weights.load(f"{bucket}/converted")
  jax.tree.map(np.testing.assert_array_equal, found[1], expected[1])
  assert (paths.resolve(bucket) / "converted" / "SHA256SUMS").exists()


def test_files_of_local_writers_are_copied_now_and_then(bucket, monkeypatch):
  target = paths.resolve(bucket) / "run"
  mirror = Mirror(target)
  (mirror.folder / "plugins").mkdir()
  (mirror.folder / "plugins" / "events").write_text("1")
  mirror.push()
  assert (target / "plugins" / "events").read_text() == "1"
  (mirror.folder / "plugins" / "events").write_text("12")
  mirror.push()  # too early
  assert (target / "plugins" / "events").read_text() == "1"
  mirror.close()
  assert (target / "plugins" / "events").read_text() == "12"
  assert not mirror.folder.exists()


def test_a_report_of_a_run_in_a_bucket(bucket, tmp_path):
  local, folder = small_runs.write(tmp_path / "run"), paths.resolve(bucket)
  for file in local.rglob("*"):
    if file.is_file():
      writing.write_whole(folder / file.relative_to(local).as_posix(), file.read_bytes())
  (run,) = report.read_runs([bucket])
  assert (run.evaluated_steps, run.notes, run.workdir) == ([0, 300], [], bucket)
  report.write_or_warn(bucket)
  assert "Effective rank" in (folder / "report.html").read_text()
  report_command.main([bucket, f"--figures={bucket}/figures"])
  assert (folder / "figures" / "loss.svg").read_text().startswith("<svg")


def test_the_mirror_of_a_local_folder_is_that_folder(tmp_path):
  mirror = Mirror(paths.resolve(tmp_path))
  (mirror.folder / "events").write_text("1")
  mirror.close()
  assert (tmp_path / "events").read_text() == "1"


@pytest.fixture(scope="module")
def whole_run(world, programs, tmp_path_factory):
  """Return the workdir of a local run that nothing has stopped."""
  workdir = tmp_path_factory.mktemp("whole")
  programs.train(small_world.probe_config(world), str(workdir))
  return workdir


def run_main(world: Path, workdir: str, processes: int = 1, run=runs.run_command, code: int = 0) -> list[str]:
  """Run the command with the flags of `small_world.probe_config`; returns the output of each process.

  The processes are forked from one that has the imports. They all have to end with `code`. One process has
  as many devices as the tests.
  """
  devices = len(jax.devices())
  environments = small_world.cluster(1, processes) if processes > 1 else [small_world.environment(devices)]
  folder, flags = Path(tempfile.mkdtemp(dir=world)), small_world.probe_arguments(world, workdir)
  started = [
    runs.Process(flags, folder / f"{index}.log", env=env, run=run) for index, env in enumerate(environments)
  ]
  codes = [process.wait(timeout=900) for process in started]
  outputs = [process.text() for process in started]
  assert codes == [code] * processes, "\n".join(outputs)
  return outputs


def run_killed(arguments: list[str]) -> None:
  """Run the command, which kills itself by SIGKILL at the second step after the first checkpoint."""
  reached_preemption = Checkpoints.reached_preemption

  def kill_at_step_5(self, step):
    if step == 5:
      self.wait()
      os.kill(os.getpid(), signal.SIGKILL)
    return reached_preemption(self, step)

  Checkpoints.reached_preemption = kill_at_step_5
  runs.run_command(arguments)


def assert_same_run(workdir: str, local: Path, rtol: float = 0.0) -> None:
  """Check that a run in a bucket has the parameters, the losses and the numbers of a local one."""
  same = functools.partial(np.testing.assert_allclose, rtol=rtol, atol=rtol)
  found = load_params(f"{workdir}/checkpoints")
  jax.tree.map(same, found, load_params(str(local / "checkpoints")))
  lines = [json.loads(line) for line in (paths.resolve(workdir) / "metrics.jsonl").read_text().splitlines()]
  assert [line["step"] for line in lines] == [line["step"] for line in small_world.metrics(local)]
  losses = {line["step"]: line["loss"] for line in lines if "loss" in line}
  jax.tree.map(same, losses, small_world.losses(local))


@pytest.mark.slow
@pytest.mark.parametrize("bucket", ["gs", pytest.param("s3", marks=pytest.mark.long)], indirect=True)
def test_a_run_in_a_bucket_is_killed_and_resumes_to_the_bit(bucket, world, programs, whole_run):
  workdir = f"{bucket}/run"
  run_main(world, workdir, run=run_killed, code=-signal.SIGKILL)
  root = paths.resolve(workdir)
  assert (root / "lock.json").exists()
  assert [json.loads(line)["step"] for line in (root / "metrics.jsonl").read_text().splitlines()][-1] == 4
  programs.train(small_world.probe_config(world), workdir)
  assert_same_run(workdir, whole_run)
  config = json.loads((root / "config.json").read_text())
  assert config["task"] == "linear_probe"
  assert [start["step"] for start in config["starts"]] == [0, 3]
  assert list(root.glob("events.out.tfevents.*"))
  assert not (root / "lock.json").exists()
  assert not list(Path(ROOT).glob("gs:*"))


@pytest.mark.slow
@pytest.mark.parametrize("bucket", ["gs"], indirect=True)
def test_two_processes_resume_in_a_bucket(bucket, world, programs, whole_run, monkeypatch):
  """This process starts the run and stops at the first checkpoint."""
  workdir = f"{bucket}/run"
  with monkeypatch.context() as stopped:
    stopped.setattr(Checkpoints, "reached_preemption", lambda self, step: step == 3)
    programs.train(small_world.probe_config(world), workdir)
  outputs = run_main(world, workdir, processes=2)
  assert all("Resumed from step 3" in output for output in outputs)
  assert_same_run(workdir, whole_run, rtol=1e-5)


def test_snapshots_are_written_to_a_bucket(bucket):
  root, index_B = paths.resolve(bucket), np.arange(2)
  snapshots.write_images(root, np.zeros((2, 4, 4, 3), np.uint8), index_B, index_B)
  snapshots.write_groups(root, 5, index_B, {"tokens": np.arange(8).reshape(2, 4)})
  np.testing.assert_array_equal(snapshots.read(root).groups[5]["tokens"], np.arange(8).reshape(2, 4))


def test_the_pod_command_stands_in_the_docs():
  assert "--config=configs/vitb16.py --workdir=gs://BUCKET/vitb16" in (ROOT / "docs/imagenet.md").read_text()


@pytest.mark.slow
@pytest.mark.long  # two processes train in a bucket above, and test_configs.py traces this config
def test_the_pod_command_runs_on_two_hosts(stores, world, tmp_path):
  """It is what tpu_pod.sh starts by docs/imagenet.md. The options after it only make it quick."""
  workdir = f"gs://{emulators.BUCKET}/vitb16"
  small = [
    "data.dataset.name=cifar10", f"data.dataset.data_dir={world}", "data.image_size=32",
    f"teacher.path={world / 'clip'}", "student.variant=Ti", "student.patch_size=4", "student.width=32",
    "student.depth=2", "student.num_heads=2", "mask.num_masked=25", "mask.min_patches=4",
    "morphers.dtm.max_rounds=6", "batch_size=8", "total_steps=2",
    "optim.warmup_steps=1", "student.dtype=float32", "student.remat=none", "teacher.dtype=float32",
    "augment.color_jitter=0.0", "evals.snapshots.at_start=False",
  ]  # fmt: skip
  flags = ["--config=configs/vitb16.py", f"--workdir={workdir}", *(f"--config.{option}" for option in small)]
  started = [
    runs.Process(flags, tmp_path / f"{place}.log", env=environment)
    for place, environment in enumerate(small_world.cluster(1))
  ]
  codes = [process.wait(timeout=900) for process in started]
  assert codes == [0, 0], "\n".join(process.text() for process in started)
  assert (paths.resolve(workdir) / "metrics.jsonl").exists()
  assert "mask_token" in load_params(f"{workdir}/checkpoints")
  assert not list(ROOT.glob("gs:*"))


def test_a_bucket_that_does_not_exist_is_refused_at_once(bucket, world):
  missing = bucket.replace(emulators.BUCKET, "missing")
  config = small_world.debug_config(world, teacher__path="/nowhere", data__dataset__data_dir="/nowhere")
  with pytest.raises(UserError, match=f"--workdir={missing}: No such bucket, or it cannot be written"):
    loop.train(config, missing)


@pytest.fixture(scope="module")
def student_run(world, tmp_path_factory):
  """Return the workdir of a pre-training run with a checkpoint of random parameters."""
  workdir, rng = tmp_path_factory.mktemp("student"), np.random.default_rng(0)
  config = small_world.debug_config(world)
  (workdir / "config.json").write_text(config.to_json_best_effort())
  shapes = vit_config.param_shapes(vit.build(**config.student), (8, 8))
  params = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape, np.float32), shapes)
  checkpoints = Checkpoints(str(workdir / "checkpoints"))
  checkpoints.save(1, {"params": params, "step": np.int32(1)}, {})
  checkpoints.close()
  return workdir


@pytest.mark.slow
@pytest.mark.parametrize("bucket", ["gs", pytest.param("s3", marks=pytest.mark.long)], indirect=True)
def test_a_run_in_a_bucket_is_exported_probed_and_finetuned_from(bucket, student_run):
  for file in student_run.rglob("*"):
    if file.is_file():
      writing.upload(file, paths.resolve(bucket) / "run" / file.relative_to(student_run).as_posix())
  # A local checkpoint has no last file that says that it is whole.
  (step,) = [path for path in (paths.resolve(bucket) / "run" / "checkpoints").iterdir() if path.name == "1"]
  (step / writing.COMMIT_FILE).write_text("copied")
  export.export(f"{bucket}/run", "timm", f"{bucket}/exported")
  export.export(str(student_run), "timm", student_run / "exported")
  for remote, local in ((f"{bucket}/run", student_run), (f"{bucket}/exported", student_run / "exported")):
    jax.tree.map(np.testing.assert_array_equal, pretrained.load(remote), pretrained.load(str(local)))
  teacher = plugins.build("teachers", {"name": "checkpoint", "path": f"{bucket}/run"})
  assert teacher.width == plugins.build("teachers", {"name": "checkpoint", "path": str(student_run)}).width
