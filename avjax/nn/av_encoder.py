"""The audiovisual encoders of AV-MAE, arXiv:2212.05922 §3.1 and §3.2.

Pretraining and fine-tuning share them. By the authors' code, where the paper
is silent: tokens of both modalities get the same fixed sinusoid over their
flattened index, video in (t, h, w), audio in (time, mel) order, and no
modality token; concatenation is video first, then audio; in "Mid-fusion" each
modality's stack ends in a LayerNorm of its own.

Parameters: embed_{video,audio}; encoder (early, shared), or encoder_video and
encoder_audio (separate), and encoder_joint (mid).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from avjax.errors import lookup
from avjax.nn import masking, sizes, tokenizers
from avjax.nn.positions import sinusoid_1d
from avjax.nn.transformer import XAVIER, Transformer, drop_path

# In the order of concatenation, each with its key in the inputs.
INPUTS = {"video": "frames", "audio": "fbank"}
MODALITIES = {"av": ("video", "audio"), "a": ("audio",), "v": ("video",)}
KINDS = ("early", "separate", "shared", "mid")

Tokens = Mapping[str, Float[Array, "b _ _"]]  # by modality
Keep = Mapping[str, Float[Array, "_ 2 b"]]  # by pass, of `drop_path`


def patches(
  inputs: Mapping[str, Any], model: Any
) -> dict[str, Float[Array, "b _ _"]]:
  """The raw patches of every modality that the model has and the inputs hold.

  Args:
    inputs: `frames` [b t h w 3] and `fbank` [b t f].
    model: `config.model` with `modality`, `patch_video`, `patch_audio`.
  """
  cut = {
    "video": tokenizers.patchify_video,
    "audio": tokenizers.patchify_audio,
  }
  return {
    m: cut[m](inputs[INPUTS[m]], model[f"patch_{m}"])
    for m in lookup(MODALITIES, model["modality"], "model.modality")
    if INPUTS[m] in inputs
  }


def concatenate(tokens: Tokens) -> Float[Array, "b n d"]:
  """Video tokens first, then audio tokens."""
  return jnp.concatenate([tokens[m] for m in INPUTS if m in tokens], axis=1)


def split(x: Float[Array, "b n d"], like: Tokens) -> dict[str, Any]:
  """The inverse of `concatenate`, for as many tokens as `like` has."""
  parts, start = {}, 0
  for m in (m for m in INPUTS if m in like):
    parts[m] = x[:, start : start + like[m].shape[1]]
    start += like[m].shape[1]
  return parts


def dense(
  x: Float[Array, "b n p"], width: int, name: str, init: Any = XAVIER
) -> Float[Array, "b n d"]:
  """A projection of tokens, as one product of matrices of rank 2."""
  layer = nn.Dense(width, dtype=x.dtype, kernel_init=init, name=name)
  return layer(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:2], width)


class AVEncoder(nn.Module):
  """Tokenise (§3.1) and Encode (§3.2): the part that outlives pretraining.

  Attributes:
    size: of the encoder.
    kind: one of KINDS.
    fusion_layers: S of mid-fusion.
    positions: 'sinusoid_1d', 'learned_1d' or 'none'.
    modality_tokens: whether a learned vector per modality is added.
    stack: further attributes of every `Transformer`.
  """

  size: sizes.Size
  kind: str = "mid"
  fusion_layers: int = 2
  positions: str = "sinusoid_1d"
  modality_tokens: bool = False
  stack: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  @nn.compact
  def __call__(self, patches: Tokens, keep: Keep | None = None) -> Tokens:
    """Encodes all tokens of the modalities that are there, nothing masked.

    Args:
      patches: of `patches`.
      keep: of `draw_keep`; None drops no branch.

    Returns:
      Tokens by modality, in raster order, after the last LayerNorm.
    """
    tokens = {m: self.tokenise(m, x, None) for m, x in patches.items()}
    return self.encode(tokens, keep)[0]

  # --- 3.1 Background ---

  def tokenise(
    self,
    m: str,
    patches: Float[Array, "b n p"],
    ids: Int[Array, "b k"] | None,
  ) -> Float[Array, "b _ d"]:
    """u = Mask(Tokenise(x) + p); masks raw patches, before any product."""
    x = patches if ids is None else masking.gather(patches, ids)
    x = dense(x, self.size.width, f"embed_{m}", nn.linear.default_kernel_init)
    return self.locate(x, m, patches.shape[1], ids, "")

  def locate(self, x, m, n, ids, prefix):
    """Adds the positions `ids` of a table of n, and the modality's token."""
    d = x.shape[-1]
    tables = {
      "sinusoid_1d": lambda: jnp.asarray(sinusoid_1d(n, d)),
      "learned_1d": lambda: self.param(
        f"{prefix}positions_{m}", nn.initializers.normal(0.02), (n, d)
      ),
      "none": lambda: jnp.zeros((n, d)),
    }
    table = lookup(tables, self.positions, "model.positions")()
    x = x + (table[None] if ids is None else table[ids]).astype(x.dtype)
    if self.modality_tokens:
      name = f"{prefix}modality_token_{m}"
      x = x + self.param(name, nn.initializers.zeros, (d,)).astype(x.dtype)
    return x

  # --- 3.2 Audiovisual encoders ---

  def transformer(self, name: str, depth: int, size: sizes.Size) -> Transformer:
    """One stack of `depth` blocks of `size`."""
    return Transformer(depth, size.heads, size.mlp, name=name, **self.stack)

  def passes(self, names: tuple[str, ...]) -> dict[str, int]:
    """Depth of every pass through a stack, for modalities `names`."""
    if self.kind == "early":
      return {"encoder": self.size.depth}
    joint = self.fusion_layers if self.kind == "mid" else 0
    depths = {f"encoder_{m}": self.size.depth - joint for m in names}
    return {**depths, "encoder_joint": joint} if joint else depths

  def draw_keep(
    self, keys: masking.Keys, names: tuple[str, ...], rate: float
  ) -> Keep | None:
    """Stochastic depth of every pass, each with its own ramp from 0.

    A kept branch is not divided by its probability (the authors' code).
    """
    if not rate:
      return None
    return {
      name: drop_path(masking.fold_in(keys, i), depth, rate, rescale=False)
      for i, (name, depth) in enumerate(self.passes(names).items())
    }

  def encode(self, tokens: Tokens, keep: Keep | None) -> tuple[Tokens, Tokens]:
    """e = Encode(u) (fig. 2).

    Returns:
      The encoded tokens, and what entered the last stack of mid-fusion.
    """
    keep, depth = keep or {}, self.size.depth

    def joint(name, layers, tokens):
      stack = self.transformer(name, layers, self.size)
      return split(stack(concatenate(tokens), keep.get(name)), tokens)

    if self.kind == "early":
      return joint("encoder", depth, tokens), tokens
    fused = self.fusion_layers if self.kind == "mid" else 0
    shared = self.kind == "shared"
    if shared:
      stack = self.transformer("encoder", depth, self.size)
    alone = {}
    for m, x in tokens.items():
      name = f"encoder_{m}"
      if not shared:
        stack = self.transformer(name, depth - fused, self.size)
      alone[m] = stack(x, keep.get(name))
    if not fused:
      return alone, alone
    return joint("encoder_joint", fused, alone), alone
