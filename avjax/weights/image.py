"""How weights of an image model start an audiovisual one.

MAE and ViT weights are brought to one form, an "image tree":

  embed/{kernel [h w 3 d], bias}; positions [n d] in raster order; cls [d],
  cls_position [d]; encoder/block_00 …, encoder/norm; of MAE's decoder
  decoder_project, mask_token [d], decoder_positions [n d], decoder/block_00 …,
  decoder/norm, head/{kernel [d h*w*3], bias}; anything else under unused/.

`start` fills the parameters of any of our methods from it:

- Blocks: both modalities start from the same ones. A modality's block is that
  of the same depth on its way through the model, so that CAV-MAE's joint block
  is the last one. Each set of LayerNorms of a joint block is the block's.
- The LayerNorms that tokens meet last start from the image's last one;
  LayerNorms inside an encoder are left out (see `transfer.av_encoder`).
- Video kernel: that of the image; for tubelets of t frames frame t//2 gets it
  and the others 0 (ViViT's "central frame", MBT's default, so that a still
  clip gives the image's activations).
- Audio kernel: the sum over the colours (CAV-MAE's public rule). A
  spectrogram thrice (`model.audio_channels=3`, MBT) takes all three: the same
  activations. Rows of the image are mel bins in CAV-MAE, time in the others.
- Learned positions: the image's, by bilinear interpolation with the corners
  kept where the grid differs (public MBT), the same for every tubelet in time.
  CAV-MAE's images go by `transfer.picture`, its audio tables stay sine and
  cosine. A learned bottleneck beside
  learned positions starts from a small grid of them, the CLS of the model's
  first modality from the image's (public MBT).
- AVSiam (§3): the audio kernel is the mean over the colours, the multimodal
  layers start from the last blocks, the decoder from nothing. Learned positions
  of sound, of which the paper says nothing, are the image's on a grid of mel
  rows and time columns. A second encoder starts as the first one.
- CAV-MAE's decoder starts from MAE's; the audio head from its first outputs,
  which is what the public script does. Decoders of AV-MAE are smaller and stay
  as they are.
"""

import functools
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from avjax import trees
from avjax.errors import InputError
from avjax.methods.base import Loaded, Params
from avjax.weights import transfer

METHOD = "image"  # `config.method` of a source that is an image model
CONFIG = {"method": METHOD, "model": {}}

AVSIAM = "avsiam"  # beginning of its methods' names
_MODALITIES = ("video", "audio")
_LAST_NORMS = re.compile(r"((encoder|encoder_joint)/)?norm(_audio|_video)?")
_DECODER = re.compile(
  r"(decoder_project|mask_token|decoder|head_\w+|decoder_positions_video)(/|$)"
)
Rename = Callable[[str], Iterator[str]]


def split_positions(table: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
  """A table [1 n d] -> patches' rows [n' d] and the CLS's row, if it has one.

  Raises:
    InputError: the rows are neither those of a square grid nor one more.
  """
  rows = table.reshape(-1, table.shape[-1])
  if math.isqrt(len(rows)) ** 2 == len(rows):
    return rows, None
  if math.isqrt(len(rows) - 1) ** 2 == len(rows) - 1:
    return rows[1:], rows[0]
  raise InputError(f"{len(rows)} positions are no square grid, nor one and CLS")


def resize_grid(table: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
  """Rows of a square grid [n d] at another grid's places [n' d].

  Bilinear; the corners stay what they are.
  """
  side, d = math.isqrt(len(table)), table.shape[-1]
  if grid == (side, side):
    return table
  x = table.reshape(side, side, d).astype(np.float64)
  for axis, size in enumerate(grid):
    place = np.linspace(0, side - 1, size)
    low = np.minimum(place.astype(int), max(side - 2, 0))
    high = np.minimum(low + 1, side - 1)
    share = (place - low).reshape([-1 if a == axis else 1 for a in range(3)])
    x = x.take(low, axis) * (1 - share) + x.take(high, axis) * share
  return x.reshape(-1, d).astype(table.dtype)


def start(params: Params, source: Params, config: Any) -> Loaded:
  """A model's initial parameters with those of an image model in place.

  Args:
    params: of the model, under the house's names.
    source: an image tree, or {'audio': …, 'video': …} of two.
    config: the model's; its patches and the size of its inputs count.

  Raises:
    InputError: the image model has another number of blocks, another width
      or other patches; names both.
  """
  two = set(source) == set(_MODALITIES)
  names = [m for m in _MODALITIES if f"embed_{m}" in params]
  for m in names:
    tree = source[m] if two else source
    found = len(_blocks(tree)), tree["embed"]["bias"].shape[0]
    width = params[f"embed_{m}"]["bias"].shape[0]
    wanted = len(transfer.layers(params, m)), width
    if found != wanted:
      raise InputError(
        f"the image model has {found[0]} blocks of width {found[1]}, the "
        f"model {wanted[0]} of width {wanted[1]} for {m}"
      )
  cls = {m: None for m in names}
  if any(f"cls_{m}" in params for m in names):
    cls = {m: (source[m] if two else source).get("cls_position") for m in names}
  reshape = {}
  for path in trees.flatten(params):
    m = next((m for m in names if path.endswith(m)), names[0])
    change = _change(path, config)
    if config.get("method", "").startswith(AVSIAM):
      change = _siam_change(path, config) or change
    if path.startswith(("positions_", "bottleneck")):
      change = _behind(cls[m], change)
    if change:
      reshape[path] = change
  return transfer.fill(
    params,
    source,
    _siam_candidates(params, two)
    if config.get("method", "").startswith(AVSIAM)
    else _candidates(params, names, two),
    reshape=reshape,
    optional=("positions_", "bottleneck", "decoder_positions_"),
  )


def _blocks(tree: Params) -> list[str]:
  return [name for name in tree.get("encoder", {}) if name.startswith("block_")]


def _candidates(params: Params, names: list[str], two: bool) -> Rename:
  """Target path -> where the image tree has it."""
  layers = {m: transfer.layers(params, m) for m in names}
  whole_decoder = "decoder_project" in params  # CAV-MAE's; AV-MAE's is smaller
  learned = any(f"positions_{m}" in params for m in names)

  def candidates(path: str) -> Iterator[str]:
    stack, _, rest = path.partition("/")
    m = next((m for m in names if stack.endswith(m)), names[0])
    prefix = f"{m}/" if two else ""
    own = f"{stack}/{rest.split('/')[0]}"
    for each in (m, *names):
      if own in layers[each]:
        block, leaf = f"block_{layers[each].index(own):02d}", rest[9:]
        leaf = re.sub(r"^(norm[12])_(audio|video)", r"\1", leaf)
        yield f"{f'{each}/' if two else ''}encoder/{block}/{leaf}"
        return
    root, _, leaf = path.rpartition("/")
    if stack.startswith("embed_"):
      yield f"{prefix}embed/{rest}"
    elif _LAST_NORMS.fullmatch(root) or (
      root == f"encoder_{m}/norm" and "encoder_joint" not in params
    ):
      last = next((n for n in names if root.endswith(n)), names[0])
      yield f"{f'{last}/' if two else ''}encoder/norm/{leaf}"
    elif stack == f"positions_{m}" and not (whole_decoder and m == "audio"):
      yield f"{prefix}positions"
    elif (stack == "bottleneck" and learned) or stack == f"cls_{names[0]}":
      yield f"{prefix}{'positions' if stack == 'bottleneck' else 'cls'}"
    elif whole_decoder and _DECODER.match(path):
      bare = stack.removesuffix("_video").removesuffix("_audio")
      yield "/".join(filter(None, (f"{prefix}{bare}", rest)))

  return candidates


def _siam_candidates(params: Params, two: bool) -> Rename:
  """`_candidates` of AVSiam's own stacks and what all models have."""
  names = [m for m in _MODALITIES if f"embed_{m}" in params]
  usual = _candidates(
    {k: x for k, x in params.items() if k != "decoder_project"}, names, two
  )
  depth = len(transfer.layers(params, names[0]))
  more = len(_blocks({"encoder": params.get("multimodal", {})}))

  def candidates(path: str) -> Iterator[str]:
    stack, _, rest = path.partition("/")
    if stack not in ("multimodal", "encoder_mae_audio"):
      yield from usual(path)
      return
    m = "audio" if stack == "encoder_mae_audio" else "video"
    prefix = f"{m}/" if two else ""
    if stack == "multimodal":
      block = int(rest[6:8]) + depth - more
      rest = f"block_{block:02d}{rest[8:]}"
    yield f"{prefix}encoder/{rest}"

  return candidates


# --- Shapes ------------------------------------------------------------------


def _change(path: str, config: Any) -> transfer.Reshape | None:
  """How the image's array becomes the one at `path`, where shapes differ."""
  model, data = config.model, config.data
  if path in ("embed_video/kernel", "embed_audio/kernel"):
    return _tubelets if path.startswith("embed_video") else _channels
  if path.startswith("head_audio/"):
    return _first_outputs
  if path == "bottleneck":
    return _bottleneck
  if path == "positions_audio":
    step = model.patch_audio[1]
    return lambda x, shape: _tiled(x, shape, data.fbank.num_mels // step, 1)
  if path == "positions_video" or path == "decoder_positions_video":
    if model.patch_video[0] == 1:
      return transfer.picture
    side = data.video.size // model.patch_video[-1]
    return lambda x, shape: _tiled(x, shape, side, side)
  return None


def _siam_change(path: str, config: Any) -> transfer.Reshape | None:
  """`_change` where AVSiam has its own way."""
  if path == "positions_audio":
    rows = config.data.fbank.num_mels // config.model.patch_audio[0]
    return functools.partial(_grid, rows=rows)
  return _mean_channels if path == "embed_audio/kernel" else None


def _mean_channels(kernel, shape):
  """[h w 3 d] -> [h*w d], the mean over the colours."""
  rows, d = math.prod(kernel.shape[:2]), kernel.shape[3]
  if tuple(shape) != (rows, d):
    return None
  return kernel.mean(2).reshape(rows, d), "3 -> 1 channels, averaged"


def _grid(table, shape, *, rows: int):
  """Positions of an image at a grid of mel rows and time columns."""
  n, d = shape
  if d != table.shape[-1] or n % rows:
    return None
  grid, side = (rows, n // rows), math.isqrt(len(table))
  return resize_grid(table, grid), f"{side}x{side} -> {grid[0]}x{grid[1]}"


def _tubelets(kernel, shape):
  """[h w 3 d] -> [t*h*w*3 d]: the image's at frame t//2, 0 elsewhere."""
  pixels, d = math.prod(kernel.shape[:3]), kernel.shape[3]
  frames, rest = divmod(shape[0], pixels)
  if rest or not frames or d != shape[1]:
    return None
  inflated = np.zeros((frames, pixels, d), kernel.dtype)
  inflated[frames // 2] = kernel.reshape(pixels, d)
  words = f"inflated to {frames} frames: frame {frames // 2} has it, 0 else"
  return inflated.reshape(shape), words if frames > 1 else ""


def _channels(kernel, shape):
  """[h w 3 d] -> [h*w d], summed over colours; or [h*w*3 d] as it is."""
  rows, d = math.prod(kernel.shape[:2]), kernel.shape[3]
  if tuple(shape) == (rows, d):
    return kernel.sum(2).reshape(rows, d), "3 -> 1 channels, summed"
  if tuple(shape) == (rows * 3, d):
    return kernel.reshape(shape), ""
  return None


def _behind(row, change):
  """`change` for all rows but the first, which is `row`; None = no such."""
  if row is None:
    return change

  def changed(table, shape):
    rest = change(table, (shape[0] - 1, *shape[1:]))
    return rest and (np.concatenate([row[None], rest[0]]), f"CLS, {rest[1]}")

  return changed


def _first_outputs(value, shape):
  """[… k] -> its first outputs."""
  if value.shape[:-1] != tuple(shape[:-1]) or value.shape[-1] < shape[-1]:
    return None
  words = f"the first {shape[-1]} of {value.shape[-1]} outputs"
  return value[..., : shape[-1]], words


def _tiled(table, shape, columns: int, rows: int):
  """Positions for a model's grid, without a row for the CLS.

  Args:
    table: of the image's patches [n d].
    shape: (n', d) of the model's.
    columns: patches along the grid's last axis.
    rows: patches along the axis before it that tubelets repeat; 1 = all that
      is left, as of a spectrogram.
  """
  n, d = shape
  if d != table.shape[-1] or n % (columns * rows):
    return None
  grid = (rows, columns) if rows > 1 else (n // columns, columns)
  one = resize_grid(table, grid)
  side, times = math.isqrt(len(table)), n // len(one)
  words = f"{side}x{side} -> {grid[0]}x{grid[1]}"
  return np.tile(one, (times, 1)), f"{words}, {times} times"


def _bottleneck(table, shape):
  """The image's positions at a small grid, as square as can be."""
  rows = max(math.isqrt(shape[0]), 1)
  if shape[0] % rows or shape[1] != table.shape[1]:
    return None
  grid = (rows, shape[0] // rows)
  return resize_grid(table, grid), f"positions at a grid {grid[0]}x{grid[1]}"


def describe(tree: Mapping[str, Any]) -> str:
  """'12 blocks of width 768 with a decoder of 8'."""
  kernel = tree.get("embed", {}).get("kernel")
  width = f" of width {kernel.shape[-1]}" if kernel is not None else ""
  decoder = [n for n in tree.get("decoder", {}) if n.startswith("block_")]
  more = f" with a decoder of {len(decoder)}" if decoder else ""
  return f"{len(_blocks(tree))} blocks{width}{more}"
