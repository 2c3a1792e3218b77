"""Sockets load their modules by name, and an unknown name raises an error that lists the choices."""

import jax
import numpy as np
import pytest

from dtm_jax import plugins, rngs


@pytest.mark.parametrize("socket", plugins.SOCKETS)
def test_every_module_of_every_socket_loads(socket):
  assert plugins.available(socket)
  for name in plugins.available(socket):
    assert plugins.load(socket, name).__name__ == f"dtm_jax.{socket}.{name}"


def test_modules_with_an_underscore_are_no_choices():
  assert (plugins.PACKAGE / "morphers" / "_clustering.py").exists()
  assert "_clustering" not in plugins.available("morphers")
  with pytest.raises(ValueError, match="Unknown name '_clustering' in morphers"):
    plugins.load("morphers", "_clustering")


def test_unknown_names_list_the_choices():
  with pytest.raises(ValueError, match=r"'bipartit' in morphers. Did you mean 'bipartite'.*identity, image"):
    plugins.load("morphers", "bipartit")
  with pytest.raises(ValueError, match=r"Unknown socket 'losses'.*teachers"):
    plugins.available("losses")


def test_keys_depend_on_seed_stream_and_step_only():
  draw = lambda seed, *args: np.asarray(jax.random.key_data(rngs.stream(jax.random.key(seed), *args)))
  np.testing.assert_array_equal(draw(0, "mask", 3), draw(0, "mask", 3))
  different = {
    tuple(draw(*args)) for args in [(0, "mask", 3), (1, "mask", 3), (0, "flip", 3), (0, "mask", 4)]
  }
  assert len(different) == 4


def test_keys_of_examples_do_not_depend_on_the_batch():
  key = rngs.stream(jax.random.key(0), "mask", 3)
  eight, four = (jax.random.key_data(rngs.per_example(key, size)) for size in (8, 4))
  np.testing.assert_array_equal(eight[:4], four)


def test_the_text_after_a_slash_is_the_variant():
  with pytest.raises(ValueError, match="no_such_set"):
    plugins.build("datasets", {"name": "tfds/no_such_set", "data_dir": "/nowhere"}, split="train")
