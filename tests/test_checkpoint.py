"""Checkpoints: exact, verified, never half written."""

import itertools
import os
import pathlib
import random
import resource
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from avjax import stored_step, trees
from avjax.checkpoint import Checkpoints, RunLock, restore_params
from avjax.errors import InputError, SaveError
from tests import runs


def state_of(step, size=64):
  """A state of every kind of array, different at every step."""
  rng = np.random.default_rng(step)
  w = rng.standard_normal((8, size)).astype(np.float32)
  return {
    "params": {
      "block_00": {"kernel": jnp.asarray(w), "half": jnp.bfloat16(w[0])},
      "flag": jnp.array([True, False, True]),
    },
    "opt_state": {"step": jnp.int32(step), "mu": {"kernel": jnp.asarray(-w)}},
    "average": {},
    "step": np.int64(step),
    "rng": jax.random.key(step),
    "raw": jax.random.key_data(jax.random.key(step + 1)),
  }


def assert_same(a, b):
  """Bit for bit, typed keys too."""
  a, b = trees.flatten(a), trees.flatten(b)
  assert a.keys() == b.keys()
  for name, value in a.items():
    if jnp.issubdtype(getattr(value, "dtype", None), jax.dtypes.prng_key):
      assert value.dtype == b[name].dtype
      value, b[name] = (jax.random.key_data(x) for x in (value, b[name]))
    assert np.asarray(value).dtype == np.asarray(b[name]).dtype, name
    assert np.asarray(value).tobytes() == np.asarray(b[name]).tobytes(), name


def saved(directory, *steps, **keys):
  """A folder that holds these steps."""
  with Checkpoints(directory, **{"keep": 9, **keys}) as checkpoints:
    for step in steps:
      checkpoints.save(step, state_of(step), extra={"position": step})
  return pathlib.Path(directory)


@pytest.fixture
def mesh():
  return jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))


def spread(state, mesh):
  return jax.device_put(state, NamedSharding(mesh, PartitionSpec("data")))


# --- Round trips -------------------------------------------------------------


def test_round_trip_is_exact_without_and_with_a_template(tmp_path):
  extra = {"position": 7, "scores": {"x": float("inf"), "y": 0.1}, "n": [1]}
  with Checkpoints(tmp_path) as checkpoints:
    assert (checkpoints.latest(), checkpoints.steps()) == (None, [])
    checkpoints.save(3, state_of(3), extra=extra)
    assert checkpoints.steps() == [3]
    step, state, back = checkpoints.restore()
    assert (step, back) == (3, extra)
    assert state["average"] == {}
    assert_same(state, state_of(3))
    shapes = jax.eval_shape(lambda: state_of(0) | {"step": np.int32(0)})
    shapes["step"] = jax.ShapeDtypeStruct((), np.int64)
    assert_same(checkpoints.restore(shapes)[1], state_of(3))
    assert isinstance(state["params"]["flag"], np.ndarray)


def test_arrays_may_be_donated_as_soon_as_save_returns(tmp_path):
  spoil = jax.jit(lambda x: jax.tree.map(lambda a: a + 1, x), donate_argnums=0)
  with Checkpoints(tmp_path) as checkpoints:
    live = {"params": {"w": jnp.arange(1_000_000.0)}, "n": np.zeros(3)}
    checkpoints.save(1, live)
    spoil(live["params"])
    live["n"] += 1
    _, state, _ = checkpoints.restore()
  np.testing.assert_array_equal(state["params"]["w"], np.arange(1_000_000.0))
  np.testing.assert_array_equal(state["n"], np.zeros(3))


def test_another_mesh_restores_the_same_values(tmp_path, mesh):
  values = {"params": {"w": jnp.arange(64.0).reshape(8, 8)}}
  other = jax.make_mesh(
    (2, 4), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2
  )
  sharding = NamedSharding(other, PartitionSpec("tensor", "fsdp"))
  template = {
    "params": {"w": jax.ShapeDtypeStruct((8, 8), np.float32, sharding=sharding)}
  }
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, spread(values, mesh))
    _, state, _ = checkpoints.restore(template)
  assert state["params"]["w"].sharding == sharding
  assert_same(state, values)


def test_parameters_alone(tmp_path):
  directory = saved(tmp_path, 1, 2)
  step, params = restore_params(directory)
  assert step == 2
  assert_same(params, state_of(2)["params"])
  step, params = restore_params(directory, 1)
  assert_same(params, state_of(1)["params"])
  with Checkpoints(directory) as checkpoints:
    mean = {"mean": {"w": jnp.ones(2)}, "count": jnp.int32(1)}
    checkpoints.save(3, {"params": {"w": jnp.zeros(2)}, "average": mean})
  assert restore_params(directory)[1]["w"][0] == 1
  assert restore_params(directory, averaged=False)[1]["w"][0] == 0


@pytest.mark.parametrize(
  "change, words",
  [
    (
      {"w": np.zeros((2, 4), np.float32)},
      r"'params/w' is float32 \[2, 3\] .*float32 \[2, 4\]",
    ),
    (
      {"w": np.zeros((2, 3), np.int32)},
      r"'params/w' is float32 \[2, 3\] .*int32 \[2, 3\]",
    ),
    ({}, r"holds an array 'params/w' with shape \[2, 3\]"),
    (
      {"w": np.zeros((2, 3), np.float32), "v": np.zeros(5)},
      r"has no array 'params/v', .*\[5\]",
    ),
  ],
)
def test_template_that_does_not_fit_is_named(tmp_path, change, words):
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, {"params": {"w": np.zeros((2, 3), np.float32)}})
    with pytest.raises(InputError, match=words):
      checkpoints.restore({"params": change})


# --- What stays --------------------------------------------------------------


def test_newest_and_best_stay_also_after_reopening(tmp_path):
  scores = {1: 0.5, 2: 0.9, 3: 0.1, 4: float("nan"), 5: 0.3, 6: 0.2}
  for part in ((1, 2, 3), (4, 5, 6)):
    with Checkpoints(tmp_path, keep=2, best="map") as checkpoints:
      for step in part:
        metrics = {"map": scores[step]}
        checkpoints.save(step, {"w": np.ones(2)}, metrics=metrics)
      assert checkpoints.best() == 2
  with Checkpoints(tmp_path, best="map", best_mode="min") as checkpoints:
    assert checkpoints.steps() == [2, 5, 6]
    assert checkpoints.best() == 6
    checkpoints.save(7, {"w": np.ones(2)})
    checkpoints.save(8, {"w": np.ones(2)}, wait=True)
    assert checkpoints.steps() == [6, 7, 8]


def test_existing_and_earlier_steps_are_refused(tmp_path):
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(5, state_of(5))
    for step in (5, 4):
      with pytest.raises(InputError, match="holds step 5 already"):
        checkpoints.save(step, state_of(step))
    assert_same(checkpoints.restore()[1], state_of(5))


@pytest.mark.parametrize(
  "keys, words",
  [
    ({"keep": 0}, "keep is 0"),
    ({"best_mode": "mxa"}, "Did you mean 'max'"),
  ],
)
def test_bad_options_are_refused(tmp_path, keys, words):
  with pytest.raises(InputError, match=words):
    Checkpoints(tmp_path, **keys)


def test_bad_content_is_refused(tmp_path):
  with Checkpoints(tmp_path, best="map") as checkpoints:
    with pytest.raises(InputError, match=r"checkpoint.best 'map'.*Known: mapp"):
      checkpoints.save(1, state_of(1), metrics={"mapp": 1.0})
    with pytest.raises(InputError, match=r"extra .* is not JSON"):
      checkpoints.save(1, state_of(1), extra={"x": np.ones(1)})
    with pytest.raises(InputError, match="not in nested dicts"):
      checkpoints.save(1, {"params": [np.ones(1)]})
    assert checkpoints.steps() == []
    with pytest.raises(InputError, match=r"no intact checkpoint: .*empty"):
      checkpoints.restore()


def test_reading_changes_nothing(tmp_path):
  directory = saved(tmp_path / "a", 1, 2, 3)
  foreign = directory / "4.orbax-checkpoint-tmp"
  foreign.mkdir()
  reader = Checkpoints(directory, keep=None)
  assert reader.restore(step=2)[0] == 2
  with pytest.raises(
    InputError, match="holds no step 9; it holds step 1, 2, 3"
  ):
    reader.restore(step=9)
  with pytest.raises(InputError, match="open for reading only"):
    reader.save(4, state_of(4))
  reader.close()
  assert foreign.exists()
  assert Checkpoints(tmp_path / "none", keep=None).steps() == []
  assert not (tmp_path / "none").exists()
  with Checkpoints(directory):
    assert not foreign.exists()


# --- Damage ------------------------------------------------------------------


def fresh_copy(directory):
  """At another path, as TensorStore caches what this process has written."""
  copy = directory.with_name(f"copy{next(NUMBERS)}")
  return shutil.copytree(directory, copy)


NUMBERS = itertools.count()


def data_files(folder):
  return sorted(p for p in (folder / "state").rglob("d/*") if p.is_file())


def truncate(folder):
  for file in data_files(folder):
    file.write_bytes(file.read_bytes()[:-9])


def lose_data(folder):
  for file in data_files(folder):
    file.unlink()


def alter_record(folder):
  file = folder / "record" / "metadata"
  file.write_text(file.read_text().replace('"position": 3', '"position": 4'))


def lose_record(folder):
  (folder / "record" / "metadata").unlink()


@pytest.mark.parametrize(
  "damage, words",
  [
    (truncate, "cannot be read"),
    (lose_data, "cannot be read"),
    (alter_record, "record/metadata fails its checksum"),
    (lose_record, "record/metadata cannot be read"),
  ],
)
def test_damage_is_reported_and_the_step_before_taken(
  tmp_path, damage, words, caplog
):
  directory = fresh_copy(saved(tmp_path / "a", 1, 2, 3))
  damage(directory / "3")
  with Checkpoints(directory, keep=2, best="map") as checkpoints:
    with caplog.at_level("WARNING", logger="absl"):
      step, state, extra = checkpoints.restore()
    assert words in caplog.text and f"{directory}/3" in caplog.text
    assert (step, extra) == (2, {"position": 2})
    assert_same(state, state_of(2))
    with pytest.raises(InputError, match=r"no intact checkpoint"):
      checkpoints.restore(step=3)
    # Training goes on and reaches the damaged step's number again.
    checkpoints.save(3, state_of(30), wait=True)
    assert checkpoints.steps() == [2, 3]
    assert_same(checkpoints.restore()[1], state_of(30))
  assert (directory / "damaged-3").is_dir()


def test_one_flipped_bit_in_any_file_never_changes_a_value(tmp_path):
  directory = saved(tmp_path / "a", 1, 2)
  files = sorted(p for p in (directory / "2").rglob("*") if p.is_file())
  noticed = []
  for file in files:
    copy = fresh_copy(directory)
    damaged = copy / file.relative_to(directory)
    data = bytearray(damaged.read_bytes())
    data[len(data) // 2] ^= 4
    damaged.write_bytes(data)
    with Checkpoints(copy, best="map") as checkpoints:
      step, state, _ = checkpoints.restore()
    assert_same(state, state_of(step))
    noticed += [file.name] if step == 1 else []
  assert "metadata" in noticed and "manifest.ocdbt" in noticed
  assert len(noticed) >= 3


def test_wrong_value_is_reported_with_the_array(tmp_path):
  """What Orbax itself does not notice: intact files with other numbers."""
  saved(tmp_path / "a", 1)
  other = state_of(1)
  other["params"]["block_00"]["kernel"] += 1
  with Checkpoints(tmp_path / "b") as checkpoints:
    checkpoints.save(1, other)
  (tmp_path / "a/1/state").rename(tmp_path / "away")
  (tmp_path / "b/1/state").rename(tmp_path / "a/1/state")
  with pytest.raises(
    InputError, match="checksum of params/block_00/kernel is [0-9a-f]{16}, not"
  ):
    Checkpoints(tmp_path / "a", keep=None).restore()


def test_parameters_alone_skip_a_damaged_step(tmp_path):
  directory = fresh_copy(saved(tmp_path / "a", 1, 2))
  truncate(directory / "2")
  assert restore_params(directory)[0] == 1
  lose_data(directory / "1")
  with pytest.raises(InputError, match=r"(?s)/2 .*/1 "):
    restore_params(directory)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "uint8", "bool"])
def test_checksum_is_the_same_on_host_and_devices(mesh, dtype):
  values = np.random.default_rng(0).standard_normal((16, 24)) * 100
  host = np.asarray(jnp.asarray(values).astype(dtype))
  expected = stored_step.checksums({"x": host})["x"]
  live = spread(jnp.asarray(host), mesh)
  assert stored_step.checksums({"x": live})["x"] == expected
  on_device = stored_step._device_sums(live)
  assert "".join(f"{int(s):08x}" for s in on_device) == expected


def test_checksum_sees_what_plain_sums_do_not():
  x = np.random.default_rng(0).standard_normal((300_000, 2)).astype(np.float32)
  swapped, signs, zeros = x.copy(), x.copy(), x.copy()
  swapped[[7, 299_999]] = swapped[[299_999, 7]]
  signs[[1, 280_000]] *= -1  # Two flips of the highest bit.
  zeros[1000:2000] = 0
  kinds = {"x": x, "swapped": swapped, "signs": signs, "zeros": zeros}
  assert len(set(stored_step.checksums(kinds).values())) == 4
  assert len(stored_step.checksums({"a": np.zeros(0), "b": np.int64(3)})) == 2


# --- Failures while saving ---------------------------------------------------


@pytest.fixture
def small_files():
  """No file may grow beyond 64 KiB, as on a disk that is full."""
  old = resource.getrlimit(resource.RLIMIT_FSIZE)
  handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
  resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, old[1]))
  yield
  resource.setrlimit(resource.RLIMIT_FSIZE, old)
  signal.signal(signal.SIGXFSZ, handler)


# Orbax leaves writes of a failed save to an event loop that it has closed.
@pytest.mark.filterwarnings(
  "ignore::pytest.PytestUnraisableExceptionWarning",
  "ignore::pytest.PytestUnhandledThreadExceptionWarning",
)
@pytest.mark.parametrize("surface", ["wait", "save", "close", "check"])
def test_full_disk_leaves_the_earlier_steps(tmp_path, small_files, surface):
  checkpoints = Checkpoints(tmp_path, keep=1)
  checkpoints.save(1, state_of(1), wait=True)
  with pytest.raises(
    SaveError, match=rf"step 2 .* in {tmp_path}, where [\d,]+ bytes are free"
  ):
    checkpoints.save(2, state_of(2, size=1 << 16))
    if surface == "check":
      while True:
        checkpoints.check()
        time.sleep(0.01)
    getattr(checkpoints, surface)(
      *([3, state_of(3)] if surface == "save" else [])
    )
  assert [p.name for p in tmp_path.iterdir()] == ["1"]
  assert checkpoints.steps() == [1]
  assert_same(checkpoints.restore()[1], state_of(1))
  if surface != "close":
    checkpoints.save(2, state_of(2), wait=True)  # Room again.
    assert_same(checkpoints.restore()[1], state_of(2))
    checkpoints.close()


SAVE_FOREVER = """
import sys
from avjax.checkpoint import Checkpoints, RunLock
from tests.test_checkpoint import state_of
with RunLock(sys.argv[1] + "/lock"):
  checkpoints = Checkpoints(sys.argv[1] + "/checkpoints", keep=2)
  step = checkpoints.latest() or 0
  while True:
    step += 1
    checkpoints.save(step, state_of(step, size=200_000), extra={"at": step})
"""


def test_killed_while_saving_leaves_a_complete_step_and_frees_the_lock(
  tmp_path,
):
  directory = tmp_path / "checkpoints"
  child = subprocess.Popen(
    [sys.executable, "-c", SAVE_FOREVER, str(tmp_path)], cwd=runs.ROOT
  )
  end = time.monotonic() + 60
  try:
    reader = Checkpoints(directory, keep=None)
    while (reader.latest() or 0) < 3:
      assert child.poll() is None and time.monotonic() < end
      time.sleep(0.01)
    with (
      pytest.raises(InputError, match=f"in use by process {child.pid} on"),
      RunLock(tmp_path / "lock"),
    ):
      pass
    time.sleep(random.uniform(0, 0.2))
    while not any(directory.glob("*.orbax-checkpoint-tmp*")):
      assert child.poll() is None and time.monotonic() < end
  finally:
    child.kill()
    child.wait()
  with RunLock(tmp_path / "lock"), Checkpoints(directory) as checkpoints:
    assert not any(directory.glob("*.orbax-checkpoint-tmp*"))
    step, state, extra = checkpoints.restore()
  assert extra == {"at": step} and step == checkpoints.latest()
  assert_same(state, state_of(step, size=200_000))


def test_lock_is_released_and_refused_within_a_process(tmp_path):
  path = tmp_path / "run" / "lock"
  with (
    RunLock(path),
    pytest.raises(InputError, match=f"process {os.getpid()} on .* since 20"),
    RunLock(path),
  ):
    pass
  with RunLock(path):
    pass
