"""How weights of an image model, or of AST, start an audiovisual one.

MAE, ViT and AST weights are brought to one form, an "image tree":

  embed/{kernel [h w c d], bias}; positions [row column d]; cls [d],
  cls_position [d]; encoder/block_00 …, encoder/norm; of MAE's decoder
  decoder_project, mask_token [d], decoder_positions [row column d],
  decoder/block_00 …, decoder/norm, head/{kernel [d h*w*3], bias}; anything else
  under unused/.

A kernel of one channel is that of a spectrogram (AST): mel bins are rows, time
is columns. `start` fills the parameters of any of our methods from the tree:

- Blocks: both modalities start from the same ones. A modality's block is that
  of the same depth on its way through the model, so that CAV-MAE's joint block
  is the last one. Each set of LayerNorms of a joint block is the block's.
- The LayerNorms that tokens meet last start from the image's last one;
  LayerNorms inside an encoder are left out (see `transfer.av_encoder`).
- Video kernel: that of the image; for tubelets of t frames frame t//2 gets it
  and the others 0 (ViViT's "central frame", MBT's default, so that a still
  clip gives the image's activations).
- Audio kernel: the sum over the colours (CAV-MAE's public rule), AVSiam's the
  mean (§3). A spectrogram thrice (`model.audio_channels=3`, MBT) takes all
  three: the same activations. Rows of the image are mel bins in MEL_FIRST, time
  in the others.
- Kernel of a spectrogram: sound takes it as it is, with its axes as the model
  has them, each colour of a picture a third of it. So a grey picture gives a
  spectrogram's activations; it is the inverse of AST's own rule, which sums the
  colours of an image model. AVSiam's paper does not say what table 6 does.
- Learned positions: the image's, by bilinear interpolation with the corners
  kept where the grid differs (public MBT), the same for every tubelet in time.
  Images of CAV-MAE and AVSiam go by `transfer.picture`. CAV-MAE's audio tables
  stay sine and cosine, except that AST's, which were learned for sound, are
  taken. A learned bottleneck beside learned positions starts from a small grid
  of them, the CLS of the model's first modality from the image's (public MBT).
- AST's positions are stretched, too. Its public code cuts the middle columns
  for shorter clips, by their number alone; but 64 columns 16 frames apart, as
  here, are as long as its 101 of 10 frames.
- AVSiam: the multimodal layers start from the last blocks, a second encoder as
  the first one, the decoder from nothing. Of the positions of sound the paper
  says nothing.
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

# Beginnings of methods' names. Spectrograms of MEL_FIRST are ordered mel first.
_CAVMAE, _AVSIAM = ("cavmae", "deteclap", "coavt"), "avsiam"
MEL_FIRST = (*_CAVMAE, _AVSIAM)
_MODALITIES = ("video", "audio")
_LAST_NORMS = re.compile(r"((encoder|encoder_joint)/)?norm(_audio|_video)?")
_DECODER = re.compile(
  r"(decoder_project|mask_token|decoder|head_\w+|decoder_positions_video)(/|$)"
)
_SOUND = ("embed_audio/kernel", "positions_audio")
Rename = Callable[[str], Iterator[str]]


def split_positions(table: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
  """A table [1 n d] -> grid [side side d] and the CLS's row, if it has one.

  Raises:
    InputError: the rows are neither those of a square grid nor one more.
  """
  rows, cls = table.reshape(-1, table.shape[-1]), None
  side = math.isqrt(len(rows))
  if side**2 == len(rows) - 1:
    rows, cls = rows[1:], rows[0]
  if side**2 != len(rows):
    raise InputError(
      f"{len(rows)} positions are no square grid, nor one and CLS"
    )
  return rows.reshape(side, side, -1), cls


def resize_grid(table: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
  """A grid [row column d] at another one's places [n d].

  Bilinear; the corners stay what they are.
  """
  *sides, d = table.shape
  if grid == tuple(sides):
    return table.reshape(-1, d)
  x = table.astype(np.float64)
  for axis, (side, size) in enumerate(zip(sides, grid, strict=True)):
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
    config: the model's; its method, its patches and the size of its inputs
      count.

  Raises:
    InputError: the image model has another number of blocks, another width
      or other patches; names both.
  """
  two = set(source) == set(_MODALITIES)
  names = [m for m in _MODALITIES if f"embed_{m}" in params]
  sources = {m: source[m] if two else source for m in names}
  for m, tree in sources.items():
    _check(params, tree, m)
  return transfer.fill(
    params,
    source,
    _candidates(params, sources, two, config),
    reshape=_changes(params, sources, config),
    optional=("positions_", "bottleneck", "decoder_positions_"),
  )


def _of_sound(tree: Params) -> bool:
  return tree["embed"]["kernel"].shape[2] == 1


def _learned(tree: Params, m: str, config: Any) -> bool:
  """Whether the model's positions are to start from the tree's."""
  sines = m == "audio" and config.method.startswith(_CAVMAE)
  return _of_sound(tree) or not sines


def _check(params: Params, tree: Params, m: str) -> None:
  found = len(_blocks(tree)), tree["embed"]["bias"].shape[0]
  width = params[f"embed_{m}"]["bias"].shape[0]
  wanted = len(transfer.layers(params, m)), width
  if found != wanted:
    raise InputError(
      f"the image model has {found[0]} blocks of width {found[1]}, the "
      f"model {wanted[0]} of width {wanted[1]} for {m}"
    )


def _blocks(tree: Params) -> list[str]:
  return [name for name in tree.get("encoder", {}) if name.startswith("block_")]


def _candidates(
  params: Params, sources: Mapping[str, Params], two: bool, config: Any
) -> Rename:
  """Target path -> where the image tree has it."""
  names = list(sources)
  layers = {m: transfer.layers(params, m) for m in names}
  upper = _blocks({"encoder": params.get("multimodal", {})})
  below = len(layers[names[0]]) - len(upper)
  cavmae = config.method.startswith(_CAVMAE)
  whole_decoder = cavmae and "decoder_project" in params
  learned = any(f"positions_{m}" in params for m in names)
  taken = [f"positions_{m}" for m in names if _learned(sources[m], m, config)]

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
    if stack == "multimodal":
      yield f"{prefix}encoder/block_{int(rest[6:8]) + below:02d}{rest[8:]}"
    elif stack == "encoder_mae_audio":
      yield f"{prefix}encoder/{rest}"
    elif stack.startswith("embed_"):
      yield f"{prefix}embed/{rest}"
    elif _LAST_NORMS.fullmatch(root) or (
      root == f"encoder_{m}/norm" and "encoder_joint" not in params
    ):
      last = next((n for n in names if root.endswith(n)), names[0])
      yield f"{f'{last}/' if two else ''}encoder/norm/{leaf}"
    elif stack in taken:
      yield f"{prefix}positions"
    elif (stack == "bottleneck" and learned) or stack == f"cls_{names[0]}":
      yield f"{prefix}{'positions' if stack == 'bottleneck' else 'cls'}"
    elif whole_decoder and _DECODER.match(path):
      bare = stack.removesuffix("_video").removesuffix("_audio")
      yield "/".join(filter(None, (f"{prefix}{bare}", rest)))

  return candidates


# --- Shapes ------------------------------------------------------------------


def _changes(
  params: Params, sources: Mapping[str, Params], config: Any
) -> dict[str, transfer.Reshape]:
  """How arrays become those at each path, where shapes differ."""
  names, found = list(sources), {}
  token = any(f"cls_{m}" in params for m in names)
  for path in trees.flatten(params):
    stack = path.partition("/")[0]
    m = next((m for m in names if stack.endswith(m)), names[0])
    change = _change(path, config)
    time_first = not config.method.startswith(MEL_FIRST)
    if path in _SOUND and time_first and _of_sound(sources[m]):
      change = _swapped(change)
    if path.startswith(("positions_", "bottleneck")) and token:
      change = _behind(sources[m].get("cls_position"), change)
    if change:
      found[path] = change
  return found


def _change(path: str, config: Any) -> transfer.Reshape | None:
  """How the image's array becomes the one at `path`, where shapes differ."""
  model, data = config.model, config.data
  if path == "embed_video/kernel":
    return _tubelets
  if path == "embed_audio/kernel":
    mean = config.method.startswith(_AVSIAM)
    return functools.partial(_channels, mean=mean)
  if path.startswith("head_audio/"):
    return _first_outputs
  if path == "bottleneck":
    return _bottleneck
  if path == "positions_audio":
    mel_first = config.method.startswith(MEL_FIRST)
    bands = data.fbank.num_mels // model.patch_audio[0 if mel_first else 1]
    axis = {"rows": bands} if mel_first else {"columns": bands}
    return functools.partial(_tiled, **axis)
  if path == "positions_video" or path == "decoder_positions_video":
    if model.patch_video[0] == 1:
      return transfer.picture
    side = data.video.size // model.patch_video[-1]
    return functools.partial(_tiled, rows=side, columns=side)
  return None


def _swapped(change):
  """`change` of an array [mel time …] as [time mel …]."""
  return lambda value, shape: change(value.swapaxes(0, 1), shape)


def _colours(kernel):
  """[h w c d] -> [h w 3 d]."""
  if kernel.shape[2] == 3:
    return kernel, ""
  return np.repeat(kernel / 3, 3, axis=2), "1 -> 3 channels, a third each"


def _tubelets(kernel, shape):
  """[h w c d] -> [t*h*w*3 d]: the image's at frame t//2, 0 elsewhere."""
  kernel, words = _colours(kernel)
  pixels, d = math.prod(kernel.shape[:3]), kernel.shape[3]
  frames, rest = divmod(shape[0], pixels)
  if rest or not frames or d != shape[1]:
    return None
  inflated = np.zeros((frames, pixels, d), kernel.dtype)
  inflated[frames // 2] = kernel.reshape(pixels, d)
  more = f"inflated to {frames} frames: frame {frames // 2} has it, 0 else"
  words = filter(None, (words, more if frames > 1 else ""))
  return inflated.reshape(shape), ", ".join(words)


def _channels(kernel, shape, *, mean: bool):
  """[h w c d] -> [h*w d], sum or mean over colours; or [h*w*3 d] as it is."""
  rows, d = math.prod(kernel.shape[:2]), kernel.shape[3]
  if tuple(shape) == (rows * 3, d):
    kernel, words = _colours(kernel)
    return kernel.reshape(shape), words
  if tuple(shape) != (rows, d):
    return None
  if kernel.shape[2] == 1:
    return kernel.reshape(shape), ""
  one = kernel.mean(2) if mean else kernel.sum(2)
  how = "averaged" if mean else "summed"
  return one.reshape(shape), f"3 -> 1 channels, {how}"


def _behind(row, change):
  """`change` for all rows but the first, which is `row`; None = no such."""
  if row is None:
    return change

  def changed(table, shape):
    rest = change(table, (shape[0] - 1, *shape[1:]))
    if rest is None:
      return None
    words = ", ".join(filter(None, ("CLS", rest[1])))
    return np.concatenate([row[None], rest[0]]), words

  return changed


def _first_outputs(value, shape):
  """[… k] -> its first outputs."""
  if value.shape[:-1] != tuple(shape[:-1]) or value.shape[-1] < shape[-1]:
    return None
  words = f"the first {shape[-1]} of {value.shape[-1]} outputs"
  return value[..., : shape[-1]], words


def _tiled(table, shape, *, rows: int = 0, columns: int = 0):
  """Positions for a model's grid, without a row for the CLS.

  Args:
    table: of the image's patches [row column d].
    shape: (n, d) of the model's.
    rows: of the model's grid; 0 = as many as `columns` leave.
    columns: of it; 0 = as many as `rows` leave. Where both are given, tubelets
      repeat the grid.
  """
  n, d = shape
  if d != table.shape[-1] or n % (max(rows, 1) * max(columns, 1)):
    return None
  grid = (rows or n // columns, columns or n // rows)
  one, old = resize_grid(table, grid), table.shape[:2]
  times = n // len(one)
  words = f"{old[0]}x{old[1]} -> {grid[0]}x{grid[1]}" if old != grid else ""
  words = filter(None, (words, f"{times} times" if times > 1 else ""))
  return np.tile(one, (times, 1)), ", ".join(words)


def _bottleneck(table, shape):
  """The image's positions at a small grid, as square as can be."""
  rows = max(math.isqrt(shape[0]), 1)
  if shape[0] % rows or shape[1] != table.shape[-1]:
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
