"""AVSiam's multimodal layers and decoder (arXiv:2403.19638, §3.1, eq. 2)."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from avjax.nn import av_encoder, masking, sizes
from avjax.nn.cav_encoder import Tokens
from avjax.nn.positions import sincos_2d
from avjax.nn.siam_encoder import Masks, SiamEncoder, beside
from avjax.nn.transformer import NORMAL, Transformer

MULTIMODAL = "multimodal"  # the name of these layers

Rows = Mapping[str, Float[Array, "g _ d"]]  # by modality, of blocks
Places = Mapping[str, Int[Array, "g _"]]  # by modality, of tokens in a block


class SiamAutoencoder(SiamEncoder):
  """Encoder, multimodal layers, decoder and heads.

  Attributes:
    decoder_size: of the decoder.
    multimodal_depth: number of multimodal layers.
    stop_gradient: before the multimodal layers.
    zeros: decoder positions and its tokens start at zero (public code).
  """

  decoder_size: sizes.Size | None = None
  multimodal_depth: int = 2
  stop_gradient: bool = True
  zeros: bool = False

  @nn.compact
  def __call__(
    self, patches: Tokens, kept: Masks, decode: bool = True
  ) -> dict[str, Any]:
    """What a pass gives.

    Args:
      patches: raw patches [b n p] by modality.
      kept: tokens that are not masked out.
      decode: False ends after the encoder.

    Returns:
      By modality: 'pooled' mean over the encoder's tokens [b d]; 'multimodal'
      tokens [g _ d] in the order of the sound's slots; 'prediction' [b n p].
    """
    encoded = self.encode(patches, kept)
    out = {"pooled": {m: kept[m].pool(x) for m, x in encoded.items()}}
    if not decode:
      return out
    if self.stop_gradient:
      encoded = jax.lax.stop_gradient(encoded)
    out["multimodal"], ids, known = self.together(encoded, kept)
    decoded = self.decode(out["multimodal"], ids, known, patches)
    out["prediction"] = {
      m: av_encoder.dense(x, patches[m].shape[2], f"head_{m}")
      for m, x in decoded.items()
    }
    return out

  def together(
    self, encoded: Rows, kept: Masks
  ) -> tuple[Rows, Places, Bool[Array, "g _"]]:
    """MM(F_a, F_v): every example's sound and picture see each other.

    Returns:
      Tokens by modality in the order of the sound's slots; their places in the
      block; which of the video's are no padding.
    """
    audio, video = kept["audio"], kept["video"]
    place, counts = beside(audio, video)
    longest = max(video.kept)
    x = encoded["video"]
    if len(video.kept) > 1:
      x = jnp.take_along_axis(x, place[:, :, None], axis=1)
    x = alternate(encoded["audio"], x, audio.kept, longest)
    parts = (("", tuple(k + longest for k in audio.kept)),)
    mix = self.blocks(MULTIMODAL, self.multimodal_depth, parts, norm=False)
    padded = len(set(video.kept)) > 1
    x = mix(x, counts + jnp.asarray(audio.kept) if padded else None)
    tokens = apart(x, audio.kept, longest)
    ids = {"audio": audio.ids()}
    ids["video"] = video.padded(audio.example).reshape(place.shape)
    known = jnp.arange(longest) < counts[:, :, None]
    return tokens, ids, known.reshape(place.shape)

  def decode(
    self,
    tokens: Rows,
    ids: Places,
    known: Bool[Array, "g _"],
    patches: Tokens,
  ) -> Tokens:
    """One decoder over both: visible and mask tokens in their places."""
    d, whole = self.decoder_size.width, []
    start = nn.initializers.zeros if self.zeros else NORMAL
    blank = self.param("mask_token", start, (d,))
    both = jnp.concatenate([tokens[m] for m in patches], axis=1)
    both = av_encoder.dense(both, d, "decoder_project")
    parts = jnp.split(both, [tokens["audio"].shape[1]], axis=1)
    for (m, raw), x in zip(patches.items(), parts, strict=True):
      b, n, _ = raw.shape
      if m == "video":
        x = jnp.where(known[:, :, None], x, blank.astype(x.dtype))
      x = masking.unshuffle(x, ids[m], blank, b // len(x) * n)
      table = self.param(f"decoder_positions_{m}", self.places(m), (n, d))
      token = self.param(f"decoder_modality_token_{m}", start, (d,))
      whole.append(x.reshape(b, n, d) + (table + token).astype(x.dtype))
    size = self.decoder_size
    stack = Transformer(
      size.depth,
      size.heads,
      size.mlp,
      eps=self.eps,
      gelu="erf",
      name="decoder",
      **self.stack,
    )
    x = stack(jnp.concatenate(whole, axis=1))
    split = jnp.split(x, [whole[0].shape[1]], axis=1)
    return dict(zip(patches, split, strict=True))

  def places(self, m: str) -> Any:
    """Initial values of a decoder's positions: MAE's, or the public zeros."""
    if self.zeros:
      return nn.initializers.zeros
    return lambda _, shape: jnp.asarray(sincos_2d(self.grids[m], shape[1]))


def alternate(
  audio: Float[Array, "g _ d"],
  video: Float[Array, "g _ d"],
  kept: tuple[int, ...],
  longest: int,
) -> Float[Array, "g _ d"]:
  """Sound of slot 0, its video, sound of slot 1, and so on."""
  pairs, start = [], 0
  for r, k in enumerate(kept):
    pairs += [audio[:, start : start + k]]
    pairs += [video[:, r * longest : (r + 1) * longest]]
    start += k
  return jnp.concatenate(pairs, axis=1)


def apart(
  x: Float[Array, "g _ d"], kept: tuple[int, ...], longest: int
) -> dict[str, Float[Array, "g _ d"]]:
  """The inverse of `alternate`."""
  found, start = {"audio": [], "video": []}, 0
  for k in kept:
    for m, size in (("audio", k), ("video", longest)):
      found[m].append(x[:, start : start + size])
      start += size
  return {m: jnp.concatenate(parts, axis=1) for m, parts in found.items()}
