"""Matrix-product FLOPs of a function, counted from its jaxpr.

The compiler's own count leaves out how often a loop's body runs; here a scan's
body counts as often as it runs. A multiply-add is 2. Only products and
convolutions count, as in the usual definition of MFU, and those inside cuDNN's
attention: 2 products forward and 4 backward, without what it computes again.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.extend import core

Pick = Callable[..., int]  # min or max

# cuDNN's attention -> its products of queries by keys by a head's width.
ATTENTION = {
  "dot_product_attention_fwd_wrapper": 2,
  "dot_product_attention_bwd_wrapper": 4,
}
HEADS_FIRST = 1  # its `layout`: [b h n d]; else [b n h d]


def count(function: Callable[..., Any], *args: Any) -> int:
  """FLOPs of the matrix products of `function(*args)` over all devices.

  Of the branches of a switch the dearest one counts.

  Args:
    function: traceable by JAX.
    *args: arrays or ShapeDtypeStructs; nothing is computed.
  """
  return bounds(function, *args)[1]


def bounds(function: Callable[..., Any], *args: Any) -> tuple[int, int]:
  """The same with the cheapest branches of switches, and the dearest ones."""
  return of_jaxpr(jax.make_jaxpr(function)(*args))


def of_jaxpr(jaxpr: core.ClosedJaxpr) -> tuple[int, int]:
  """`bounds` of what has been traced already."""
  return _jaxpr(jaxpr.jaxpr, min), _jaxpr(jaxpr.jaxpr, max)


def _jaxpr(jaxpr: core.Jaxpr, pick: Pick) -> int:
  return sum(_equation(eqn, pick) for eqn in jaxpr.eqns)


def _equation(eqn: Any, pick: Pick) -> int:
  name = eqn.primitive.name
  if name == "dot_general":
    (contract, _), _ = eqn.params["dimension_numbers"]
    left = eqn.invars[0].aval.shape
    inner = math.prod(left[axis] for axis in contract)
    return 2 * inner * math.prod(eqn.outvars[0].aval.shape)
  if name == "conv_general_dilated":
    out = math.prod(eqn.outvars[0].aval.shape)
    kernel = eqn.invars[1].aval.shape
    features = kernel[eqn.params["dimension_numbers"].rhs_spec[0]]
    return 2 * out * math.prod(kernel) // features
  if name in ATTENTION:
    (b, *rest, d), key = (x.aval.shape for x in eqn.invars[:2])
    heads_first = eqn.params["layout"] == HEADS_FIRST
    n, h = reversed(rest) if heads_first else rest
    return ATTENTION[name] * 2 * b * h * n * key[2 if heads_first else 1] * d
  times = eqn.params["length"] if name == "scan" else 1
  if name == "shard_map":
    times = math.prod(eqn.params["mesh"].shape.values())
  if name == "cond":
    return times * _inner(eqn.params["branches"], pick)
  return times * sum(_inner(value, pick) for value in eqn.params.values())


def _inner(value: Any, pick: Pick) -> int:
  if isinstance(value, core.ClosedJaxpr):
    return _jaxpr(value.jaxpr, pick)
  if isinstance(value, core.Jaxpr):
    return _jaxpr(value, pick)
  if isinstance(value, (tuple, list)):
    return pick((_inner(v, pick) for v in value), default=0)
  return 0
