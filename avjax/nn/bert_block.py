"""A block of BERT whose queries look at an encoder; see `avjax.nn.bert`."""

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from avjax.nn.transformer import GELU

EPS = 1e-12

normal = nn.initializers.normal(0.02)


class Cache(NamedTuple):
  """What attention kept of rows that it has seen, by layer.

  Attributes:
    keys: of the rows, in heads.
    values: likewise.
  """

  keys: Float[Array, "*depth b h n c"]
  values: Float[Array, "*depth b h n c"]


# Tokens of an encoder, or of several runs of it with as many examples each.
Encoded = Float[Array, "_ _ w"] | tuple[Float[Array, "_ _ w"], ...]


def at_least_float32(x: Float[Array, "*_"]) -> Float[Array, "*_"]:
  """Half precision as float32; anything finer stays as it is."""
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def unit(x: Float[Array, "*b p"]) -> Float[Array, "*b p"]:
  """x / |x| along the last axis; zeros stay zeros."""
  x = at_least_float32(x)
  square = jnp.sum(x * x, axis=-1, keepdims=True)
  return x * jax.lax.rsqrt(jnp.maximum(square, 1e-24))


def dense(x: Float[Array, "*b c"], width: int, name: str) -> Array:
  """A linear layer of the calling module, with BERT's first values."""
  layer = nn.Dense(width, dtype=x.dtype, kernel_init=normal, name=name)
  return layer(x)


def norm(dtype: Any, name: str | None = None) -> nn.LayerNorm:
  """A LayerNorm of BERT's."""
  return nn.LayerNorm(EPS, dtype=dtype, use_fast_variance=False, name=name)


def heads_of(x: Float[Array, "r d"], b: int, heads: int) -> Array:
  """Rows of b sequences, one after the other -> [b h n d/h]."""
  rows, d = x.shape
  return x.reshape(b, rows // b, heads, d // heads).transpose(0, 2, 1, 3)


# --- Parts of a block --------------------------------------------------------


class Attention(nn.Module):
  """Multi-head attention, residual connection and LayerNorm.

  Attributes:
    heads: of the attention.
    dropout: of the probabilities and of the result.
    cross: keys and values are another sequence's.
  """

  heads: int
  dropout: float
  cross: bool = False

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "b n d"],
    source: Float[Array, "b m c"] | Cache | None,
    mask: Bool[Array, "#b 1 #n #k"] | None,
    train: bool,
  ) -> tuple[Float[Array, "b n d"], Cache]:
    """Attends.

    Args:
      x: rows that ask.
      source: of cross-attention, what they look at; otherwise rows that come
        before x and were seen earlier.
      mask: true where row n may look at k: those before it, then its own.
      train: drops out.

    Returns:
      The rows, and keys and values of those that were new.
    """
    b, n, d = x.shape
    rows = x.reshape(b * n, d)
    if self.cross:
      q = dense(rows, d, "query")
      kv = dense(source.reshape(-1, source.shape[-1]), 2 * d, "kv")
    else:
      qkv = dense(rows, 3 * d, "qkv")
      q, kv = qkv[:, :d], qkv[:, d:]
    q, k, v = (heads_of(y, b, self.heads) for y in (q, kv[:, :d], kv[:, d:]))
    new = Cache(k, v)
    if isinstance(source, Cache):
      k = jnp.concatenate([source.keys.astype(k.dtype), k], axis=2)
      v = jnp.concatenate([source.values.astype(v.dtype), v], axis=2)
    drop = nn.Dropout(self.dropout, deterministic=not train)
    out = attend(q, k, v, mask, drop).transpose(0, 2, 1, 3).reshape(b * n, d)
    rows = rows + drop(dense(out, d, "out"))
    return norm(x.dtype, "norm")(rows).reshape(x.shape), new


def attend(
  q: Float[Array, "b h n c"],
  k: Float[Array, "b h m c"],
  v: Float[Array, "b h m c"],
  mask: Bool[Array, "#b 1 #n #m"] | None,
  drop: nn.Dropout,
) -> Float[Array, "b h n c"]:
  """softmax(q kᵀ / √c) v; a row that may look at nothing looks at all."""
  scores = jnp.einsum("bhnc,bhmc->bhnm", q * q.shape[-1] ** -0.5, k)
  scores = at_least_float32(scores)
  if mask is not None:
    scores = jnp.where(mask, scores, jnp.finfo(scores.dtype).min)
  probabilities = drop(jax.nn.softmax(scores).astype(v.dtype))
  return jnp.einsum("bhnm,bhmc->bhnc", probabilities, v)


class MLP(nn.Module):
  """fc1, exact GELU, fc2, residual connection and LayerNorm."""

  hidden: int
  dropout: float

  @nn.compact
  def __call__(
    self, x: Float[Array, "b n d"], train: bool
  ) -> Float[Array, "b n d"]:
    """Applies it to every row."""
    rows = x.reshape(-1, x.shape[-1])
    y = GELU["erf"](dense(rows, self.hidden, "fc1"))
    y = dense(y, x.shape[-1], "fc2")
    rows = rows + nn.Dropout(self.dropout)(y, deterministic=not train)
    return norm(x.dtype, "norm")(rows).reshape(x.shape)


class Block(nn.Module):
  """Self-attention; cross-attention of the queries; MLP.

  Attributes:
    heads, mlp: of `sizes.Size`.
    dropout: everywhere in the block.
    cross: whether queries look at the encoder here.
    query_ffn: whether queries have an MLP of their own.
  """

  heads: int
  mlp: int
  dropout: float
  cross: bool
  query_ffn: bool

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "b n d"],
    past: Cache | None,
    mask: Bool[Array, "#b 1 #n #k"] | None,
    enc: Encoded | None,
    enc_mask: Bool[Array, "b 1 1 s"] | None,
    queries: int,
    train: bool,
  ) -> tuple[Float[Array, "b n d"], Cache]:
    """Applies the block.

    Args:
      x: queries, then text; either may be missing.
      past: rows that come before them and are not computed again.
      mask: of the self-attention, see `Attention`.
      enc: what queries look at; of several, example after example takes the
        next one, see `QueryEncoder.query`.
      enc_mask: true where they may.
      queries: how many of the rows are queries.
      train: drops out.
    """
    attention = Attention(self.heads, self.dropout, name="attention")
    x, new = attention(x, past, mask, train)
    q, t = x[:, :queries], x[:, queries:]
    if queries and self.cross:
      cross = Attention(self.heads, self.dropout, True, name="cross")
      if isinstance(enc, tuple):
        groups = q.reshape(-1, len(enc), *q.shape[1:])
        groups = [
          cross(groups[:, i], one, enc_mask, train)[0]
          for i, one in enumerate(enc)
        ]
        q = jnp.stack(groups, axis=1).reshape(q.shape)
      else:
        q, _ = cross(q, enc, enc_mask, train)
    mlp = functools.partial(MLP, self.mlp, self.dropout)
    if queries and self.query_ffn:
      q = mlp(name="mlp_query")(q, train)
      t = mlp(name="mlp")(t, train) if t.shape[1] else t
      return jnp.concatenate([q, t], axis=1), new
    x = jnp.concatenate([q, t], axis=1) if queries else x
    return mlp(name="mlp")(x, train), new
