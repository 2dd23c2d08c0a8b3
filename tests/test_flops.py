"""Products that are no products of the jaxpr count, too."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax._src.cudnn import fused_attention_stablehlo as cudnn
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from avjax import flops, step_cost
from avjax.nn import attention

B, N, M, H, D = 2, 320, 384, 4, 32
ONE = 2 * B * H * N * M * D  # a product of queries by keys by width


@pytest.fixture
def traceable(monkeypatch):
  """cuDNN's attention can be traced where it cannot run."""
  monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91_000)
  monkeypatch.setattr(cudnn, "check_compute_capability", lambda *_: True)


def shapes(heads_first=False):
  """Queries, keys and values, of other lengths."""
  found = [(B, H, n, D) if heads_first else (B, n, H, D) for n in (N, M, M)]
  return [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in found]


def loss(q, k, v, implementation):
  out = attention.attention(q, k, v, implementation=implementation)
  return out.astype(jnp.float32).sum()


@pytest.mark.parametrize("implementation", ["plain", "cudnn"])
def test_attention_counts_alike_however_it_is_computed(
  traceable, implementation
):
  forward = functools.partial(loss, implementation=implementation)
  assert flops.count(forward, *shapes()) == 2 * ONE
  gradient = jax.grad(forward, argnums=(0, 1, 2))
  assert flops.count(gradient, *shapes()) == 6 * ONE


def test_cudnns_attention_with_heads_first(traceable):
  def forward(q, k, v):
    out = cudnn.dot_product_attention(q, k, v, qkv_layout="BNTH")
    return out.astype(jnp.float32).sum()

  wanted = shapes(heads_first=True)
  assert flops.count(forward, *wanted) == 2 * ONE
  assert flops.count(jax.grad(forward, (0, 1, 2)), *wanted) == 6 * ONE


def test_blocks_of_a_large_run_are_products():
  """Of one query each they were sums, which a plan does not count."""
  mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
  place = NamedSharding(mesh, P("data"))
  x = jax.ShapeDtypeStruct((1024, 1568, 1, 8), jnp.float32, sharding=place)
  blocked = functools.partial(loss, implementation="blocked")
  traced = jax.jit(jax.grad(blocked, (0, 1, 2))).trace(x, x, x)
  found = step_cost.kernels(traced.lower().compile())
  _, wanted = flops.of_jaxpr(traced.jaxpr)
  assert 8 * sum(one.flops for one in found) == wanted
