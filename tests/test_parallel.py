"""Meshes, placement rules and the counting of matrix products."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from avjax import experiment, flops, parallel
from avjax.errors import InputError
from tests import runs


def mesh(**axes):
  return parallel.make_mesh(
    ConfigDict({"data": 1, "fsdp": 1, "tensor": 1, **axes})
  )


def test_minus_one_takes_what_is_left():
  assert dict(mesh(data=-1, fsdp=2).shape) == {
    "data": 4,
    "fsdp": 2,
    "tensor": 1,
  }


@pytest.mark.parametrize(
  "axes, words",
  [
    ({"data": 16}, "needs 16 devices; there are 8"),
    ({"data": -1, "fsdp": 3}, "8 devices do not divide by the 3"),
    ({"data": -1, "fsdp": -1}, "is not valid"),
    ({"data": 0}, "is not valid"),
  ],
)
def test_impossible_mesh_is_refused(axes, words):
  with pytest.raises(InputError, match=words):
    mesh(**axes)


PROCESSES = """
import sys
import jax
process, port = int(sys.argv[1]), sys.argv[2]
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize("127.0.0.1:" + port, 2, process)
from avjax import config, parallel
from avjax.errors import InputError
section = config.base_config().mesh
section.data, section.fsdp, section.tensor = 2, 1, 2
parallel.make_mesh(section)
section.data, section.tensor = 1, 4
try:
  parallel.make_mesh(section)
except InputError as error:
  assert "mesh.tensor=4 goes over devices of several processes" in str(error)
  assert "each has 2" in str(error)
else:
  raise AssertionError("not refused")
from avjax import evaluate
mine = {"test": ["ä", "b"]} if process else {"test": ["b"], "train": []}
assert parallel.exchange([process, "ä" * process]) == [[0, ""], [1, "ä"]]
assert evaluate.merged(mine) == {"test": ["b", "ä"], "train": []}
"""


def test_processes_keep_to_their_devices_and_tell_each_other(tmp_path):
  runs.two_processes(PROCESSES, tmp_path)


def test_batch_that_does_not_divide_names_both_numbers():
  with pytest.raises(
    InputError, match="batch size 30 is not divisible by the 8 devices"
  ):
    parallel.check_batch(30, mesh(data=4, fsdp=2))


@pytest.mark.parametrize(
  "name, shape, spec",
  [
    ("encoder/block_00/attention/qkv/kernel", (8, 24), P("fsdp", "tensor")),
    (
      "encoder/blocks/attention/qkv/kernel",
      (4, 8, 24),
      P(None, "fsdp", "tensor"),
    ),
    ("encoder/block_00/mlp/fc2/kernel", (32, 8), P("tensor", "fsdp")),
    ("x/block_01/cross/kv/kernel", (8, 16), P("fsdp", "tensor")),
    ("x/block_01/cross/out/kernel", (8, 8), P("tensor", "fsdp")),
    ("x/block_01/mlp_query/fc1/bias", (32,), P("tensor")),
    # 9 does not divide by the two devices of fsdp.
    ("head/kernel", (9, 5), P(None, None)),
    ("encoder/norm/scale", (8,), P()),
  ],
)
def test_rules(name, shape, spec):
  assert parallel.spec_of(name, shape, mesh(fsdp=2, tensor=2)) == spec


def test_numbers_and_norms_stay_exact_in_half_precision():
  tree = {"norm": {"scale": jnp.ones(3)}, "temperature": jnp.float32(0.07)}
  found = experiment.cast({**tree, "kernel": jnp.ones((2, 2))}, "bfloat16")
  assert found["kernel"].dtype == jnp.bfloat16
  assert found["temperature"] == jnp.float32(0.07)
  assert found["norm"]["scale"].dtype == jnp.float32


def test_products_are_counted_with_loops_and_gradients():
  x, w = jnp.ones((4, 8)), jnp.ones((8, 8))

  def loss(w):
    step = lambda x, _: (x @ w, None)  # noqa: E731
    return jax.lax.scan(step, x, length=3)[0].sum()

  forward = 3 * 2 * 4 * 8 * 8
  assert flops.count(loss, w) == forward
  assert flops.count(jax.grad(loss), w) == 3 * forward


def test_branches_count_as_the_dearest():
  x = jnp.ones((4, 4))
  branches = [lambda x: x, lambda x: x @ x @ x]
  drawn = lambda i, x: jax.lax.switch(i, branches, x) @ x  # noqa: E731
  one = 2 * 4 * 4 * 4
  assert flops.count(drawn, 1, x) == 3 * one
  assert flops.bounds(drawn, 1, x) == (one, 3 * one)
