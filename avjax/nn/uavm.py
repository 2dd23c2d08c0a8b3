"""UAVM's transformers over frozen features (arXiv:2208.00061).

Tokens are one feature vector a time step. Each modality has something of its
own, then comes what both share, or what stands in its place:

| variant | own | behind it | classifier |
|---|---|---|---|
| unified | N blocks | N_s shared blocks, one modality at a time | shared |
| independent | N blocks | N_s blocks of the modality | of the modality |
| cross_modal | N blocks | N_s blocks on both, audio first | one |

With N = 0 a modality's own part is a LayerNorm and a linear layer. With
N_s = 0 a unified model shares nothing, so each modality has its classifier.

A stack of blocks is LayerNorm, a linear layer if its width is another, learned
positions, blocks (§II-A, and the public code): a token gets positions once in
every stack. Blocks are pre-norm; queries, keys and values have no bias; GELU is
exact; there is no CLS token, no LayerNorm behind the last block, no vector that
tells the modality, and no dropout. Epsilon is 1e-5 in blocks, 1e-6 elsewhere.

Parameters: encoder_{m}/{norm_in,project,positions,block_00,…}, or with N = 0
embed_{m}/{norm,out}; encoder_shared, or encoder_late_{m}; classifier, or
classifier_{m}, each {norm,out}. m is audio or video. First values are
PyTorch's: uniform within 1/√(inputs), biases too.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from avjax.losses import at_least_float32
from avjax.nn.attention import attention
from avjax.nn.transformer import GELU, NORMAL

MODALITIES = ("audio", "video")  # in the order of concatenation
SHARED = "encoder_shared"
EPS, EPS_BLOCK = 1e-6, 1e-5

Features = Mapping[str, Float[Array, "b n _"]]  # by modality
# What enters a stack's first block, then what each block gives.
Trace = Sequence[Float[Array, "b n d"]]
# Modality, or 'av' for both together -> its stacks' traces, in order.
Traces = Mapping[str, Mapping[str, Trace]]


def dense(
  x: Float[Array, "*b c"], width: int, name: str, *, bias: bool = True
) -> Float[Array, "*b d"]:
  """A linear layer of the calling module, with PyTorch's first values."""
  bound = x.shape[-1] ** -0.5

  def init(key, shape, dtype=jnp.float32):
    return jax.random.uniform(key, shape, dtype, -bound, bound)

  return nn.Dense(
    width,
    use_bias=bias,
    dtype=x.dtype,
    kernel_init=init,
    bias_init=init,
    name=name,
  )(x)


class SelfAttention(nn.Module):
  """Multi-head attention of every sequence on itself; only `out` has a bias."""

  heads: int
  implementation: str = "auto"

  @nn.compact
  def __call__(self, x: Float[Array, "r d"], b: int) -> Float[Array, "r d"]:
    """Rows of `b` sequences of equal length, one after the other."""
    rows, d = x.shape
    qkv = dense(x, 3 * d, "qkv", bias=False)
    qkv = qkv.reshape(b, rows // b, 3, self.heads, d // self.heads)
    q, k, v = (qkv[:, :, i] for i in range(3))
    y = attention(q, k, v, implementation=self.implementation)
    return dense(y.reshape(rows, d), d, "out")


class MLP(nn.Module):
  """fc1 to four times the width, exact GELU, fc2."""

  @nn.compact
  def __call__(self, x: Float[Array, "r d"]) -> Float[Array, "r d"]:
    d = x.shape[-1]
    return dense(GELU["erf"](dense(x, 4 * d, "fc1")), d, "fc2")


class Block(nn.Module):
  """x += attention(norm1(x)); x += mlp(norm2(x)).

  Attributes:
    heads: of the attention.
    attention: name in `avjax.nn.attention.IMPLEMENTATIONS`, or 'auto'.
  """

  heads: int
  attention: str = "auto"

  @nn.compact
  def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
    """Applies the block."""
    b, n, d = x.shape
    x = x.reshape(b * n, d)
    y = nn.LayerNorm(EPS_BLOCK, dtype=x.dtype, name="norm1")(x)
    x = x + SelfAttention(self.heads, self.attention, name="attention")(y, b)
    y = nn.LayerNorm(EPS_BLOCK, dtype=x.dtype, name="norm2")(x)
    return (x + MLP(name="mlp")(y)).reshape(b, n, d)


class Stack(nn.Module):
  """LayerNorm, projection if need be, positions, blocks.

  Attributes:
    depth: number of blocks.
    width: of the blocks.
    heads, attention: of `Block`.
  """

  depth: int
  width: int
  heads: int
  attention: str = "auto"

  @nn.compact
  def __call__(self, x: Float[Array, "b n c"]) -> list[Float[Array, "b n d"]]:
    """What enters the first block, then what each gives."""
    x = nn.LayerNorm(EPS, dtype=x.dtype, name="norm_in")(x)
    if x.shape[-1] != self.width:
      x = dense(x, self.width, "project")
    # timm cuts the normal at ±2, a hundred standard deviations.
    shape = (x.shape[1], self.width)
    x = x + self.param("positions", NORMAL, shape).astype(x.dtype)
    trace = [x]
    for i in range(self.depth):
      block = Block(self.heads, self.attention, name=f"block_{i:02d}")
      trace.append(block(trace[-1]))
    return trace


class Embedding(nn.Module):
  """A modality's own part when N = 0: LayerNorm and a linear layer."""

  width: int

  @nn.compact
  def __call__(self, x: Float[Array, "b n c"]) -> Float[Array, "b n d"]:
    """Applies both."""
    x = nn.LayerNorm(EPS, dtype=x.dtype, name="norm")(x)
    return dense(x, self.width, "out")


class Classifier(nn.Module):
  """Mean over time, LayerNorm, linear layer; in float32 at least."""

  classes: int

  @nn.compact
  def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b k"]:
    """Logits of all heads."""
    x = at_least_float32(x).mean(1)
    x = nn.LayerNorm(EPS, dtype=x.dtype, name="norm")(x)
    return dense(x, self.classes, "out")


class Encoder(nn.Module):
  """A whole model of the table above.

  Attributes:
    variant: unified, independent or cross_modal.
    specific, shared: N and N_s.
    width, shared_width: of the N and of the N_s blocks (S_dim).
    heads: of all blocks, 4 in the paper.
    classes: of all heads together.
    attention: of `Block`.
  """

  variant: str
  specific: int
  shared: int
  width: int
  shared_width: int
  heads: int
  classes: int
  attention: str = "auto"

  @nn.compact
  def __call__(
    self, features: Features
  ) -> tuple[dict[str, Float[Array, "b k"]], dict[str, dict[str, Any]]]:
    """Logits and `Traces`, by modality; of cross_modal, logits of 'av'.

    Only what the given modalities pass is computed; cross_modal needs both.
    """
    traces, tokens, logits = {}, {}, {}
    for m, x in features.items():
      traces[m], tokens[m] = self.own(m, x)
    if self.variant == "cross_modal":
      both = jnp.concatenate([tokens[m] for m in MODALITIES], axis=1)
      traces["av"], tokens = {}, {"av": both}
    common = self.shared and self.variant != "independent"
    # One instance each, so that two modalities may pass it.
    if common:
      stack = self.stack(self.shared, self.shared_width, SHARED)
      classifier = Classifier(self.classes, name="classifier")
    for m, x in tokens.items():
      if not common:
        classifier = Classifier(self.classes, name=f"classifier_{m}")
      if self.shared:
        name = SHARED if common else f"encoder_late_{m}"
        if not common:
          stack = self.stack(self.shared, self.shared_width, name)
        traces[m][name] = stack(x)
        x = traces[m][name][-1]
      logits[m] = classifier(x)
    return logits, traces

  def stack(self, depth: int, width: int, name: str) -> Stack:
    """A stack of this model's kind."""
    return Stack(depth, width, self.heads, self.attention, name=name)

  def own(
    self, m: str, x: Float[Array, "b n c"]
  ) -> tuple[dict[str, Any], Float[Array, "b n d"]]:
    """A modality's own part: its traces, and the tokens it hands on."""
    if not self.specific:
      return {}, Embedding(self.width, name=f"embed_{m}")(x)
    name = f"encoder_{m}"
    trace = self.stack(self.specific, self.width, name)(x)
    return {name: trace}, trace[-1]


def attention_map(
  block: Any, x: Float[Array, "b n d"], heads: int, *, published: bool
) -> Float[Array, "b h n n"]:
  """Probabilities of a block's attention: rows are queries.

  Args:
    block: parameters of a `Block`.
    x: what enters the block.
    heads: of the attention.
    published: without the block's first LayerNorm, as the public code has it
      in its analyses. False: the map that the model uses.
  """
  b, n, d = x.shape
  x = at_least_float32(x)
  if not published:
    norm = nn.LayerNorm(EPS_BLOCK, dtype=x.dtype)
    x = norm.apply({"params": block["norm1"]}, x)
  kernel = block["attention"]["qkv"]["kernel"].astype(x.dtype)
  qk = (x @ kernel[:, : 2 * d]).reshape(b, n, 2, heads, d // heads)
  q, k = qk[:, :, 0] * (d // heads) ** -0.5, qk[:, :, 1]
  return jax.nn.softmax(jnp.einsum("bnhd,bmhd->bhnm", q, k))
