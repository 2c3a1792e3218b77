"""List the checks in the order in which they run, and make the cheap ones: devices, hosts, estimate."""

import functools
import json
import zlib
from collections.abc import Iterator

import jax

from dtm_jax import processes
from dtm_jax.doctor import FAILURE, OK, WARNING, Check, Examination, Finding, gigabytes
from dtm_jax.doctor.inputs import check_data, check_teacher
from dtm_jax.doctor.steps import check_step
from dtm_jax.doctor.workdirs import check_disk, check_records, check_workdir
from dtm_jax.options import validation
from dtm_jax.progress import duration
from dtm_jax.records import changes, provenance
from dtm_jax.training import mesh as meshes


def make_checks(compile_seconds: float) -> dict[str, Check]:
  """Return the checks by title. Later ones use what earlier ones have found out."""
  return {
    "hosts": check_hosts,
    "devices": check_devices,
    "workdir": check_workdir,
    "data": check_data,
    "teacher": check_teacher,
    "records": check_records,
    "step": functools.partial(check_step, compile_seconds=compile_seconds),
    "disk": check_disk,
    "estimate": check_estimate,
  }


def check_hosts(examination: Examination) -> Iterator[Finding]:
  """Compare code, config, versions and number of devices of all processes."""
  config = json.dumps(changes.plain(examination.config), sort_keys=True)
  facts = {
    "code": f"{provenance.checksum_of_code():08x}",
    "config": f"{zlib.crc32(config.encode()):08x}",
    "workdir": str(examination.workdir),
    "versions": json.dumps(provenance.describe()["versions"]),
    "local devices": f"{jax.local_device_count()} {jax.local_devices()[0].device_kind}",
  }
  every = processes.gather(facts)
  differing = {
    name: [each[name] for each in every] for name in facts if len({each[name] for each in every}) > 1
  }
  examination.same_hosts = not differing
  for name, values in differing.items():
    groups = {value: [place for place, each in enumerate(values) if each == value] for value in values}
    text = "; ".join(f"{value} on processes {_short(places)}" for value, places in groups.items())
    fix = "Start the same command, from the same checkout and environment, on every host."
    yield Finding(FAILURE, "hosts", f"the processes differ in {name}: {text}", fix)
  if not differing:
    text = f"{len(every)} processes agree" if len(every) > 1 else "one process"
    yield Finding(OK, "hosts", f"{text}; code {facts['code']}, config {facts['config']}")


def check_devices(examination: Examination) -> Iterator[Finding]:
  """Check that the mesh and the batch fit the devices."""
  config = examination.config
  validation.check_devices(config, jax.device_count(), jax.process_count())
  examination.mesh = meshes.make_mesh(config.mesh.data, config.mesh.fsdp)
  device = jax.local_devices()[0]
  shape = ", ".join(f"{name}={size}" for name, size in examination.mesh.shape.items())
  slices = len({meshes.slice_of(each) for each in jax.devices()})
  where = f" in {slices} slices" if slices > 1 else ""
  images = config.batch_size / jax.device_count()
  text = f"{jax.device_count()} {device.device_kind}{where}; mesh {shape}; {images:g} images a device"
  if device.platform == "cpu" and config.batch_size >= 512:
    fix = 'Install JAX for them: pip install "dtm_jax[cuda]" or "dtm_jax[tpu]".'
    yield Finding(WARNING, "devices", f"{text}; JAX sees no accelerator", fix)
  else:
    yield Finding(OK, "devices", text)


def check_estimate(examination: Examination) -> Iterator[Finding]:
  """Estimate time and size of the run."""
  examination.require("course")
  course, config = examination.course, examination.config
  assert course is not None
  steps = course.total_steps(config)
  if not steps:
    yield Finding(OK, "estimate", "no steps: the run only evaluates")
    return
  epochs = steps * config.batch_size / course.epoch_size
  size = f"{steps:,} steps of {config.batch_size:,} images, {epochs:.1f} epochs"
  if examination.state_bytes is not None:
    size += f"; a checkpoint has {gigabytes(examination.state_bytes)}"
  rates = processes.gather([examination.step_seconds, examination.host_rate])
  if None in (number for each in rates for number in each):
    yield Finding(WARNING, "estimate", f"{size}; the time is not known", "See the lines above.")
    return
  reading = max(config.batch_size / len(rates) / rate for _, rate in rates)
  step = max(reading, *(seconds for seconds, _ in rates))
  slower = "reading" if reading == step else "the step"
  text = f"{size}; about {duration(steps * step)} for the steps alone, set by {slower}"
  yield Finding(OK, "estimate", f"{text}, without evaluations and saves")


def _short(places: list[int]) -> str:
  """Return numbers for people, at most six of them."""
  return ", ".join(map(str, places[:6])) + (f" and {len(places) - 6} more" if len(places) > 6 else "")
