"""What is read from a compiled program, and from what others look like."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from avjax import collectives, hlo
from avjax.collectives import Collective

MESH = """HloModule jit_f, num_partitions=8
%body (x: f32[4]) -> f32[4] {
  %a = f32[16]{0} all-gather(%x), replica_groups=mesh['axis_0'=2,'axis_1'=4], device_ids=([4,2]T(1,0)) {'axis_1'}
}
%cond (x: f32[4]) -> pred[] {
}
ENTRY %main (x: f32[4]) -> f32[4] {
  %w = f32[4]{0} while(%x), condition=%cond, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  %r = (bf16[8]{0}, f32[2]{0}) all-reduce(%x, %y), replica_groups={{0,1},{2,3},{4,5},{6,7}}
  %s = (f32[4]{0}, f32[32]{0}) all-gather-start(%x), replica_groups=[1,8]<=[8]
  %p = f32[4]{0} collective-permute(%x), source_target_pairs={{0,1},{1,0}}
}
"""  # noqa: E501


def test_groups_loops_and_pairs():
  assert collectives.find(MESH) == [
    Collective("all-gather", 64, 4, 3),
    Collective("all-reduce", 24, 2, 1),
    Collective("all-gather", 128, 8, 1),
    Collective("collective-permute", 16, 2, 1),
  ]
  assert collectives.traffic(MESH) == {
    "all-gather": 3 * 48 + 112,
    "all-reduce": 24,
    "collective-permute": 16,
  }


ASYNC = """HloModule jit_f, num_partitions=8
ENTRY %main (x: f32[64,4]) -> f32[8,4] {
  %r = ((f32[64,4]{1,0}), f32[8,4]{1,0}) reduce-scatter-start(%x), replica_groups=[1,8]<=[8], dimensions={0}
  %t = ((f32[64,4]{1,0:T(8,128)}, bf16[8]{0}), (f32[64,4]{1,0}, bf16[8]{0})) all-to-all-start(%x, %y), replica_groups=[1,8]<=[8]
  %p = (f32[64,4]{1,0}, f32[64,4]{1,0}, u32[], u32[]) collective-permute-start(%x), source_target_pairs={{0,1},{1,0}}
  %g = ((f32[4]{0}, f32[2]{0}), (f32[32]{0}, f32[16]{0})) all-gather-start(%x, %y), replica_groups=[1,8]<=[8]
  %a = (f32[64,4]{1,0}, f32[2]{0}) all-reduce-start(%x, %y), replica_groups=[1,8]<=[8]
}
"""  # noqa: E501


def test_what_is_asynchronous_gives_what_stands_second():
  assert collectives.find(ASYNC) == [
    Collective("reduce-scatter", 4 * 8 * 4, 8, 1),
    Collective("all-to-all", 4 * 64 * 4 + 2 * 8, 8, 1),
    Collective("collective-permute", 4 * 64 * 4, 2, 1),
    Collective("all-gather", 4 * (32 + 16), 8, 1),
    Collective("all-reduce", 4 * (64 * 4 + 2), 8, 1),
  ]


def test_all_groups_of_devices():
  program = hlo.read(MESH)
  lines = program.computations["main"]
  assert program.groups(lines["r"]) == ((0, 1), (2, 3), (4, 5), (6, 7))
  assert program.groups(lines["s"]) == (tuple(range(8)),)
  assert program.groups(lines["p"]) == ((0, 1), (1, 0))
  # The mesh's devices are 0 2 4 6 and 1 3 5 7.
  (line,) = program.computations["body"].values()
  assert program.groups(line) == ((0, 2, 4, 6), (1, 3, 5, 7))


def test_a_loop_of_unknown_length_is_refused():
  text = MESH.replace(', backend_config={"known_trip_count":{"n":"3"}}', "")
  with pytest.raises(ValueError, match="unknown length"):
    collectives.find(text)


def test_of_a_program():
  mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
  whole, split = (NamedSharding(mesh, spec) for spec in (P(), P("data")))
  x = jax.ShapeDtypeStruct((64, 32), jnp.float32, sharding=split)
  w = jax.ShapeDtypeStruct((32, 16), jnp.float32, sharding=whole)
  gradient = jax.grad(lambda w, x: jnp.tanh(x @ w).sum())
  compiled = jax.jit(gradient, out_shardings=whole).lower(w, x).compile()
  assert collectives.find(compiled) == [
    Collective("all-reduce", 4 * 32 * 16, 8, 1)
  ]
