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
from avjax.nn.transformer import GELU, stack_layers

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


# Of a block with and without cross-attention, by array of tokens.
Memory = tuple[Cache, ...] | None


class CrossCache(NamedTuple):
  """Keys and values of an encoder's tokens; of `QueryEncoder.cross_cache`.

  Attributes:
    modules: by module of the stack, see `layers`.
  """

  modules: tuple[Memory, ...]

  @property
  def num_arrays(self) -> int:
    """Of tokens; the first block always looks at them."""
    return len(self.modules[0])

  @property
  def num_rows(self) -> int:
    """Rows of queries if each example has one for every array."""
    return sum(len(one.keys) for one in self.modules[0])

  def beside(self, other: "CrossCache") -> "CrossCache":
    """The arrays of both, of the same examples."""
    pairs = zip(self.modules, other.modules, strict=True)
    return CrossCache(tuple(None if a is None else a + b for a, b in pairs))


class PassOptions(NamedTuple):
  """What a pass asks of a block; all of it static.

  Attributes:
    train: drops out.
    queries: how many of the rows are queries.
    pairs_each: see `CrossAttention`.
    num_outputs: how many rows, from the first on, are wanted; None = all.
    expand: makes a row for each pair out of the rows for each text, after the
      self-attention: queries and text have not seen an encoder before, so
      what they do until then is the same in all pairs of a text.
  """

  train: bool
  queries: int = 0
  pairs_each: tuple[int, ...] = ()
  num_outputs: int | None = None
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
    num_outputs: int | None,
    train: bool,
  ) -> tuple[Float[Array, "b a d"], Cache]:
    """Attends.

    Args:
      x: rows.
      past: rows that come before x and were seen earlier.
      mask: true where row n may look at k: those before it, then its own.
      num_outputs: how many rows, from the first on, are wanted; None = all.
      train: drops out.

    Returns:
      The wanted rows, and keys and values of all that were new.
    """
    b, n, d = x.shape
    asking = n if num_outputs is None else num_outputs
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

  def cache(self, tokens: Float[Array, "b s w"]) -> Cache:
    """Keys and values of an encoder's tokens."""
    rows = self.kv(tokens.reshape(-1, tokens.shape[-1]))
    return Cache(*split(rows, len(tokens), self.heads, 2))

  def __call__(
    self,
    x: Float[Array, "n q d"],
    memory: tuple[Cache, ...],
    pairs_each: tuple[int, ...],
    mask: Bool[Array, "b 1 1 s"] | None,
    train: bool,
  ) -> Float[Array, "n q d"]:
    """Attends.

    Args:
      x: queries: sum(pairs_each) rows for the first example, then for the
        second.
      memory: of `cache`, each of all examples.
      pairs_each: how many rows of an example, one after the other, look at
        each.
      mask: true where there is a token; None = everywhere.
      train: drops out.
    """
    (n, count, d), rows = x.shape, x.reshape(-1, x.shape[-1])
    drop = functools.partial(self.drop, deterministic=not train)
    groups = self.query(rows).reshape(-1, sum(pairs_each), count, d)
    starts = list(itertools.accumulate(pairs_each))[:-1]
    out = []
    for q, cache in zip(jnp.split(groups, starts, 1), memory, strict=True):
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
    looks: whether queries look at the encoder here.
    query_ffn: whether queries have an MLP of their own.
    dtype: of the computation.
  """

  size: Size
  dropout: float
  looks: bool
  query_ffn: bool
  dtype: Any

  def setup(self):
    """Makes the parts."""
    heads, drop = self.size.heads, self.dropout
    self.attention = SelfAttention(heads, drop)
    if self.looks:
      width = self.size.width
      self.cross = CrossAttention(heads, drop, width, self.dtype)
    self.mlp = MLP(self.size.mlp, drop)
    if self.query_ffn:
      self.mlp_query = MLP(self.size.mlp, drop)

  def memory(self, tokens: tuple[Float[Array, "b _ w"], ...]) -> Memory:
    """Keys and values of the encoder's tokens; None without cross-attention."""
    if not self.looks:
      return None
    return tuple(self.cross.cache(x) for x in tokens)

  def __call__(
    self,
    x: Float[Array, "b n d"],
    past: Cache | None,
    memory: Memory,
    masks: tuple[Bool[Array, "#b 1 #n #k"] | None, Array | None],
    options: PassOptions,
  ) -> tuple[Float[Array, "_ a d"], Cache]:
    """Applies the block.

    Args:
      x: queries, then text; either may be missing.
      past: rows that come before them and are not computed again.
      memory: see `CrossAttention` for which rows look at which.
      masks: of the self-attention, see `SelfAttention`, and of the tokens.
      options: see `PassOptions`.

    Returns:
      The wanted rows, and keys and values [b h n c] of all that were new.
    """
    train, queries = options.train, options.queries
    x, new = self.attention(x, past, masks[0], options.num_outputs, train)
    q, t = x[:, :queries], x[:, queries:]
    expand = options.expand or (lambda x: x)
    q = expand(q)
    if queries and self.looks:
      q = self.cross(q, memory, options.pairs_each, masks[1], train)
    own = self.mlp_query if self.query_ffn else self.mlp
    if queries and t.shape[1] and not self.query_ffn and not options.expand:
      return self.mlp(jnp.concatenate([q, t], axis=1), train), new
    parts = [own(q, train)] if queries else []
    if t.shape[1]:
      parts.append(expand(self.mlp(t, train)))
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
    table = words.embedding.astype(x.dtype)
    exact = jnp.promote_types(x.dtype, jnp.float32)
    logits = jnp.einsum("bld,kd->blk", x, table, preferred_element_type=exact)
    return logits + bias.astype(logits.dtype)


# --- The stack ----------------------------------------------------------------


def join_layers(caches: list[Cache]) -> Cache:
  """Of parts of the stack, each [depth …], that of all its blocks."""
  return jax.tree.map(lambda *x: jnp.concatenate(x), *caches)


def take_layers(past: Cache | None, *place: int) -> Cache | None:
  """One block of what was seen, or those from a first to an end."""
  if past is None:
    return None
  return Cache(*(y[slice(*place) if place[1:] else place[0]] for y in past))


STACKED = "blocks"  # parameters of several blocks, see `stacked`


def layers(depth: int, scan: bool) -> list[tuple[str, int, int]]:
  """The modules of a stack: name, first block and how many.

  With `scan` one stands for all but the first and the last block, which do
  less than the others.
  """
  names = [(f"block_{i:02d}", i, 1) for i in range(depth)]
  if scan and depth > 2:
    return [names[0], (STACKED, 1, depth - 2), names[-1]]
  return names


def stacked(params: Any) -> Any:
  """Parameters as `scan=True` needs them.

  Args:
    params: one block per layer, or all of them in one stack, see
      `transformer.stack_layers`.
  """
  params = stack_layers(params)
  blocks = params[STACKED]
  depth = len(jax.tree.leaves(blocks)[0])
  own = {
    name: jax.tree.map(
      lambda x, i=i, n=n, name=name: x[i : i + n] if name == STACKED else x[i],
      blocks,
    )
    for name, i, n in layers(depth, True)
  }
  return {**{k: x for k, x in params.items() if k != STACKED}, **own}
