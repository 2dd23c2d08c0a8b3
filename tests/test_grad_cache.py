"""The same gradients with memory for a part of the batch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avjax import collectives, experiment, grad_cache, memory
from avjax.errors import InputError
from tests import runs

CONFIGS = {
  "cavmae": ("cavmae_audioset", {"model__group_size": 0}),
  "deteclap": ("deteclap_vgg", {}),
  "avsiam": ("avsiam_audioset", {}),
}
BATCH = 16


@functools.cache
def setup_of(name, size=0, batch_size=BATCH, devices=1, folder="", **changes):
  """An experiment without data; `size` of `grad_cache`."""
  file, more = CONFIGS[name]
  changes = {**more, **changes, "grad_cache": size, "mesh__data": devices}
  if name == "deteclap":
    changes["data__object_scores"] = folder
  config = runs.stage(file, **changes)
  return experiment.build(
    runs.plain(config), batch_size=batch_size, steps_per_epoch=1
  )


@pytest.fixture(scope="module")
def scores(tmp_path_factory):
  from data_prep import synthetic

  return str(synthetic.scores(tmp_path_factory.mktemp("scores")))


def gradients(setup):
  """Loss, metrics and gradients of the first step on noise."""
  step = jax.jit(
    lambda state, batch: experiment.gradients(
      setup, jax.random.key(3), state["step"]
    )(state["params"], batch)
  )
  batch = experiment.synthetic_batch(setup)
  rng = np.random.default_rng(0)
  for key in ("has_audio", "has_video"):
    there = jnp.asarray(rng.uniform(size=len(batch[key])) < 0.8)
    batch[key] = jax.device_put(there, batch[key].sharding)
  for key in batch:
    if key.startswith("objects/"):
      values = rng.uniform(size=batch[key].shape).astype(np.float16)
      batch[key] = jax.device_put(values, batch[key].sharding)
  return step(setup.init_state(), batch)


@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_are_those_of_the_whole_batch(name, scores):
  (loss, aux), grads = gradients(setup_of(name, folder=scores))
  for size, devices in ((4, 1), (8, 2)):
    setup = setup_of(name, size, devices=devices, folder=scores)
    (found, more), ours = gradients(setup)
    np.testing.assert_allclose(found, loss, rtol=1e-5)
    assert more["metrics"].keys() == aux["metrics"].keys()
    for key, value in aux["metrics"].items():
      np.testing.assert_allclose(more["metrics"][key], value, rtol=1e-5)
    compare = functools.partial(assert_close, where=f"{name} {size}")
    jax.tree.map(compare, ours, grads)


def assert_close(ours, theirs, where):
  scale = max(float(np.abs(theirs).max()), 1e-6)
  np.testing.assert_allclose(ours / scale, theirs / scale, atol=1e-4,
                             err_msg=where)  # fmt: skip


def needed(size, batch_size):
  """Temporary bytes of a step."""
  setup = setup_of("cavmae", size, batch_size)
  found = memory.analysis(setup.compile_step())
  return found.temporary


def test_memory_does_not_grow_with_the_batch():
  cached = [needed(4, b) for b in (16, 64)]
  plain = [needed(0, b) for b in (16, 64)]
  assert plain[1] > 3 * plain[0]
  assert cached[1] < 1.15 * cached[0]
  assert cached[0] < plain[0]


def test_parts_hold_neighbours_of_each_device():
  x = jnp.arange(16)
  parts = grad_cache.split(x, 4, 2)
  np.testing.assert_array_equal(
    parts, [[0, 1, 8, 9], [2, 3, 10, 11], [4, 5, 12, 13], [6, 7, 14, 15]]
  )
  np.testing.assert_array_equal(grad_cache.join(parts, 2), x)


@pytest.mark.parametrize(
  "name, size, changes, words",
  [
    ("cavmae", 5, {}, "grad_cache=5 does not divide the batch size 16"),
    ("cavmae", -4, {}, "grad_cache=-4 does not divide"),
    ("cavmae", 2, {"devices": 4}, "not a multiple of 4: 4 devices take 1 "),
    ("avsiam", 1, {}, "grad_cache=1 is not a multiple of 2: 1 devices take 2"),
    (
      "cavmae",
      4,
      {"optimizer__accumulate": 2},
      "optimizer.accumulate=2 both split the batch",
    ),
    ("cavmae", 4, {"data__augment__mixup": 0.5}, "mixup=0.5 mixes"),
  ],
)
def test_what_does_not_go_together_is_refused(name, size, changes, words):
  with pytest.raises(InputError, match=words):
    setup_of(name, size, **changes)


def test_methods_without_halves_are_refused():
  config = runs.plain(runs.stage("avmae_vgg", grad_cache=4))
  with pytest.raises(InputError, match="'avmae' is not in two halves"):
    experiment.build(config, batch_size=8, steps_per_epoch=1)


def test_devices_send_vectors_once_whatever_the_parts():
  """Gradients alone are summed in the loop over the parts."""
  setup = setup_of("cavmae", 8, devices=8, batch_size=32)
  found = collectives.find(setup.compile_step())
  assert {one.kind for one in found if one.times > 1} == {"all-reduce"}
  moved = {one.kind for one in found if one.times == 1}
  assert {"all-gather", "reduce-scatter"} <= moved
