"""ConvNeXt (arXiv:2201.03545) as torchvision has it.

A map is [b h w c], rows of a spectrogram are its mel bins. All LayerNorms are
over channels with eps 1e-6, the GELU is the exact one. Convolutions whose
stride is their size are linear layers on patches; what an odd size leaves over
is cut off. By parameter:

  embed/{kernel [4*4*c d], bias}        rows: row, column, channel
  embed_norm/{scale,bias}
  stage_1/norm, stage_1/down/{kernel [2*2*c d], bias}      not of stage_0
  stage_0/block_00/conv/{kernel [7 7 1 d], bias}           depthwise
  stage_0/block_00/{norm, mlp/fc1, mlp/fc2, layer_scale [d]}

There is no LayerNorm behind the last stage: it belongs to the classifier.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from avjax.errors import InputError, lookup
from avjax.methods.base import Params
from avjax.nn.transformer import GELU, repeat

EPS = 1e-6
PATCH, STRIDE = 4, 32  # of the stem; of all four stages
REACH = 3  # of the depthwise 7x7 kernel, to every side
# torchvision's, whose truncation at +-2 is a hundred deviations away.
INIT = nn.initializers.normal(0.02)


@dataclasses.dataclass(frozen=True)
class Size:
  """Shape of a ConvNeXt.

  Attributes:
    width: channels of the first stage; each stage doubles them.
    depths: blocks by stage.
  """

  width: int
  depths: tuple[int, ...]

  @property
  def channels(self) -> int:
    """Of the last stage."""
    return self.width * 2 ** (len(self.depths) - 1)


SIZES = {
  "Ti": Size(96, (3, 3, 9, 3)),
  "S": Size(96, (3, 3, 27, 3)),
  "B": Size(128, (3, 3, 27, 3)),
  "L": Size(192, (3, 3, 27, 3)),
}


def resolve(section: Any) -> Size:
  """The size that `section.size` names, with the section's own numbers.

  Args:
    section: with `size` and, 0 or () for the size's own, `width`, `depths`.

  Raises:
    InputError: an unknown size, or not four stages.
  """
  named = lookup(SIZES, section.size, "model size")
  depths = tuple(section.depths) or named.depths
  if len(depths) != len(named.depths):
    raise InputError(
      f"model.depths={depths} has {len(depths)} stages; ConvNeXt has "
      f"{len(named.depths)}"
    )
  return Size(section.width or named.width, depths)


def size_of(params: Params) -> Size:
  """The size of parameters under per-layer names."""
  stages = [params[name] for name in sorted(params) if "stage_" in name]
  depths = [sum(n.startswith("block_") for n in stage) for stage in stages]
  return Size(params["embed"]["bias"].shape[0], tuple(depths))


def features(
  params: Params, x: Float[Array, "b ..."]
) -> Float[Array, "b *n d"]:
  """What UAVM (§2.1, public code) takes from the last stage's map.

  Args:
    params: under per-layer names; a classifier among them is of no effect.
    x: log-mel [b t f] for a stem of one channel, or frames [b h w 3],
      normalised as for training.

  Returns:
    Of log-mel [b t//32 d], the mean over the rows of mel bins: 30 of 990
    frames, 31 of 1,000. Of frames [b d], the mean over all places.
  """
  sound = x.ndim == 3
  maps = ConvNeXt(size_of(params)).apply(
    {"params": params}, spectrogram(x) if sound else x
  )
  last = maps["stage_3"].astype(jnp.float32)
  return last.mean(1) if sound else last.mean((1, 2))


def spectrogram(fbank: Float[Array, "b t f"]) -> Float[Array, "b f t 1"]:
  """A log-mel as a map of one channel: mel bins are rows."""
  return fbank.swapaxes(1, 2)[..., None]


class ConvNeXt(nn.Module):
  """Stem and four stages.

  Attributes:
    size: channels and depths.
    scan: one compiled block for all of a stage; parameters are stacked then,
      see `avjax.nn.transformer.stack_layers`.
    remat: name in `avjax.nn.transformer.REMAT`.
  """

  size: Size
  scan: bool = False
  remat: str = "none"

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "b h w c"],
    keep: Float[Array, "l b"] | None = None,
  ) -> Mapping[str, Float[Array, "b _ _ _"]]:
    """The maps `stem` and `stage_0` … `stage_3`.

    Args:
      x: with any number of channels, which the stem's parameters are for.
      keep: factor of each block's branch by example, of `drop_path`.

    Raises:
      InputError: the map is smaller than one place of the last stage.
    """
    if min(x.shape[1:3]) < STRIDE:
      raise InputError(
        f"a map of {x.shape[1]} x {x.shape[2]} is too small for ConvNeXt: at "
        f"least {STRIDE} x {STRIDE}"
      )
    x = project(x, PATCH, self.size.width, "embed")
    x = nn.LayerNorm(EPS, dtype=x.dtype, name="embed_norm")(x)
    maps, done = {"stem": x}, 0
    for i, depth in enumerate(self.size.depths):
      rows = None if keep is None else keep[done : done + depth]
      stage = Stage(depth, i > 0, self.scan, self.remat, name=f"stage_{i}")
      x = maps[f"stage_{i}"] = stage(x, rows)
      done += depth
    return maps


class Stage(nn.Module):
  """Halves the map and doubles the channels, but for the first; then blocks."""

  depth: int
  down: bool
  scan: bool
  remat: str

  @nn.compact
  def __call__(
    self, x: Float[Array, "b h w c"], keep: Float[Array, "l b"] | None
  ) -> Float[Array, "b _ _ _"]:
    """`keep` as in `ConvNeXt`, of this stage's blocks."""
    if self.down:
      x = nn.LayerNorm(EPS, dtype=x.dtype, name="norm")(x)
      x = project(x, 2, 2 * x.shape[-1], "down")
    make = functools.partial(Block)
    return repeat(make, self.depth, x, keep, scan=self.scan, remat=self.remat)


class Block(nn.Module):
  """x += keep * layer_scale * mlp(norm(conv(x)))."""

  @nn.compact
  def __call__(
    self, x: Float[Array, "b h w c"], keep: Float[Array, "b"] | None
  ) -> Float[Array, "b h w c"]:
    """Applies the block to a map."""
    d = x.shape[-1]
    y = Depthwise(name="conv")(x).reshape(-1, d)
    y = nn.LayerNorm(EPS, dtype=x.dtype, name="norm")(y)
    y = Pointwise(name="mlp")(y).reshape(x.shape)
    scale = self.param("layer_scale", nn.initializers.constant(1e-6), (d,))
    y = y * scale.astype(x.dtype)
    if keep is not None:
      y = y * keep[:, None, None, None].astype(x.dtype)
    return x + y


class Pointwise(nn.Module):
  """fc1 to four times the channels, GELU, fc2."""

  @nn.compact
  def __call__(self, x: Float[Array, "r d"]) -> Float[Array, "r d"]:
    """Applies it to places as rows."""
    d = x.shape[-1]
    options = {"dtype": x.dtype, "kernel_init": INIT}
    x = GELU["erf"](nn.Dense(4 * d, name="fc1", **options)(x))
    return nn.Dense(d, name="fc2", **options)(x)


class Depthwise(nn.Module):
  """A 7x7 kernel for each channel; zeros around the map."""

  @nn.compact
  def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    """Keeps the size of the map."""
    side, d = 2 * REACH + 1, x.shape[-1]
    kernel = self.param("kernel", INIT, (side, side, 1, d)).astype(x.dtype)
    bias = self.param("bias", nn.initializers.zeros, (d,)).astype(x.dtype)
    # On two CPU cores sums of shifted maps take 1/12 of the convolution's
    # time forwards, and 1/8 of its time backwards.
    cpu = jax.default_backend() == "cpu"
    return (shifted if cpu else convolved)(x, kernel) + bias


def project(
  x: Float[Array, "b h w c"], side: int, width: int, name: str
) -> Float[Array, "b _ _ _"]:
  """A convolution of `side` x `side` pixels with that stride, in a module."""
  b, (h, w), c = len(x), (n // side for n in x.shape[1:3]), x.shape[-1]
  x = x[:, : h * side, : w * side].reshape(b, h, side, w, side, c)
  x = x.swapaxes(2, 3).reshape(b * h * w, side * side * c)
  dense = nn.Dense(width, dtype=x.dtype, kernel_init=INIT, name=name)
  return dense(x).reshape(b, h, w, width)


# --- Depthwise convolution ---------------------------------------------------

Map = Float[Array, "b h w c"]
Kernel = Float[Array, "s s 1 c"]


def convolved(x: Map, kernel: Kernel) -> Map:
  """By XLA's convolution: for accelerators."""
  return jax.lax.conv_general_dilated(
    x,
    kernel,
    window_strides=(1, 1),
    padding=((REACH, REACH), (REACH, REACH)),
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
    feature_group_count=x.shape[-1],
  )


@jax.custom_vjp
def shifted(x: Map, kernel: Kernel) -> Map:
  """As 49 shifted maps in one loop: for CPUs."""
  return _sum_of_shifted(x, kernel)


@jax.jit  # so that blocks of a stage are traced once
def _sum_of_shifted(x, kernel):
  (h, w), padded = x.shape[1:3], _around(x)
  side = range(2 * REACH + 1)
  return sum(
    padded[:, i : i + h, j : j + w] * kernel[i, j, 0]
    for i in side
    for j in side
  )


def _around(x):
  edge = (REACH, REACH)
  return jnp.pad(x, ((0, 0), edge, edge, (0, 0)))


def _forward(x, kernel):
  return _sum_of_shifted(x, kernel), (x, kernel)


def _backward(saved, gradient):
  x, kernel = saved
  (b, h, w, c), side = x.shape, 2 * REACH + 1
  padded = _around(x)

  def row(total, i):
    rows = jax.lax.dynamic_slice_in_dim(padded, i, side, 1)
    own = jax.lax.dynamic_slice_in_dim(gradient, i, 1, 1)
    parts = [(rows[:, :, j : j + w] * own).sum(2) for j in range(side)]
    return total + jnp.stack(parts, 2), None

  # Examples stay apart within the loop: they may lie on several devices.
  total = jnp.zeros((b, side, side, c), x.dtype)
  total, _ = jax.lax.scan(row, total, jnp.arange(h))
  return _sum_of_shifted(gradient, kernel[::-1, ::-1]), total.sum(0)[:, :, None]


shifted.defvjp(_forward, _backward)
