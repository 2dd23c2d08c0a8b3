"""A block of BERT whose queries look at an encoder; see `avjax.nn.bert`."""

import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from avjax.losses import at_least_float32
from avjax.nn.sizes import Size
from avjax.nn.transformer import GELU

EPS = 1e-12


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

# From an array with a row for each text to one with a row for each pair.
Expand = Callable[[Array], Array]


# What queries look at in a block without and with cross-attention.
Seen = tuple[Cache, ...] | None

# The same of a stack, by module; see `bert.QueryEncoder.look`.
Looked = tuple[Seen, ...]


class How(NamedTuple):
  """What a pass asks of a block; all of it static.

  Attributes:
    train: drops out.
    queries: how many of the rows are queries.
    times: see `CrossAttention`.
    asking: how many rows, from the first on, are wanted; None = all.
    expand: makes a row for each pair out of the rows for each text, after the
      self-attention: queries and text have not seen an encoder before, so
      what they do until then is the same in all pairs of a text.
  """

  train: bool
  queries: int = 0
  times: tuple[int, ...] = ()
  asking: int | None = None
  expand: Expand | None = None


def first_values(width: int) -> Callable[..., Array]:
  """BERT's N(0, 0.02²) of matrices, for rows of another width than 768.

  It grows as 1/√width. Otherwise what a narrow block adds to a row, and with
  it what queries hear from the encoder, begins too small to be learned from.
  """
  return nn.initializers.normal(0.02 * (768 / width) ** 0.5)


def dense(x: Float[Array, "*b c"], width: int, name: str, d: int) -> Array:
  """A linear layer of the calling module, whose rows are d wide."""
  init = first_values(d)
  return nn.Dense(width, dtype=x.dtype, kernel_init=init, name=name)(x)


def norm(dtype: Any, name: str | None = None) -> nn.LayerNorm:
  """A LayerNorm of BERT's."""
  return nn.LayerNorm(EPS, dtype=dtype, use_fast_variance=False, name=name)


# --- Parts of a block --------------------------------------------------------


class QKV(nn.Module):
  """Queries, keys and values by one matrix [d 3d]."""

  @nn.compact
  def __call__(self, x: Float[Array, "r d"], first: int = 0) -> Array:
    """Columns from `first` on: 0 = all, d = keys and values."""
    d = x.shape[-1]
    kernel = self.param("kernel", first_values(d), (d, 3 * d))[:, first:]
    bias = self.param("bias", nn.initializers.zeros, (3 * d,))[first:]
    return x @ kernel.astype(x.dtype) + bias.astype(x.dtype)


class SelfAttention(nn.Module):
  """Multi-head self-attention, residual connection and LayerNorm.

  Attributes:
    heads: of the attention.
    dropout: of the probabilities and of the result.
  """

  heads: int
  dropout: float

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "b n d"],
    past: Cache | None,
    mask: Bool[Array, "#b 1 #n #k"] | None,
    asking: int | None,
    train: bool,
  ) -> tuple[Float[Array, "b a d"], Cache]:
    """Attends.

    Args:
      x: rows.
      past: rows that come before x and were seen earlier.
      mask: true where row n may look at k: those before it, then its own.
      asking: how many rows, from the first on, are wanted; None = all.
      train: drops out.

    Returns:
      The wanted rows, and keys and values of all that were new.
    """
    b, n, d = x.shape
    asking = n if asking is None else asking
    layer = QKV(name="qkv")
    rows = x[:, :asking].reshape(-1, d)
    q, k, v = split(layer(rows), b, self.heads, 3)
    if asking < n:
      rest = layer(x[:, asking:].reshape(-1, d), d)
      rest = split(rest, b, self.heads, 2)
      k = jnp.concatenate([k, rest[0]], axis=2)
      v = jnp.concatenate([v, rest[1]], axis=2)
      if mask is not None and mask.shape[2] > 1:
        mask = mask[:, :, :asking]
    new = Cache(k, v)
    if past is not None:
      k = jnp.concatenate([past.keys.astype(k.dtype), k], axis=2)
      v = jnp.concatenate([past.values.astype(v.dtype), v], axis=2)
    drop = nn.Dropout(self.dropout, deterministic=not train)
    out = joined(attend(q, k, v, mask, drop))
    rows = rows + drop(dense(out, d, "out", d))
    return norm(x.dtype, "norm")(rows).reshape(b, asking, d), new


class CrossAttention(nn.Module):
  """Attention on an encoder's tokens, residual connection and LayerNorm.

  Attributes:
    heads, dropout: see `SelfAttention`.
    width: d, of the rows that ask.
    dtype: of the computation.
  """

  heads: int
  dropout: float
  width: int
  dtype: Any

  def setup(self):
    """Makes the layers."""
    init = first_values(self.width)
    layer = functools.partial(nn.Dense, dtype=self.dtype, kernel_init=init)
    self.query = layer(self.width)
    self.kv = layer(2 * self.width)
    self.out = layer(self.width)
    self.norm = norm(self.dtype)
    self.drop = nn.Dropout(self.dropout)

  def look(self, tokens: Float[Array, "b s w"]) -> Cache:
    """Keys and values of an encoder's tokens."""
    rows = self.kv(tokens.reshape(-1, tokens.shape[-1]))
    return Cache(*split(rows, len(tokens), self.heads, 2))

  def __call__(
    self,
    x: Float[Array, "n q d"],
    seen: tuple[Cache, ...],
    times: tuple[int, ...],
    mask: Bool[Array, "b 1 1 s"] | None,
    train: bool,
  ) -> Float[Array, "n q d"]:
    """Attends.

    Args:
      x: queries: sum(times) rows for the first example, then for the second.
      seen: of `look`, each of all examples.
      times: how many rows of an example, one after the other, look at each.
      mask: true where there is a token; None = everywhere.
      train: drops out.
    """
    (n, count, d), rows = x.shape, x.reshape(-1, x.shape[-1])
    drop = functools.partial(self.drop, deterministic=not train)
    groups = self.query(rows).reshape(-1, sum(times), count, d)
    starts = list(itertools.accumulate(times))[:-1]
    out = []
    for q, cache in zip(jnp.split(groups, starts, 1), seen, strict=True):
      b, own = q.shape[:2]
      # Rows that look at the same tokens are queries of one attention.
      (q,) = split(q.reshape(-1, d), b, self.heads, 1)
      found = joined(attend(q, *cache, mask, drop))
      out.append(found.reshape(b, own, count, d))
    out = jnp.concatenate(out, axis=1).reshape(n * count, d)
    return self.norm(rows + drop(self.out(out))).reshape(x.shape)


def split(
  x: Float[Array, "r _"], b: int, heads: int, parts: int
) -> list[Float[Array, "b h n c"]]:
  """Rows of b sequences, one after the other, in parts and heads."""
  x = x.reshape(b, len(x) // b, parts, heads, -1)
  return [x[:, :, i].transpose(0, 2, 1, 3) for i in range(parts)]


def joined(x: Float[Array, "b h n c"]) -> Float[Array, "r d"]:
  """The inverse of `split` for one part."""
  b, h, n, c = x.shape
  return x.transpose(0, 2, 1, 3).reshape(b * n, h * c)


def attend(
  q: Float[Array, "b h n c"],
  k: Float[Array, "b h m c"],
  v: Float[Array, "b h m c"],
  mask: Bool[Array, "#b 1 #n #m"] | None,
  drop: Callable[[Array], Array],
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
    rows, d = x.reshape(-1, x.shape[-1]), x.shape[-1]
    y = GELU["erf"](dense(rows, self.hidden, "fc1", d))
    y = dense(y, d, "fc2", d)
    rows = rows + nn.Dropout(self.dropout)(y, deterministic=not train)
    return norm(x.dtype, "norm")(rows).reshape(x.shape)


class Block(nn.Module):
  """Self-attention; cross-attention of the queries; MLP.

  Attributes:
    size: of the stack.
    dropout: everywhere in the block.
    cross: whether queries look at the encoder here.
    query_ffn: whether queries have an MLP of their own.
    dtype: of the computation.
  """

  size: Size
  dropout: float
  cross: bool
  query_ffn: bool
  dtype: Any

  def setup(self):
    """Makes the parts."""
    heads, drop = self.size.heads, self.dropout
    self.attention = SelfAttention(heads, drop)
    if self.cross:
      self.look_at = CrossAttention(
        heads, drop, self.size.width, self.dtype, name="cross"
      )
    self.mlp = MLP(self.size.mlp, drop)
    if self.query_ffn:
      self.mlp_query = MLP(self.size.mlp, drop)

  def look(self, tokens: tuple[Float[Array, "b _ w"], ...]) -> Seen:
    """Keys and values of the encoder's tokens; None without cross-attention."""
    if not self.cross:
      return None
    return tuple(self.look_at.look(x) for x in tokens)

  def __call__(
    self,
    x: Float[Array, "b n d"],
    past: Cache | None,
    seen: Seen,
    masks: tuple[Bool[Array, "#b 1 #n #k"] | None, Array | None],
    how: How,
  ) -> tuple[Float[Array, "_ a d"], Cache]:
    """Applies the block.

    Args:
      x: queries, then text; either may be missing.
      past: rows that come before them and are not computed again.
      seen: of `look`; see `CrossAttention` for which rows look at which.
      masks: of the self-attention, see `SelfAttention`, and of the tokens.
      how: see `How`.

    Returns:
      The wanted rows, and keys and values [b h n c] of all that were new.
    """
    x, new = self.attention(x, past, masks[0], how.asking, how.train)
    q, t = x[:, : how.queries], x[:, how.queries :]
    if how.expand:
      q = how.expand(q)
    if how.queries and self.cross:
      q = self.look_at(q, seen, how.times, masks[1], how.train)
    own = self.mlp_query if self.query_ffn else self.mlp
    if how.queries and t.shape[1] and len(q) == len(t) and not self.query_ffn:
      return self.mlp(jnp.concatenate([q, t], axis=1), how.train), new
    parts = [own(q, how.train)] if how.queries else []
    if t.shape[1]:
      t = self.mlp(t, how.train)
      parts.append(how.expand(t) if how.expand else t)
    return jnp.concatenate(parts, axis=1), new


class LanguageHead(nn.Module):
  """BERT's head for words: linear layer, GELU, LayerNorm, the words' table."""

  @nn.compact
  def __call__(
    self, x: Float[Array, "b l d"], words: nn.Embed
  ) -> Float[Array, "b l k"]:
    """Logits of the words of the vocabulary, at least float32."""
    x = GELU["erf"](dense(x, x.shape[-1], "dense", x.shape[-1]))
    x = norm(x.dtype, "norm")(x)
    bias = self.param("bias", nn.initializers.zeros, (words.num_embeddings,))
    logits = at_least_float32(words.attend(x))
    return logits + bias.astype(logits.dtype)


# --- What passes have seen ---------------------------------------------------


def both(one: Looked, two: Looked) -> Looked:
  """Of what two looks of a stack gave, that at the arrays of both."""
  pairs = zip(one, two, strict=True)
  return tuple(None if a is None else a + b for a, b in pairs)


def looked(enc: Any) -> bool:
  """Whether it is of `look` and not the tokens themselves."""
  return isinstance(enc, tuple) and isinstance(enc[0], tuple)


def arrays(seen: Looked) -> int:
  """How many arrays of tokens there are; the first block always looks."""
  return len(seen[0])


def examples(seen: Looked) -> int:
  """Rows of queries that look at these tokens, one at each."""
  return sum(len(one.keys) for one in seen[0])


def whole(caches: list[Cache]) -> Cache:
  """Of parts of the stack, each [depth …], that of all its blocks."""
  return jax.tree.map(lambda *x: jnp.concatenate(x), *caches)


def cut(past: Cache | None, *place: int) -> Cache | None:
  """One block of what was seen, or those from a first to an end."""
  if past is None:
    return None
  return Cache(*(y[slice(*place) if place[1:] else place[0]] for y in past))
