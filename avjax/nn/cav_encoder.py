"""The encoder of CAV-MAE (arXiv:2210.07839) and of what derives from it.

A stack of blocks per modality, then one joint block that every token passes
with one of three sets of LayerNorms: one for audio and video together, one for
audio alone, one for video alone. The rest of that block is shared. Facts that
the papers leave out follow the public code:

- LayerNorm epsilon 1e-5, exact (erf) GELU, no CLS token;
- audio tokens are frequency-major, token f*T + t; a patch's pixels are (mel,
  time), those of an image (row, column, channel);
- positions are a 2-D sine table plus a learned vector per modality;
- audio comes before video wherever both are concatenated.

Parameters: embed_{m}, positions_{m}, modality_token_{m} and encoder_{m} for m
in audio and video; encoder_joint/block_00 and encoder_joint/norm*.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from avjax.errors import InputError, lookup
from avjax.nn import masking, sizes, tokenizers
from avjax.nn.positions import sincos_2d
from avjax.nn.transformer import (
  MLP,
  NORMAL,
  REMAT,
  XAVIER,
  SelfAttention,
  Transformer,
)

# In the order of concatenation, each with its key in the inputs.
INPUTS = {"audio": "fbank", "video": "frames"}
MODALITIES = {"av": ("audio", "video"), "a": ("audio",), "v": ("video",)}
EPS = 1e-5

Tokens = Mapping[str, Float[Array, "b _ _"]]  # by modality
Ids = Mapping[str, Int[Array, "b _"]]  # kept tokens by modality
Grids = Mapping[str, tuple[int, int]]  # rows and columns of the patches

# A pass through the joint block: the ending of its LayerNorms' names, and
# whose tokens go through it together.
Pass = tuple[str, tuple[str, ...]]
TOGETHER: Pass = ("", ("audio", "video"))
ALONE: dict[str, Pass] = {m: (f"_{m}", (m,)) for m in INPUTS}


# --- Patches -----------------------------------------------------------------


def grids(inputs: Mapping[str, Any], model: Any) -> dict[str, tuple[int, int]]:
  """(mel, time) and (row, column) patches of the modalities in the inputs.

  Args:
    inputs: `fbank` [b t f] and `frames` [b 1 h w 3].
    model: `config.model` with `patch_audio` (mel, time), `patch_video`
      (1, row, column).

  Raises:
    InputError: less than one patch, or more than one frame.
  """
  found = {}
  if "fbank" in inputs:
    shape = inputs["fbank"].shape
    shape = (shape[0], shape[2], shape[1])
    found["audio"] = tokenizers.audio_grid(shape, model["patch_audio"])
  if "frames" in inputs:
    shape = inputs["frames"].shape
    if shape[1] != 1:
      raise InputError(
        f"this model sees 1 frame, but frames have {shape[1]}; set "
        "data.video.num_frames=1"
      )
    found["video"] = tokenizers.video_grid(shape, model["patch_video"])[1:]
  return found


def patches(
  inputs: Mapping[str, Any], model: Any
) -> dict[str, Float[Array, "b _ _"]]:
  """Raw patches [b n p] of the modalities in the inputs, in raster order."""
  cut = {}
  if "fbank" in inputs:
    # Mel rows and time columns, as CAV-MAE draws a spectrogram.
    image = inputs["fbank"].swapaxes(1, 2)
    cut["audio"] = tokenizers.patchify_audio(image, model["patch_audio"])
  if "frames" in inputs:
    cut["video"] = tokenizers.patchify_video(
      inputs["frames"], model["patch_video"]
    )
  return cut


def paste(m: str, x: Array, canvas: Array, model: Any) -> Array:
  """Patches of modality m laid over its input; the inverse of `patches`."""
  if m == "video":
    return tokenizers.paste(x, canvas, model["patch_video"])
  image = tokenizers.paste(x, canvas.swapaxes(1, 2), model["patch_audio"])
  return image.swapaxes(1, 2)


def standardise(m: str, patches: Float[Array, "b n p"], model: Any) -> Any:
  """Targets of reconstruction, and the mean and deviation that undo them."""
  kind = "patch" if model["norm_pix"] else "none"
  return tokenizers.standardise(patches, m, kind, ddof=1)


def pictures(
  inputs: Mapping[str, Any],
  prediction: Tokens,
  removed: Mapping[str, Bool[Array, "b _"]],
  model: Any,
) -> dict[str, Array]:
  """What a model made of masked inputs, by `Method.reconstruct`'s names.

  Args:
    inputs: `fbank` and `frames`.
    prediction: patches by modality, in the scale of the targets.
    removed: true where a patch was masked out.
    model: `config.model`.

  Returns:
    '<m>/input', 'joint/<m>/output' and 'joint/<m>/mask' of the input's shape,
    the targets' statistics undone. What fills no patch is shown as it is.
  """
  result = {}
  for m, x in patches(inputs, model).items():
    _, mean, deviation = standardise(m, x, model)
    image = prediction[m].astype(jnp.float32) * deviation + mean
    mask = jnp.broadcast_to(removed[m][..., None], x.shape)
    canvas = inputs[INPUTS[m]]
    none = jnp.zeros(canvas.shape, bool)
    result[f"{m}/input"] = canvas
    result[f"joint/{m}/output"] = paste(m, image, canvas, model)
    result[f"joint/{m}/mask"] = paste(m, mask, none, model)
  return result


def num_kept(m: str, n: int, ratio: float, key: str) -> int:
  """How many of n tokens stay visible: `int(n (1 - ratio))` (public code).

  Raises:
    InputError: none; names the config's key.
  """
  kept = int(n * (1 - ratio))
  if not 0 < kept <= n:
    raise InputError(
      f"{key}{ratio} keeps {kept} of the {n} patches of {m}; at least 1 has "
      "to stay"
    )
  return kept


# --- Joint block -------------------------------------------------------------


class JointBlock(nn.Module):
  """A pre-norm block that groups of tokens pass one after the other.

  Weights are shared but for the LayerNorms. One product for all groups is no
  faster on a CPU than one for each (measured at B: 2 % slower), because groups
  have to be put together and cut apart between the products.

  Attributes:
    sets: per group, the ending of its LayerNorms' names.
    heads, mlp, attention: of `transformer.Block`.
  """

  sets: tuple[str, ...]
  heads: int
  mlp: int
  attention: str = "auto"

  @nn.compact
  def __call__(
    self, groups: Sequence[Float[Array, "b _ d"]]
  ) -> list[Float[Array, "b _ d"]]:
    """Groups of tokens, one per entry of `sets`; they do not see each other."""
    attention = SelfAttention(self.heads, self.attention, name="attention")
    mlp = MLP(self.mlp, "erf", name="mlp")
    passed = []
    for group, ending in zip(groups, self.sets, strict=True):
      b, _, d = group.shape
      x = group.reshape(-1, d)
      x = x + attention(norm("norm1" + ending, x)(x), b)
      x = x + mlp(norm("norm2" + ending, x)(x))
      passed.append(x.reshape(group.shape))
    return passed


class Joint(nn.Module):
  """The joint block and the last LayerNorm of every group.

  Attributes:
    sets, heads, mlp, attention: of `JointBlock`.
    remat: name in `transformer.REMAT`.
  """

  sets: tuple[str, ...]
  heads: int
  mlp: int
  attention: str = "auto"
  remat: str = "none"

  @nn.compact
  def __call__(
    self, groups: Sequence[Float[Array, "b _ d"]]
  ) -> list[Float[Array, "b _ d"]]:
    """Groups of tokens, one per entry of `sets`."""
    block, policy = JointBlock, lookup(REMAT, self.remat, "remat policy")
    if self.remat != "none":
      block = nn.remat(JointBlock, policy=policy)
    options = (self.sets, self.heads, self.mlp, self.attention)
    groups = block(*options, name="block_00")(groups)
    ended = zip(groups, self.sets, strict=True)
    return [norm("norm" + ending, x)(x) for x, ending in ended]


def norm(name: str, x: Float[Array, "*b d"]) -> nn.LayerNorm:
  """A LayerNorm of this family within a module."""
  return nn.LayerNorm(EPS, dtype=x.dtype, name=name)


# --- Encoder -----------------------------------------------------------------


def patch_bias(fan_in: int) -> Any:
  """PyTorch's default for the bias of a convolution: U(±1/sqrt(fan_in))."""

  def init(key, shape, dtype=jnp.float32):
    bound = fan_in**-0.5
    return jax.random.uniform(key, shape, dtype, -bound, bound)

  return init


class CAVEncoder(nn.Module):
  """Tokens, modality stacks and joint block.

  Attributes:
    size: of the encoder; `size.depth - 1` blocks per modality and one joint.
    grids: patches of the modalities, whose positions are known.
    fixed_positions: no gradient for the position tables (pretraining).
    stack: `attention`, `remat`, `scan` of the transformers.
  """

  size: sizes.Size
  grids: Grids
  fixed_positions: bool
  stack: Mapping[str, Any]

  @nn.compact
  def __call__(
    self, patches: Tokens, passes: Sequence[Pass], ids: Ids | None = None
  ) -> list[Float[Array, "b _ d"]]:
    """Encodes, then passes the joint block in one go.

    Args:
      patches: raw patches by modality.
      passes: through the joint block, each with a set of its own.
      ids: kept tokens; None keeps all.

    Returns:
      Tokens after the last LayerNorm, per pass.
    """
    return self.encode(patches, passes, ids)

  def encode(self, patches, passes, ids):
    """See `__call__`; subclasses go on from here."""
    ids = ids or {}
    alone = {
      m: self.branch(m, self.tokenise(m, x, ids.get(m)))
      for m, x in patches.items()
    }
    sets = tuple(ending for ending, _ in passes)
    groups = [concatenate([alone[m] for m in names]) for _, names in passes]
    options = {name: self.stack[name] for name in ("attention", "remat")}
    joint = Joint(
      sets, self.size.heads, self.size.mlp, name="encoder_joint", **options
    )
    return joint(groups)

  def tokenise(
    self,
    m: str,
    patches: Float[Array, "b n p"],
    ids: Int[Array, "b k"] | None,
  ) -> Float[Array, "b _ d"]:
    """Embedded patches with positions; raw patches are masked, not tokens."""
    x = patches if ids is None else masking.gather(patches, ids)
    b, n, p = x.shape
    layer = nn.Dense(
      self.size.width,
      dtype=x.dtype,
      kernel_init=XAVIER,
      bias_init=patch_bias(p),
      name=f"embed_{m}",
    )
    x = layer(x.reshape(-1, p)).reshape(b, n, -1)
    table, token = self.places(m, self.size.width, "")
    table = table[None] if ids is None else table[ids]
    return x + table.astype(x.dtype) + token.astype(x.dtype)

  def places(
    self, m: str, d: int, prefix: str
  ) -> tuple[Float[Array, "n d"], Float[Array, "d"]]:
    """Position table and modality token, both of width d."""
    grid = self.grids[m]
    table = self.param(
      f"{prefix}positions_{m}", lambda _: jnp.asarray(sincos_2d(grid, d))
    )
    if self.fixed_positions:
      table = jax.lax.stop_gradient(table)
    return table, self.param(f"{prefix}modality_token_{m}", NORMAL, (d,))

  def branch(self, m: str, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
    """The blocks of one modality; no LayerNorm follows them."""
    depth = self.size.depth - 1
    return self.transformer(f"encoder_{m}", depth, self.size, norm=False)(x)

  def transformer(
    self, name: str, depth: int, size: sizes.Size, *, norm: bool
  ) -> Transformer:
    """A stack in this family's conventions."""
    return Transformer(
      depth,
      size.heads,
      size.mlp,
      eps=EPS,
      gelu="erf",
      norm=norm,
      name=name,
      **self.stack,
    )


def check_places(params: Mapping[str, Any], grids: Grids) -> None:
  """Refuses inputs of another size than the position tables are for.

  Raises:
    InputError: names the table, its rows and the patches of the inputs.
  """
  for m, (rows, columns) in grids.items():
    table = params.get(f"positions_{m}")
    if table is None:
      raise InputError(f"the parameters have no {m} branch (positions_{m})")
    if len(table) != rows * columns:
      raise InputError(
        f"positions_{m} has {len(table)} rows, but the {INPUTS[m]} make "
        f"{rows} x {columns} = {rows * columns} patches: clips must be as long "
        "and as large as in training; init_from resizes the table"
      )


def concatenate(parts: Sequence[Float[Array, "b _ d"]]) -> Array:
  """Along the tokens."""
  return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)


def first_values(params: Any) -> Any:
  """What the transformer draws otherwise, as the public code draws it.

  Query, key and value are one Xavier-uniform [d 3d] matrix, whose bound is
  sqrt(1/2) of that of three [d d]; biases of the MLP are zero.
  """

  def fix(path, x):
    name = "/".join(key.key for key in path)
    if name.endswith("qkv/kernel"):
      return x * 0.5**0.5
    return jnp.zeros_like(x) if name.endswith(("fc1/bias", "fc2/bias")) else x

  return jax.tree_util.tree_map_with_path(fix, params)
