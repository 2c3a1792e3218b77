"""The command's evaluation on 1 device, on 8 and in 2 processes: the same number to the last digit."""

import subprocess
import sys

import portpicker
import pytest
import small_world
from test_loop import ROOT, environment


@pytest.mark.slow
def test_every_example_counts_once_whatever_the_devices_and_processes(tmp_path):
  small_world.write_cifar10(tmp_path)
  port = portpicker.pick_unused_port()
  alone = {"1": environment(1), "8": environment(8)}
  pair = {
    f"2x4/{index}": environment(
      4, JAX_COORDINATOR_ADDRESS=f"127.0.0.1:{port}", JAX_NUM_PROCESSES="2", JAX_PROCESS_ID=str(index)
    )
    for index in range(2)
  }
  runs = [
    subprocess.Popen(
      [
        sys.executable, "-m", "dtm_jax.main", "--config=configs/zeroshot_cifar10.py",
        f"--workdir={tmp_path / name.split('/')[0]}",
        f"--config.data.dataset.data_dir={tmp_path}", f"--config.evals.zeroshot.dataset.data_dir={tmp_path}",
      ],
      cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )
    for name, env in (alone | pair).items()
  ]  # fmt: skip
  outputs = [run.communicate(timeout=300)[0].decode() for run in runs]
  assert [run.returncode for run in runs] == [0] * len(runs), "\n".join(out[-2000:] for out in outputs)
  one, eight, two = (small_world.metrics(tmp_path / name) for name in ("1", "8", "2x4"))
  assert one == eight == two
  assert (32 * one[0]["zeroshot/accuracy"]).is_integer()
