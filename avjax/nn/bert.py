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

What is the same in several pairs is computed once: keys and values of the
encoder's tokens (`cross_cache`), and what a text does until the queries of the
first block look at the encoder (`expand`). What nobody reads is not computed:
in the last block, the text's rows of `match` and all but [CLS] of `first`.
Dropout is then shared in the same way.

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
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from avjax.errors import InputError, lookup
from avjax.losses import unit
from avjax.nn import sizes
from avjax.nn.bert_block import (
  STACKED,
  Block,
  Cache,
  CrossCache,
  Encoded,
  Expand,
  LanguageHead,
  PassOptions,
  first_values,
  join_layers,
  layers,
  norm,
  take_layers,
)
from avjax.nn.transformer import NORMAL, REMAT

TEMPERATURE = 0.07  # first value; similarities are divided by it (BLIP-2)


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
    scan: one compiled block for all layers but the first and the last;
      parameters are those of `bert_block.stacked` then. Blocks have to be
      alike.
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
    init = first_values(d)
    self.words = nn.Embed(
      self.vocabulary, d, dtype=self.dtype, embedding_init=NORMAL
    )
    self.position_table = self.param("positions", NORMAL, (self.positions, d))
    self.query_rows = self.param("queries", NORMAL, (self.queries, d))
    self.norm = norm(self.dtype)
    self.drop = nn.Dropout(self.dropout)
    self.stack = self._blocks()
    exact = jnp.promote_types(self.dtype, jnp.float32)
    head = functools.partial(nn.Dense, dtype=exact, kernel_init=init)
    self.project_query = head(self.projection)
    self.project_text = head(self.projection)
    self.match_head = head(2, name="match")
    self.language_head = LanguageHead(name="language")
    self.temperature = self.param(
      "temperature", nn.initializers.constant(TEMPERATURE), ()
    )

  def _blocks(self) -> list[Block]:
    """All blocks; with `scan` the first, the one in between and the last."""
    policy = lookup(REMAT, self.remat, "remat policy")
    if self.scan and self.cross_every != 1:
      raise InputError(
        f"scan=True needs blocks that are alike, but cross_every is "
        f"{self.cross_every}"
      )
    blocks = []
    for name, i, _ in self._layers():
      block = Block
      if self.remat != "none":
        block = nn.remat(
          Block,
          policy=policy,
          prevent_cse=name != STACKED,  # a scan prevents it
          static_argnums=(5,),  # options; the module is 0
        )
      looks = i % self.cross_every == 0
      options = (self.size, self.dropout, looks, self.query_ffn, self.dtype)
      blocks.append(block(*options, name=name))
    return blocks

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

  def cross_cache(self, enc: Encoded | CrossCache) -> CrossCache:
    """Keys and values of an encoder's tokens, for any number of passes.

    They are kept for the backward pass, whatever `remat` says.

    Args:
      enc: tokens of any width; a tuple of arrays [b s w] is of the same
        examples, each of any number s of tokens. A cache stays as it is.
    """
    if isinstance(enc, CrossCache):
      return enc
    enc = enc if isinstance(enc, tuple) else (enc,)
    enc = jax.tree.map(lambda x: x.astype(self.dtype), enc)
    found = []
    for block, (name, *_) in zip(self.stack, self._layers(), strict=True):
      if name != STACKED:
        found.append(block.memory(enc))
        continue
      step = self._scanned(lambda block, _: ((), block.memory(enc)))
      found.append(step(block, ())[1])
    return CrossCache(tuple(found))

  def query(
    self,
    enc: Encoded | CrossCache,
    enc_mask: Bool[Array, "b s"] | None = None,
    *,
    train: bool = False,
  ) -> tuple[Float[Array, "_ q d"], Cache]:
    """What the queries find in an encoder's tokens.

    Args:
      enc: tokens of the encoder, or their `cross_cache`. Of a tuple of g arrays
        come g b rows: those of the first example, one for each array,
        then those of the second. One pass serves them all.
      enc_mask: true where there is a token, of one array; None = everywhere.
      train: drops out.

    Raises:
      InputError: a mask for several arrays.

    Returns:
      The queries' rows, and their keys and values [depth b h q d/h] for
      `language` and `step`.
    """
    cross = self.cross_cache(enc)
    if enc_mask is not None and cross.num_arrays > 1:
      raise InputError(f"one enc_mask for {cross.num_arrays} arrays of tokens")
    x = self._query_rows(cross.num_rows, train)
    options = PassOptions(train, self.queries, (1,) * cross.num_arrays)
    out, caches = self._run(x, None, options, cross=cross, enc_mask=enc_mask)
    return out, join_layers(caches)

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
    return self._run(x, mask[:, None, None], PassOptions(train))[0]

  def first(
    self,
    ids: Int[Array, "b l"],
    mask: Bool[Array, "b l"],
    *,
    train: bool = False,
  ) -> Float[Array, "b d"]:
    """Row 0 of `text`, for less."""
    x = self._text_rows(ids, train)
    options = PassOptions(train, num_outputs=1)
    return self._run(x, mask[:, None, None], options)[0][:, 0]

  def match(
    self,
    enc: Encoded | CrossCache,
    ids: Int[Array, "t l"],
    mask: Bool[Array, "t l"],
    *,
    pairs_each: tuple[int, ...] | None = None,
    expand: Expand | None = None,
    train: bool = False,
  ) -> Float[Array, "n q d"]:
    """The queries' rows, having seen text and encoder; for `matching`.

    Args:
      enc: see `query`.
      ids: words.
      mask: true where there is a word.
      pairs_each: of several arrays of tokens, how many pairs of an example are
        with each, one after the other; None = one.
      expand: makes rows [n …] of pairs out of rows [t …] of texts, for pairs
        that share texts; None = every text has one pair.
      train: drops out.

    Raises:
      InputError: another number of pairs than `pairs_each` says.
    """
    q = self.queries
    options = PassOptions(train, q, pairs_each or (), q, expand)
    return self._joint(enc, ids, mask, options)

  def joint(
    self,
    enc: Encoded | CrossCache,
    ids: Int[Array, "b l"],
    mask: Bool[Array, "b l"],
    *,
    train: bool = False,
  ) -> Float[Array, "b n d"]:
    """Rows of queries and text that have seen each other."""
    return self._joint(enc, ids, mask, PassOptions(train, self.queries))

  def _joint(self, enc, ids, mask, options):
    cross = self.cross_cache(enc)
    each = options.pairs_each or (1,) * cross.num_arrays
    options = options._replace(pairs_each=each)
    b, train = len(ids), options.train
    rows = jax.eval_shape(options.expand or (lambda x: x), ids).shape[0]
    wanted = sum(each) * cross.num_rows // cross.num_arrays
    if rows != wanted:
      raise InputError(f"{rows} texts for {wanted} pairs of {each} by example")
    parts = [self._query_rows(b, train), self._text_rows(ids, train)]
    own = jnp.pad(mask, ((0, 0), (self.queries, 0)), constant_values=True)
    x = jnp.concatenate(parts, axis=1)
    return self._run(x, own[:, None, None], options, cross=cross)[0]

  def language(
    self,
    cache: Cache,
    ids: Int[Array, "b l"],
    mask: Bool[Array, "b l"],
    *,
    repeats: int = 1,
    train: bool = False,
  ) -> Float[Array, "_ l k"]:
    """Logits of the word that follows each word, given the queries.

    Args:
      cache: of `query`.
      ids: words; whatever the first is, [DEC] stands in its place.
      mask: true where there is a word.
      repeats: how many rows of the cache, one after the other, belong to each
        text; the result has a row for each.
      train: drops out.
    """
    ids = ids.at[:, 0].set(self.vocabulary - 1)
    length, queries = ids.shape[1], cache.keys.shape[3]
    own = jnp.tri(length, dtype=bool) & mask[:, None, None]
    before = ((0, 0), (0, 0), (0, 0), (queries, 0))
    own = jnp.pad(own, before, constant_values=True)
    x = self._text_rows(ids, train)
    expand = None
    if repeats > 1:
      expand = functools.partial(jnp.repeat, repeats=repeats, axis=0)
    options = PassOptions(train, expand=expand)
    x, _ = self._run(x, own, options, past=cache)
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
    mask = seen[None, None, None]
    x, caches = self._run(self.norm(x), mask, PassOptions(False), past=past)
    logits = self.language_head(x, self.words)[:, 0]
    insert = functools.partial(
      jax.lax.dynamic_update_slice_in_dim, start_index=position, axis=3
    )
    return logits, jax.tree.map(insert, text_cache, join_layers(caches))

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
    return self.match_head(out)

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

  # --- The stack

  def _layers(self) -> list[tuple[str, int, int]]:
    return layers(self.size.depth, self.scan)

  def _run(
    self,
    x: Float[Array, "b n d"],
    mask: Bool[Array, "#b 1 #n #k"] | None,
    options: PassOptions,
    *,
    cross: CrossCache | None = None,
    enc_mask: Bool[Array, "b s"] | None = None,
    past: Cache | None = None,
  ) -> tuple[Float[Array, "_ a d"], list[Cache]]:
    """All blocks; `num_outputs` is for the last, `expand` for the first.

    Rows of `past` are those after `expand`. What was new comes back by
    module, see `layers`.
    """
    if enc_mask is not None:
      enc_mask = enc_mask[:, None, None]
    caches = []
    for block, (name, start, count) in zip(
      self.stack, self._layers(), strict=True
    ):
      end = start + count
      last = end == self.size.depth
      own = options._replace(
        num_outputs=options.num_outputs if last else None,
        expand=None if start else options.expand,
      )
      here = take_layers(past, start, end)
      if own.expand and past is not None:
        # Nothing has been seen yet: the rows of a text are alike.
        share = past.keys.shape[1] // len(x)
        here = Cache(*(y[:, ::share] for y in here))
      memory = cross and cross.modules[len(caches)]
      more = (mask, enc_mask), own
      if name == STACKED:
        step = self._scanned(lambda block, x, *each: block(x, *each, *more))  # noqa: B023
        x, new = step(block, x, here, memory)
      else:
        x, new = block(x, take_layers(here, 0), memory, *more)
        new = Cache(*(y[None] for y in new))
      if own.expand and mask is not None and len(mask) > 1:
        mask = own.expand(mask)
      caches.append(new)
    return x, caches

  def _scanned(self, step: Callable[..., Any]) -> Callable[..., Any]:
    """`step` of one block as one of several with stacked parameters."""
    rngs = {"params": True, "dropout": True}
    count = self.size.depth - 2
    return nn.scan(
      step, {"params": 0}, split_rngs=rngs, in_axes=0, length=count
    )
