"""What is read from a compiled program, and from what others look like."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from avjax import collectives
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
