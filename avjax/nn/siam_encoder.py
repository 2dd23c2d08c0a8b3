"""AVSiam's encoder: one ViT for sound and pictures (arXiv:2403.19638, §3).

Every example keeps another share of its tokens. Blocks of R consecutive
examples hold each of R shares once, so that a block always has the same number
of tokens: they lie one sequence behind the other on the token axis, the sound's
before the pictures'. LayerNorms, projections and MLPs take all of them in one
product; attention sees one sequence at a time, at lengths known when the
program is compiled. There is no padding, no mask, and no choice of an example
depends on another block, so the batch can lie on any number of devices.

Without masks a block is one example and R is 1.

Audio tokens are frequency-major, f*T + t; a patch's pixels are (mel, time),
those of an image (row, column, channel). There is no CLS token.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from avjax.errors import InputError
from avjax.nn import masking, sizes
from avjax.nn.attention import attention, choose
from avjax.nn.cav_encoder import Grids, Tokens
from avjax.nn.transformer import MLP, NORMAL, XAVIER, qkv_init, repeat

LAST_EPS = 1e-6  # of the encoder's last LayerNorm, in the public code, too

# Lengths of the sequences on the token axis that share a set of LayerNorms,
# and the ending of the set's names.
Part = tuple[str, tuple[int, ...]]


# --- Which example keeps how much --------------------------------------------


@dataclasses.dataclass(frozen=True)
class Slots:
  """Kept tokens of one modality in blocks of R examples.

  Slot r of a block holds the example that keeps `kept[r]` of its `n` tokens.

  Attributes:
    n: tokens of an example.
    kept: by slot.
    order: the first max(kept) tokens of every example, in order of noise.
    example: which of its block's examples is in slot r.
    slot: the inverse: in which slot an example is.
  """

  n: int
  kept: tuple[int, ...]
  order: Int[Array, "b k"]
  example: Int[Array, "g r"]
  slot: Int[Array, "g r"]

  def ids(self) -> Int[Array, "g k"]:
    """Kept tokens slot by slot, counted from the block's first token."""
    ids = self.padded(self.example)
    return jnp.concatenate(
      [ids[:, r, :kept] for r, kept in enumerate(self.kept)], axis=1
    )

  def padded(self, example: Int[Array, "g r"]) -> Int[Array, "g r k"]:
    """max(kept) tokens of each of these examples, from the block's first."""
    order = self.order.reshape(*self.example.shape, -1)
    chosen = jnp.take_along_axis(order, example[:, :, None], axis=1)
    return chosen + example[:, :, None] * self.n

  def counts(self) -> Int[Array, "b"]:
    """How many tokens every example keeps."""
    return jnp.asarray(self.kept)[self.slot].reshape(-1)

  def removed(self) -> Bool[Array, "b n"]:
    """True where a token was masked out, false where it was kept."""
    kept = jnp.arange(self.order.shape[1]) < self.counts()[:, None]

    def one(ids, kept):
      return jnp.ones(self.n, bool).at[ids].set(~kept)

    return jax.vmap(one)(self.order, kept)

  def pool(self, x: Float[Array, "g k d"]) -> Float[Array, "b d"]:
    """Mean over the tokens of every example, in float32, in batch order."""
    x, ends = x.astype(jnp.float32), np.cumsum(self.kept)[:-1]
    means = [part.mean(1) for part in jnp.split(x, ends, axis=1)]
    means = jnp.stack(means, axis=1)
    return jnp.take_along_axis(means, self.slot[:, :, None], axis=1).reshape(
      -1, x.shape[2]
    )


def assign(
  shares: Float[Array, "b"], ratios: int
) -> tuple[Int[Array, "g r"], Int[Array, "g r"]]:
  """`example` and `slot` of `Slots`: the r-th smallest share is in slot r.

  Args:
    shares: one per example.
    ratios: R, of consecutive examples that make a block.

  Raises:
    InputError: the batch does not divide into blocks of R.
  """
  if len(shares) % ratios:
    raise InputError(
      f"batch size {len(shares)} is not divisible by the {ratios} of "
      "model.ratios"
    )
  example = masking.ids_keep(shares.reshape(-1, ratios), ratios)
  return example, jnp.argsort(example, axis=1)


Masks = Mapping[str, Slots]  # by modality


def beside(
  audio: Slots, video: Slots
) -> tuple[Int[Array, "g k"], Int[Array, "g r"]]:
  """Where a block's video tokens are that go with the sound's slots.

  An example keeps its shares of sound and of the picture independently, so
  the length of a pair is not known beforehand: video is padded to the longest.

  Returns:
    Places of R max(kept) video tokens among those of `video.ids`, in the order
    of the sound's slots (padding repeats a last token), and how many of each
    slot's are no padding.
  """
  slot = jnp.take_along_axis(video.slot, audio.example, axis=1)
  starts = np.cumsum((0, *video.kept[:-1]))
  counts = jnp.asarray(video.kept)[slot]
  place = jnp.minimum(jnp.arange(max(video.kept)), counts[:, :, None] - 1)
  place = place + jnp.asarray(starts)[slot][:, :, None]
  return place.reshape(len(slot), -1), counts


def whole_lines(
  noise: Float[Array, "b n"],
  keys: masking.Keys,
  grid: tuple[int, int],
  rows: Int[Array, "b"],
  columns: Int[Array, "b"],
) -> Float[Array, "b n"]:
  """`masking.whole_lines` with numbers of lines that differ by example."""

  def drawn(number, lines, count):
    draws = masking.example_noise(masking.fold_in(keys, number), lines)
    return draws.argsort(1).argsort(1) >= lines - count[:, None]

  chosen = drawn(0, grid[0], rows)[:, :, None]
  chosen = chosen | drawn(1, grid[1], columns)[:, None]
  return noise + chosen.reshape(noise.shape)


# --- Blocks ------------------------------------------------------------------


class SequenceAttention(nn.Module):
  """Attention of every sequence on itself; its projections take them all.

  Attributes:
    heads: of the attention.
    lengths: of the sequences on the token axis.
    implementation: of `avjax.nn.attention`.
  """

  heads: int
  lengths: tuple[int, ...]
  implementation: str = "auto"

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "g n d"],
    counts: Int[Array, "g r"] | None = None,
  ) -> Float[Array, "g n d"]:
    """Tokens [g n d]; `counts`: keys of each sequence that are no padding."""
    g, n, d = x.shape
    rows = x.reshape(g * n, d)
    qkv = nn.Dense(3 * d, dtype=x.dtype, kernel_init=qkv_init, name="qkv")(rows)
    qkv = qkv.reshape(g, n, 3, self.heads, d // self.heads)
    ends, out = np.cumsum(self.lengths)[:-1], []
    for r, part in enumerate(jnp.split(qkv, ends, axis=1)):
      q, k, v = (part[:, :, i] for i in range(3))
      here = None if counts is None else counts[:, r]
      out.append(attend(q, k, v, here, self.implementation))
    out = out[0] if len(out) == 1 else jnp.concatenate(out, axis=1)
    out = nn.Dense(d, dtype=x.dtype, kernel_init=XAVIER, name="out")(
      out.reshape(g * n, d)
    )
    return out.reshape(g, n, d)


def attend(
  q: Float[Array, "g n h d"],
  k: Float[Array, "g n h d"],
  v: Float[Array, "g n h d"],
  count: Int[Array, "g"] | None,
  implementation: str,
) -> Float[Array, "g n h d"]:
  """Attention on the first `count` keys of a sequence; None = on all.

  Padding gets its low score from one more channel, which every implementation
  can do; cuDNN's kernel wants steps of 8 channels, but knows lengths.
  """
  if count is None:
    return attention(q, k, v, implementation=implementation)
  if implementation == "auto":
    implementation = choose(jax.default_backend(), k.shape[1], q)
  if implementation == "cudnn":
    return jax.nn.dot_product_attention(
      q, k, v, key_value_seq_lengths=count, implementation="cudnn"
    )
  padding = jnp.arange(k.shape[1]) >= count[:, None]
  low = jnp.where(padding, -1e4, 0.0)[:, :, None].astype(k.dtype)
  shape, d = k.shape[:-1], k.shape[-1]
  more = (jnp.ones(shape, q.dtype), low, jnp.zeros(shape, v.dtype))
  # What is divided by the root of the channels now is by that of one more.
  q = q * ((d + 1) / d) ** 0.5
  q, k, v = (
    jnp.concatenate([x, jnp.broadcast_to(y, shape)[..., None]], axis=-1)
    for x, y in zip((q, k, v), more, strict=True)
  )
  return attention(q, k, v, implementation=implementation)[..., :d]


class SiamBlock(nn.Module):
  """A pre-norm block over sequences that do not see each other.

  Attributes:
    parts: sequences and their sets of LayerNorms.
    heads, mlp, eps, attention: of `transformer.Block`.
  """

  parts: tuple[Part, ...]
  heads: int
  mlp: int
  eps: float
  attention: str = "auto"

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "g n d"],
    counts: Int[Array, "g r"] | None = None,
  ) -> Float[Array, "g n d"]:
    """Tokens of all sequences; `counts` as of `SequenceAttention`."""
    lengths = tuple(n for _, part in self.parts for n in part)
    mix = SequenceAttention(
      self.heads, lengths, self.attention, name="attention"
    )
    x = x + mix(norms("norm1", self.parts, x, self.eps), counts)
    y = norms("norm2", self.parts, x, self.eps)
    y = MLP(self.mlp, "erf", name="mlp")(y.reshape(-1, x.shape[2]))
    return x + y.reshape(x.shape)


def norms(
  name: str, parts: tuple[Part, ...], x: Float[Array, "g n d"], eps: float
) -> Float[Array, "g n d"]:
  """The LayerNorms of the parts, each on its own tokens."""
  ends = np.cumsum([sum(lengths) for _, lengths in parts])[:-1]
  out = [
    nn.LayerNorm(eps, dtype=x.dtype, name=name + ending)(part)
    for (ending, _), part in zip(parts, jnp.split(x, ends, 1), strict=True)
  ]
  return out[0] if len(out) == 1 else jnp.concatenate(out, axis=1)


class SiamStack(nn.Module):
  """Blocks and, by default, a last LayerNorm.

  Attributes:
    depth: number of blocks.
    parts, heads, mlp, eps, attention: of `SiamBlock`.
    norm: whether LayerNorms follow the last block.
    scan, remat: as of `transformer.Transformer`.
  """

  depth: int
  parts: tuple[Part, ...]
  heads: int
  mlp: int
  eps: float
  attention: str = "auto"
  norm: bool = True
  scan: bool = False
  remat: str = "none"

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "g n d"],
    counts: Int[Array, "g r"] | None = None,
  ) -> Float[Array, "g n d"]:
    """Tokens of all sequences; `counts` as of `SequenceAttention`."""
    options = (self.parts, self.heads, self.mlp, self.eps, self.attention)
    x = repeat(
      functools.partial(SiamBlock, *options),
      self.depth,
      x,
      counts,
      scan=self.scan,
      remat=self.remat,
      by_layer=False,
    )
    return norms("norm", self.parts, x, LAST_EPS) if self.norm else x


# --- Encoder -----------------------------------------------------------------


class SiamEncoder(nn.Module):
  """Tokens and encoder.

  Attributes:
    size: of the encoder.
    grids: patches of the modalities.
    stack: `attention`, `remat`, `scan` of the transformers.
    stacks: by modality, the name of the encoder that it goes through.
    norms: 'shared', or 'modality' = a set each in `encoder`.
    eps: of the blocks' LayerNorms.
    double: encode 2 (patch + position).
  """

  size: sizes.Size
  grids: Grids
  stack: Mapping[str, Any]
  stacks: Mapping[str, str]
  norms: str = "shared"
  eps: float = 1e-6
  double: bool = False

  @nn.compact
  def __call__(
    self, patches: Tokens, kept: Mapping[str, Slots] | None = None
  ) -> dict[str, Float[Array, "g _ d"]]:
    """Encodes each modality.

    Args:
      patches: raw patches [b n p] by modality.
      kept: tokens that are not masked out; None = all, and g is b.

    Returns:
      By modality, tokens after the last LayerNorm, in the order of `Slots.ids`.
    """
    return self.encode(patches, kept)

  def encode(self, patches, kept):
    """See `__call__`; subclasses go on from here."""
    kept = kept or {}
    tokens = {m: self.tokenise(m, x, kept.get(m)) for m, x in patches.items()}
    out = {}
    for name in dict.fromkeys(self.stacks[m] for m in tokens):
      own = [m for m in tokens if self.stacks[m] == name]
      parts = []
      for m in own:
        ending = (
          f"_{m}" if self.norms == "modality" and name == "encoder" else ""
        )
        length = (tokens[m].shape[1],)
        parts.append((ending, kept[m].kept if m in kept else length))
      if len({ending for ending, _ in parts}) < len(parts):
        parts = [("", tuple(n for _, lengths in parts for n in lengths))]
      x = jnp.concatenate([tokens[m] for m in own], axis=1)
      x = self.blocks(name, self.size.depth, tuple(parts), norm=True)(x)
      ends = np.cumsum([tokens[m].shape[1] for m in own])[:-1]
      out |= dict(zip(own, jnp.split(x, ends, axis=1), strict=True))
    return {m: out[m] for m in tokens}

  def tokenise(
    self, m: str, patches: Float[Array, "b n p"], kept: Slots | None
  ) -> Float[Array, "g _ d"]:
    """Embedded patches with positions; raw patches are masked, not tokens."""
    b, n, p = patches.shape
    table = self.param(f"positions_{m}", NORMAL, (n, self.size.width))
    if kept is None:
      x, table = patches, table[None]
    else:
      ids = kept.ids()
      x = masking.gather(patches.reshape(len(ids), -1, p), ids)
      table = table[ids % n]
    layer = nn.Dense(
      self.size.width, dtype=x.dtype, kernel_init=XAVIER, name=f"embed_{m}"
    )
    shape = (*x.shape[:2], self.size.width)
    x = layer(x.reshape(-1, p)).reshape(shape) + table.astype(x.dtype)
    return x + x if self.double else x

  def blocks(
    self, name: str, depth: int, parts: tuple[Part, ...], *, norm: bool
  ) -> SiamStack:
    """A stack of the encoder's width."""
    size = self.size
    return SiamStack(
      depth,
      parts,
      size.heads,
      size.mlp,
      self.eps,
      norm=norm,
      name=name,
      **self.stack,
    )
