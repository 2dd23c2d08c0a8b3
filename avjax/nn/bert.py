"""BERT (arXiv:1810.04805) that reads text and asks an encoder queries.

One post-norm stack serves three kinds of rows: text alone is plain BERT;
learned queries pass the same blocks and look at an encoder's tokens by
cross-attention on the way; both together see each other. CoAVT
(arXiv:2401.12264) §III-A has cross-attention in every block and shares the rest
between queries and text. BLIP-2 (arXiv:2301.12597), from which it comes, has
cross-attention in every second block and an MLP of the queries' own
(`cross_every=2, query_ffn=True`).

| pass | queries see | text sees |
|---|---|---|
| `query` | queries, encoder | |
| `text` | | text |
| `match` | queries, text, encoder | queries, text |
| `language` | queries, encoder (their own pass) | queries, text up to itself |

Text never looks at the encoder, and pads are never looked at. Positions of text
count from 0 whether or not queries come first; queries have none. LayerNorm's
epsilon is 1e-12, with the variance in two passes: E[x²] - E[x]² is too coarse
for it. GELU is exact. There are no token types: `avjax.weights.bert` adds those
of the first sentence to the positions, which is the same.

Parameters, with d the width:

  words/embedding [V d], positions [l d], queries [q d], norm
  block_00/attention/{qkv,out,norm}       qkv/kernel [d 3d], order q, k, v
  block_00/cross/{query,kv,out,norm}      kv/kernel [w 2d], order k, v
  block_00/mlp/{fc1,fc2,norm}, block_00/mlp_query/… (with query_ffn)
  project_query, project_text [d p], match [d 2]
  language/{dense,norm,bias}              its matrix is words/embedding
  temperature []
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from avjax.errors import InputError, lookup
from avjax.nn import sizes
from avjax.nn.bert_block import (
  Block,
  Cache,
  Encoded,
  at_least_float32,
  dense,
  norm,
  normal,
  unit,
)
from avjax.nn.transformer import GELU, REMAT

TEMPERATURE = 0.07  # first value; similarities are divided by it (BLIP-2)


class LanguageHead(nn.Module):
  """BERT's head for words: linear layer, GELU, LayerNorm, the words' table."""

  @nn.compact
  def __call__(
    self, x: Float[Array, "b l d"], words: nn.Embed
  ) -> Float[Array, "b l k"]:
    """Logits of the words of the vocabulary, at least float32."""
    x = GELU["erf"](dense(x, x.shape[-1], "dense"))
    x = norm(x.dtype, "norm")(x)
    bias = self.param("bias", nn.initializers.zeros, (words.num_embeddings,))
    logits = at_least_float32(words.attend(x))
    return logits + bias.astype(logits.dtype)


# --- The whole ---------------------------------------------------------------


class QueryEncoder(nn.Module):
  """Text encoder and query encoder in one (CoAVT §III-A).

  Attributes:
    size: of the stack; BERT-base is `sizes.SIZES['B']`.
    vocabulary: number of words, the last of which is [DEC].
    positions: longest text.
    queries: learned rows that ask the encoder, 16 in the paper.
    cross_every: cross-attention in blocks 0, cross_every, …: 2 in BLIP-2.
    query_ffn: queries have an MLP of their own (BLIP-2).
    projection: width of the space where queries and texts are compared.
    dropout: of hidden rows and of attention; needs a 'dropout' rng to train.
    dtype: of the computation. Statistics, logits and projections are float32
      at least.
    scan: one compiled block for all layers; parameters are stacked then, see
      `transformer.stack_layers`. Blocks have to be alike.
    remat: name in `transformer.REMAT`.
  """

  size: sizes.Size
  vocabulary: int
  positions: int = 512
  queries: int = 16
  cross_every: int = 1
  query_ffn: bool = False
  projection: int = 256
  dropout: float = 0.1
  dtype: Any = jnp.float32
  scan: bool = False
  remat: str = "none"

  def setup(self):
    """Makes the parts."""
    d = self.size.width
    layer = functools.partial(nn.Dense, dtype=self.dtype, kernel_init=normal)
    self.words = nn.Embed(
      self.vocabulary, d, dtype=self.dtype, embedding_init=normal
    )
    self.position_table = self.param("positions", normal, (self.positions, d))
    self.query_rows = self.param("queries", normal, (self.queries, d))
    self.norm = norm(self.dtype)
    self.drop = nn.Dropout(self.dropout)
    self.stack = self._blocks()
    self.project_query = layer(self.projection)
    self.project_text = layer(self.projection)
    self.match_head = layer(2, name="match")
    self.language_head = LanguageHead(name="language")
    self.temperature = self.param(
      "temperature", nn.initializers.constant(TEMPERATURE), ()
    )

  def _blocks(self) -> Any:
    """All blocks, or the one of a scan."""
    block, policy = Block, lookup(REMAT, self.remat, "remat policy")
    if self.remat != "none":
      block = nn.remat(
        Block,
        policy=policy,
        prevent_cse=not self.scan,
        static_argnums=(6, 7),  # queries and train; the module is 0
      )
    options = (self.size.heads, self.size.mlp, self.dropout)
    if not self.scan:
      return [
        block(
          *options, i % self.cross_every == 0, self.query_ffn,
          name=f"block_{i:02d}",
        )
        for i in range(self.size.depth)
      ]  # fmt: skip
    if self.cross_every != 1:
      raise InputError(
        f"scan=True needs blocks that are alike, but cross_every is "
        f"{self.cross_every}"
      )
    return block(*options, True, self.query_ffn, name="blocks")

  def __call__(
    self,
    enc: Float[Array, "b s w"],
    ids: Int[Array, "b l"],
    mask: Bool[Array, "b l"],
  ) -> dict[str, Array]:
    """Passes every parameter once, which is what `init` needs.

    Returns:
      'query' and 'text' projected, 'match' and 'language' logits.
    """
    out, cache = self.query(enc)
    return {
      "query": self.project("query", out),
      "text": self.project("text", self.text(ids, mask)[:, 0]),
      "match": self.matching(out),
      "language": self.language(cache, ids, mask),
    }

  # --- Passes

  def query(
    self,
    enc: Encoded,
    enc_mask: Bool[Array, "b s"] | None = None,
    *,
    train: bool = False,
  ) -> tuple[Float[Array, "_ q d"], Cache]:
    """What the queries find in an encoder's tokens.

    Args:
      enc: tokens of the encoder, of any width. A tuple of g arrays [b s w], of
        any numbers s of tokens, has g b rows: those of the first example, one
        for each array, then those of the second. One pass serves them all.
      enc_mask: true where there is a token; None = everywhere.
      train: drops out.

    Returns:
      The queries' rows, and their keys and values [depth b h q d/h] for
      `language` and `step`.
    """
    x = self._query_rows(_examples(enc), train)
    return self._run(x, None, enc, enc_mask, train=train)

  def text(
    self,
    ids: Int[Array, "b l"],
    mask: Bool[Array, "b l"],
    *,
    train: bool = False,
  ) -> Float[Array, "b l d"]:
    """Plain BERT; row 0 is [CLS].

    Args:
      ids: words.
      mask: true where there is a word, false for pads.
      train: drops out.

    Raises:
      InputError: the text is longer than there are positions.
    """
    x = self._text_rows(ids, train)
    return self._run(x, mask[:, None, None], train=train)[0]

  def match(
    self,
    enc: Encoded,
    ids: Int[Array, "b l"],
    mask: Bool[Array, "b l"],
    *,
    train: bool = False,
  ) -> Float[Array, "b q d"]:
    """The queries' rows, having seen text and encoder; for `matching`."""
    return self.joint(enc, ids, mask, train=train)[:, : self.queries]

  def joint(
    self,
    enc: Encoded,
    ids: Int[Array, "b l"],
    mask: Bool[Array, "b l"],
    *,
    train: bool = False,
  ) -> Float[Array, "b n d"]:
    """Rows of queries and text that have seen each other."""
    parts = [self._query_rows(len(ids), train), self._text_rows(ids, train)]
    seen = jnp.pad(mask, ((0, 0), (self.queries, 0)), constant_values=True)
    x = jnp.concatenate(parts, axis=1)
    return self._run(x, seen[:, None, None], enc, train=train)[0]

  def language(
    self,
    cache: Cache,
    ids: Int[Array, "b l"],
    mask: Bool[Array, "b l"],
    *,
    train: bool = False,
  ) -> Float[Array, "b l k"]:
    """Logits of the word that follows each word, given the queries.

    Args:
      cache: of `query`.
      ids: words; whatever the first is, [DEC] stands in its place.
      mask: true where there is a word.
      train: drops out.
    """
    ids = ids.at[:, 0].set(self.vocabulary - 1)
    length, queries = ids.shape[1], cache.keys.shape[3]
    own = jnp.tri(length, dtype=bool) & mask[:, None, None]
    seen = ((0, 0), (0, 0), (0, 0), (queries, 0))
    own = jnp.pad(own, seen, constant_values=True)
    x = self._text_rows(ids, train)
    x, _ = self._run(x, own, past=cache, train=train)
    return self.language_head(x, self.words)

  # --- Generation

  def empty(self, b: int, l: int) -> Cache:
    """A text's cache for `step`: room for l words, none written yet."""
    size = self.size
    shape = (size.depth, b, size.heads, l, size.width // size.heads)
    return Cache(*(jnp.zeros(shape, self.dtype) for _ in Cache._fields))

  def step(
    self,
    cache: Cache,
    text_cache: Cache,
    token: Int[Array, "b"],
    position: Int[Array, ""] | int,
  ) -> tuple[Float[Array, "b k"], Cache]:
    """Logits of the next word; the same as a row of `language`.

    Args:
      cache: of `query`.
      text_cache: of `empty` or of the step before.
      token: the text's word at this position; [DEC] at position 0.
      position: of the word, the same for the batch; below the cache's length.

    Returns:
      Logits, and the cache with this word in it.
    """
    queries, length = cache.keys.shape[3], text_cache.keys.shape[3]
    place = jnp.arange(queries + length + 1) - queries
    # Queries, earlier words, and the word itself at the end.
    seen = (place < position) | (place == length)
    past = jax.tree.map(
      lambda *x: jnp.concatenate(x, axis=3), cache, text_cache
    )
    x = self.words(token)[:, None]
    x = x + self.position_table[position].astype(x.dtype)
    x, new = self._run(self.norm(x), seen[None, None, None], past=past)
    logits = self.language_head(x, self.words)[:, 0]
    insert = functools.partial(
      jax.lax.dynamic_update_slice_in_dim, start_index=position, axis=3
    )
    return logits, jax.tree.map(insert, text_cache, new)

  # --- Heads

  def project(self, kind: str, x: Float[Array, "*b d"]) -> Float[Array, "*b p"]:
    """Rows in the space of the contrastive loss, of length 1.

    Args:
      kind: 'query' or 'text'.
      x: rows of queries, or the first row of texts.
    """
    heads = {"query": self.project_query, "text": self.project_text}
    return unit(lookup(heads, kind, "projection")(x))

  def matching(self, out: Float[Array, "b q d"]) -> Float[Array, "b q 2"]:
    """Logits of (no match, match) per query, of `match`'s rows."""
    return at_least_float32(self.match_head(out))

  # --- Rows

  def _query_rows(self, b: int, train: bool) -> Float[Array, "b q d"]:
    x = self.norm(self.query_rows.astype(self.dtype))
    x = jnp.broadcast_to(x, (b, *x.shape))
    return self.drop(x, deterministic=not train)

  def _text_rows(
    self, ids: Int[Array, "b l"], train: bool
  ) -> Float[Array, "b l d"]:
    length = ids.shape[1]
    if length > self.positions:
      raise InputError(
        f"a text of {length} words has no place in {self.positions} positions"
      )
    table = self.position_table[:length]
    x = self.norm(self.words(ids) + table.astype(self.dtype))
    return self.drop(x, deterministic=not train)

  def _run(
    self,
    x: Float[Array, "b n d"],
    mask: Bool[Array, "#b 1 #n #k"] | None,
    enc: Encoded | None = None,
    enc_mask: Bool[Array, "b s"] | None = None,
    *,
    past: Cache | None = None,
    train: bool = False,
  ) -> tuple[Float[Array, "b n d"], Cache]:
    """All blocks; queries come first where there is an encoder."""
    queries = 0
    if enc is not None:
      enc = jax.tree.map(lambda x: x.astype(self.dtype), enc)
      queries = self.queries
    if enc_mask is not None:
      enc_mask = enc_mask[:, None, None]

    def apply(block, x, past):
      return block(x, past, mask, enc, enc_mask, queries, train)

    if self.scan:
      axes = {"params": 0}
      rngs = {"params": True, "dropout": True}
      depth = self.size.depth
      step = nn.scan(apply, axes, split_rngs=rngs, in_axes=0, length=depth)
      return step(self.stack, x, past)
    caches = []
    for i, block in enumerate(self.stack):
      x, new = apply(block, x, jax.tree.map(lambda y, i=i: y[i], past))
      caches.append(new)
    return x, jax.tree.map(lambda *y: jnp.stack(y), *caches)


def _examples(enc: Encoded) -> int:
  """Rows of queries that look at these tokens."""
  if isinstance(enc, tuple):
    return sum(len(one) for one in enc)
  return len(enc)
