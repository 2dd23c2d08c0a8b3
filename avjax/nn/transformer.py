"""The pre-norm transformer of the vision papers, written for speed.

Tokens are [b n d] at the border of a module and [b*n d] through LayerNorm,
projections and MLP, because matrix products of rank 2 need no copies; heads
exist inside attention only. The computation is in the dtype of the tokens,
LayerNorm statistics and softmax in float32. Parameters are per layer:

  block_00/norm1/{scale,bias}       block_00/norm2/{scale,bias}
  block_00/attention/qkv/{kernel [d 3d], bias [3d]}   order q, k, v
  block_00/attention/out/{kernel [d d], bias}
  block_00/mlp/{fc1,fc2}/{kernel,bias}
  norm/{scale,bias}                 after the last block
"""

import functools
import re
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from avjax.errors import lookup
from avjax.nn.attention import attention
from avjax.nn.masking import Keys


def exact_gelu(x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
  """x Phi(x), Phi the normal distribution's function."""
  if jax.default_backend() == "cpu":
    return _gelu(x)
  return nn.gelu(x, approximate=False)


@jax.custom_vjp
def _gelu(x):
  """With its derivative, from one error function; XLA's CPU computes three."""
  return _gelu_forward(x)[0]


def _gelu_forward(x):
  # float64 stays.
  wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  share = 0.5 * (1 + jax.lax.erf(wide * 0.5**0.5))
  density = jnp.exp(-0.5 * wide * wide) * (0.5 / jnp.pi) ** 0.5
  both = wide * share, share + wide * density
  # Else it would be computed again within every sum and product that uses it.
  return jax.lax.optimization_barrier(tuple(y.astype(x.dtype) for y in both))


def _gelu_backward(slope, gradient):
  return (jax.lax.optimization_barrier(gradient * slope),)


_gelu.defvjp(_gelu_forward, _gelu_backward)

# 'tanh' in the Flax families (AV-MAE, MBT), 'erf' in the PyTorch ones.
GELU: dict[str, Callable] = {
  "tanh": lambda x: nn.gelu(x, approximate=True),
  "erf": exact_gelu,
}

# What the backward pass finds saved; the rest it computes again.
REMAT: dict[str, Callable | None] = {
  "none": None,
  "full": jax.checkpoint_policies.nothing_saveable,
  "dots": jax.checkpoint_policies.dots_saveable,
  "dots_no_batch": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}

XAVIER = nn.initializers.xavier_uniform()
NORMAL = nn.initializers.normal(0.02)  # of BERT, of position tables


def qkv_init(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32):
  """Three independent Xavier-uniform [d d] matrices side by side."""
  d, width = shape
  parts = [XAVIER(k, (d, width // 3), dtype) for k in jax.random.split(key, 3)]
  return jnp.concatenate(parts, axis=1)


class SelfAttention(nn.Module):
  """Multi-head attention of every sequence on itself, biases everywhere."""

  heads: int
  implementation: str = "auto"

  @nn.compact
  def __call__(self, x: Float[Array, "r d"], b: int) -> Float[Array, "r d"]:
    """Rows of `b` sequences of equal length, one after the other."""
    rows, d = x.shape
    qkv = nn.Dense(3 * d, dtype=x.dtype, kernel_init=qkv_init, name="qkv")(x)
    shape = (b, rows // b, 3, self.heads, d // self.heads)
    q, k, v = (qkv.reshape(shape)[:, :, i] for i in range(3))
    out = attention(q, k, v, implementation=self.implementation)
    return nn.Dense(d, dtype=x.dtype, kernel_init=XAVIER, name="out")(
      out.reshape(rows, d)
    )


class MLP(nn.Module):
  """fc1, GELU, fc2; biases start at N(0, 1e-6)."""

  hidden: int
  gelu: str = "tanh"

  @nn.compact
  def __call__(self, x: Float[Array, "r d"]) -> Float[Array, "r d"]:
    init = {
      "dtype": x.dtype,
      "kernel_init": XAVIER,
      "bias_init": nn.initializers.normal(1e-6),
    }
    hidden = nn.Dense(self.hidden, name="fc1", **init)(x)
    hidden = lookup(GELU, self.gelu, "GELU")(hidden)
    return nn.Dense(x.shape[-1], name="fc2", **init)(hidden)


class Block(nn.Module):
  """x += attention(norm1(x)); x += mlp(norm2(x)).

  Attributes:
    heads: of the attention.
    mlp: width of the MLP's hidden layer.
    eps: of both LayerNorms: 1e-6 in the Flax families, 1e-5 in PyTorch's.
    gelu: name in `GELU`.
    attention: name in `avjax.nn.attention.IMPLEMENTATIONS`, or 'auto'.
  """

  heads: int
  mlp: int
  eps: float = 1e-6
  gelu: str = "tanh"
  attention: str = "auto"

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "b n d"],
    keep: Float[Array, "2 b"] | None = None,
  ) -> Float[Array, "b n d"]:
    """Applies the block.

    Args:
      x: tokens.
      keep: factor of each example's attention and MLP branch, of `drop_path`.
    """
    b, n, d = x.shape

    def add(x, branch, which):
      if keep is None:
        return x + branch
      factor = jnp.broadcast_to(keep[which][:, None], (b, n))
      return x + branch * factor.reshape(b * n, 1).astype(x.dtype)

    x = x.reshape(b * n, d)
    y = nn.LayerNorm(self.eps, dtype=x.dtype, name="norm1")(x)
    y = SelfAttention(self.heads, self.attention, name="attention")(y, b)
    x = add(x, y, 0)
    y = nn.LayerNorm(self.eps, dtype=x.dtype, name="norm2")(x)
    y = MLP(self.mlp, self.gelu, name="mlp")(y)
    return add(x, y, 1).reshape(b, n, d)


class Transformer(nn.Module):
  """A stack of blocks and, by default, a last LayerNorm.

  Attributes:
    depth: number of blocks; 0 leaves the LayerNorm alone.
    heads, mlp, eps, gelu, attention: of `Block`.
    norm: whether a LayerNorm follows the last block.
    scan: one compiled block for all layers; the parameters of the blocks are
      stacked then, see `stack_layers`.
    remat: name in `REMAT`.
  """

  depth: int
  heads: int
  mlp: int
  eps: float = 1e-6
  gelu: str = "tanh"
  attention: str = "auto"
  norm: bool = True
  scan: bool = False
  remat: str = "none"

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "b n d"],
    keep: Float[Array, "l 2 b"] | None = None,
  ) -> Float[Array, "b n d"]:
    """Applies the stack; `keep` is one row of `Block`'s per layer."""
    options = (self.heads, self.mlp, self.eps, self.gelu, self.attention)
    make = functools.partial(Block, *options)
    x = repeat(make, self.depth, x, keep, scan=self.scan, remat=self.remat)
    if self.norm:
      x = nn.LayerNorm(self.eps, dtype=x.dtype, name="norm")(x)
    return x


def repeat(
  make: functools.partial,
  depth: int,
  x: Array,
  more: Array | None = None,
  *,
  scan: bool,
  remat: str,
  by_layer: bool = True,
) -> Array:
  """Passes `depth` blocks, `block_00` and so on, or `blocks` of a scan.

  To be called within a module, whose parameters they become.

  Args:
    make: partial of a block's class that lacks the name alone.
    depth: number of blocks.
    x: what the first one takes and each gives.
    more: second argument of the blocks.
    scan, remat: of `Transformer`.
    by_layer: whether `more` has a row for each block, or is the same for all.
  """
  policy = lookup(REMAT, remat, "remat policy")
  if remat != "none":
    # Common subexpressions cannot be shared across the steps of a scan.
    block = nn.remat(make.func, policy=policy, prevent_cse=not scan)
    make = functools.partial(block, *make.args)
  if scan and depth:
    step = nn.scan(
      lambda block, x, more: (block(x, more), None),
      variable_axes={"params": 0},
      split_rngs={"params": True},
      in_axes=0 if by_layer else nn.broadcast,
      length=depth,
    )
    return step(make(name="blocks"), x, more)[0]
  for i in range(depth):
    row = more[i] if by_layer and more is not None else more
    x = make(name=f"block_{i:02d}")(x, row)
  return x


def drop_path(
  keys: Keys,
  depth: int,
  rate: float,
  *,
  rescale: bool,
) -> Float[Array, "l 2 b"]:
  """Factors of stochastic depth (arXiv:1603.09382), per example and branch.

  Layer l of a stack drops each branch with probability l/(depth-1) * rate,
  the attention's and the MLP's independently.

  Args:
    keys: one per example, so that draws do not depend on the devices.
    depth: layers of this stack; every stack has its own ramp.
    rate: of the last layer.
    rescale: True divides a kept branch by its probability (timm); False
      leaves it alone (AV-MAE, MBT).
  """
  rates = rate * jnp.arange(depth) / max(depth - 1, 1)
  draws = jax.vmap(lambda key: jax.random.uniform(key, (depth, 2)))(keys)
  keep = (draws >= rates[:, None]).astype(jnp.float32)
  if rescale:
    keep = keep / (1 - rates[:, None])
  return keep.transpose(1, 2, 0)


BLOCK = re.compile(r"block_\d+")


def stack_layers(tree: Any) -> Any:
  """Every group of `block_00`, `block_01`, … becomes one stacked `blocks`.

  Args:
    tree: parameters, gradients or an optimiser's state: any pytree whose
      dicts may hold such groups. Already stacked trees come back unchanged.

  Returns:
    The same tree with `blocks` of leaves [l …]; `unstack_layers` undoes it.
  """

  def has_blocks(node):
    return isinstance(node, dict) and any(map(BLOCK.fullmatch, node))

  def convert(node):
    if not has_blocks(node):
      return node
    names = sorted(name for name in node if BLOCK.fullmatch(name))
    blocks = [node[name] for name in names]
    rest = {k: stack_layers(v) for k, v in node.items() if k not in names}
    return {"blocks": jax.tree.map(lambda *x: jnp.stack(x), *blocks), **rest}

  return jax.tree.map(convert, tree, is_leaf=has_blocks)


def unstack_layers(tree: Any) -> Any:
  """The inverse of `stack_layers`: names are per layer again."""

  def has_stack(node):
    return isinstance(node, dict) and "blocks" in node

  def convert(node):
    if not has_stack(node):
      return node
    stack = node["blocks"]
    depth = jax.tree.leaves(stack)[0].shape[0]
    blocks = {
      f"block_{i:02d}": jax.tree.map(lambda x, i=i: x[i], stack)
      for i in range(depth)
    }
    rest = {k: unstack_layers(v) for k, v in node.items() if k != "blocks"}
    return {**blocks, **rest}

  return jax.tree.map(convert, tree, is_leaf=has_stack)
