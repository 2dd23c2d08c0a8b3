"""Frames and spectrograms cut into patches, and put together again.

A patch becomes a token by one matrix product, which equals a convolution whose
stride is its kernel. Patches are cut first, so that masking can leave out raw
patches before they are embedded.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, Shaped

from avjax.errors import InputError


def video_grid(
  shape: Sequence[int], patch: Sequence[int]
) -> tuple[int, int, int]:
  """Number of tubelets along t, h and w.

  Args:
    shape: of the frames, [b t h w 3].
    patch: (pt, ph, pw) of a tubelet.

  Raises:
    InputError: the frames are smaller than one tubelet.
  """
  grid = tuple(n // p for n, p in zip(shape[1:4], patch, strict=True))
  if 0 in grid:
    raise InputError(
      f"frames of {tuple(shape[1:4])} (t, h, w) hold no patch of {tuple(patch)}"
    )
  return grid


def audio_grid(shape: Sequence[int], patch: Sequence[int]) -> tuple[int, int]:
  """Number of patches along t and f of a spectrogram [b t f].

  Raises:
    InputError: the spectrogram is smaller than one patch.
  """
  grid = tuple(n // p for n, p in zip(shape[1:3], patch, strict=True))
  if 0 in grid:
    raise InputError(
      f"fbank of {tuple(shape[1:3])} (t, f) holds no patch of {tuple(patch)}"
    )
  return grid


def patchify_video(
  x: Float[Array, "b t h w 3"], patch: Sequence[int]
) -> Float[Array, "b n p"]:
  """Tubelets in (t, h, w) raster order, their pixels as (pt, ph, pw, c).

  Frames, rows and columns that do not fill a tubelet are left out.
  """
  gt, gh, gw = video_grid(x.shape, patch)
  pt, ph, pw = patch
  x = x[:, : gt * pt, : gh * ph, : gw * pw]
  return rearrange(
    x,
    "b (gt pt) (gh ph) (gw pw) c -> b (gt gh gw) (pt ph pw c)",
    pt=pt,
    ph=ph,
    pw=pw,
  )


def patchify_audio(
  x: Float[Array, "b t f"], patch: Sequence[int]
) -> Float[Array, "b n p"]:
  """Patches in (time, mel) raster order, i.e. time-major; bins as (pt, pf).

  Frames that do not fill a patch are left out: 1000 frames give 62 rows of 16.
  """
  gt, gf = audio_grid(x.shape, patch)
  pt, pf = patch
  x = x[:, : gt * pt, : gf * pf]
  return rearrange(x, "b (gt pt) (gf pf) -> b (gt gf) (pt pf)", pt=pt, pf=pf)


def unpatchify_video(
  x: Shaped[Array, "b n p"], grid: Sequence[int], patch: Sequence[int]
) -> Shaped[Array, "b t h w 3"]:
  """The inverse of `patchify_video` for frames of `grid` tubelets."""
  gt, gh, gw = grid
  pt, ph, pw = patch
  return rearrange(
    x,
    "b (gt gh gw) (pt ph pw c) -> b (gt pt) (gh ph) (gw pw) c",
    gt=gt,
    gh=gh,
    gw=gw,
    pt=pt,
    ph=ph,
    pw=pw,
  )


def unpatchify_audio(
  x: Shaped[Array, "b n p"], grid: Sequence[int], patch: Sequence[int]
) -> Shaped[Array, "b t f"]:
  """The inverse of `patchify_audio` for a spectrogram of `grid` patches."""
  (gt, gf), (pt, pf) = grid, patch
  return rearrange(
    x,
    "b (gt gf) (pt pf) -> b (gt pt) (gf pf)",
    gt=gt,
    gf=gf,
    pt=pt,
    pf=pf,
  )


def paste(
  x: Shaped[Array, "b n p"],
  canvas: Shaped[Array, "b *size"],
  patch: Sequence[int],
) -> Shaped[Array, "b *size"]:
  """Patches laid over frames or a spectrogram; what they left out stays."""
  if len(patch) == 3:
    image = unpatchify_video(x, video_grid(canvas.shape, patch), patch)
  else:
    image = unpatchify_audio(x, audio_grid(canvas.shape, patch), patch)
  return canvas.at[tuple(slice(size) for size in image.shape)].set(image)


def standardise(
  x: Float[Array, "b n p"], m: str, kind: str, *, ddof: int = 0
) -> tuple[Float[Array, "b n p"], Any, Any]:
  """Patches of mean 0 and variance 1 (AV-MAE's targets), and what undoes it.

  Args:
    x: patches.
    m: 'video' or 'audio'.
    kind: 'patch', over a patch; 'channel', each colour of a tubelet by itself
      and audio as it is; 'none'. The variance has 1e-6 added inside the root.
    ddof: 0 = the population's variance (AV-MAE), 1 = the unbiased one
      (CAV-MAE).

  Returns:
    (x - mean) / deviation, mean, deviation.
  """
  if kind == "none" or (kind == "channel" and m == "audio"):
    return x, 0.0, 1.0
  parts = x.reshape(*x.shape[:2], -1, 3 if kind == "channel" else 1)
  mean = parts.mean(2, keepdims=True)
  deviation = jnp.sqrt(parts.var(2, keepdims=True, ddof=ddof) + 1e-6)
  mean, deviation = (
    jnp.broadcast_to(s, parts.shape).reshape(x.shape) for s in (mean, deviation)
  )
  return (x - mean) / deviation, mean, deviation
