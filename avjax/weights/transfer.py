"""Starts one model from another and accounts for every name on both sides."""

import difflib
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np

from avjax import trees
from avjax.errors import InputError
from avjax.methods.base import Loaded, Params

# (source array, target shape) -> (array of that shape, what was done to it),
# or None where it does not know how.
Reshape = Callable[[np.ndarray, tuple[int, ...]], tuple[np.ndarray, str] | None]


def foreign_keys(
  names: Sequence[str],
  present: int,
  known: Iterable[str],
  what: str,
  *,
  bare: Callable[[str], str] = str,
) -> InputError:
  """The error for keys of a file that its family does not have.

  Args:
    names: the keys; the first eight are named, each with the nearest known.
    present: keys of the file.
    known: keys of the family.
    what: the family's checkpoint, with its article.
    bare: brings a key to the form of `known`.
  """
  known, rows = sorted(known), []
  for name in sorted(names)[:8]:
    near = difflib.get_close_matches(bare(name), known, n=1, cutoff=0.4)
    rows.append(repr(name) + (f" (nearest: {near[0]!r})" if near else ""))
  more = f" and {len(names) - 8} more" if len(names) > 8 else ""
  return InputError(
    f"{len(names)} of {present} keys are not of {what} checkpoint: "
    f"{', '.join(rows)}{more}"
  )


def fill(
  params: Params,
  source: Params,
  candidates: Callable[[str], Iterable[str]],
  *,
  reshape: Mapping[str, Reshape] | None = None,
  optional: Sequence[str] = (),
) -> Loaded:
  """The target's parameters with the source's values where they belong.

  Args:
    params: the target's initial parameters.
    source: the other model's parameters, nested or by path.
    candidates: target path -> source paths that may fill it; the first one
      that exists is taken.
    reshape: target path -> how to change an array of another shape.
    optional: beginnings of target paths that keep their initial values when
      the shapes differ, such as a head for other classes.

  Returns:
    Every target path is in `loaded` or `missing`; every source path that
    nothing took is in `unused`.

  Raises:
    InputError: a shape differs and nothing says how to change it; names both
      paths and both shapes.
  """
  target, origin = trees.flatten(params), trees.flatten(source)
  values, loaded, reshaped = dict(target), {}, {}
  for path, initial in target.items():
    name = next((c for c in candidates(path) if c in origin), None)
    if name is None:
      continue
    value, words = np.asarray(origin[name]), ""
    if value.shape != initial.shape:
      change = (reshape or {}).get(path, lambda value, shape: None)
      changed = change(value, initial.shape)
      if changed is None and path.startswith(tuple(optional)):
        continue
      if changed is None:
        raise InputError(
          f"{path!r} has shape {tuple(initial.shape)}, but {name!r} of the "
          f"source has {value.shape}"
        )
      value, words = changed
    values[path] = value.astype(initial.dtype)
    loaded[path] = name
    if words:
      reshaped[path] = words
  used = set(loaded.values())
  return Loaded(
    params=trees.unflatten(values),
    loaded=loaded,
    missing=[path for path in target if path not in loaded],
    unused=[path for path in origin if path not in used],
    reshaped=reshaped,
  )


def patch_rows(kernel: np.ndarray) -> np.ndarray:
  """PyTorch's [d channel row column] -> ours, [row*column*channel d]."""
  return kernel.transpose(2, 3, 1, 0).reshape(-1, kernel.shape[0])


def patch_kernel(rows: np.ndarray, channels: int, name: str) -> np.ndarray:
  """The inverse of `patch_rows` for square patches.

  Raises:
    InputError: the patch is not square; names `name`.
  """
  side = round((rows.shape[0] / channels) ** 0.5)
  if side * side * channels != rows.shape[0]:
    raise InputError(
      f"{name!r} has {rows.shape[0]} rows, which are no square patch of "
      f"{channels} channels"
    )
  kernel = rows.reshape(side, side, channels, -1).transpose(3, 2, 0, 1)
  return np.ascontiguousarray(kernel)


def channels(
  value: np.ndarray, shape: tuple[int, ...]
) -> tuple[np.ndarray, str] | None:
  """A patch kernel [p*c d] for another number of input channels.

  1 -> c repeats the kernel without dividing, as the public code does, so a
  spectrogram repeated c times gives c times the activation; c -> 1 sums, which
  gives exactly the activation that c equal channels gave.
  """
  (rows, d), (wanted, width) = value.shape, shape
  if d == width and wanted > rows and wanted % rows == 0:
    c = wanted // rows
    return np.repeat(value, c, axis=0), f"1 -> {c} channels, repeated"
  if d == width and rows > wanted and rows % wanted == 0:
    c = rows // wanted
    summed = value.reshape(wanted, c, d).sum(axis=1)
    return summed, f"{c} -> 1 channels, summed"
  return None


def time_axis(bands: int) -> Reshape:
  """For a table [bands*t d] of frequency-major positions of another length.

  The table is laid out as (bands, t, d). A shorter clip takes the first time
  steps, a longer one interpolates linearly along time (cell centres, constant
  beyond the outermost). Rows are never taken from the start of the flat
  table: those would be the low frequencies alone.
  """

  def change(value, shape):
    (rows, d), (wanted, width) = value.shape, shape
    if d != width or rows % bands or wanted % bands:
      return None
    old, new = rows // bands, wanted // bands
    table = value.reshape(bands, old, d)
    how = "cut" if new < old else "linear"
    table = table[:, :new] if new < old else _linear(table, new, axis=1)
    words = f"time {old} -> {new} of {bands} bands, {how}"
    return table.reshape(wanted, d), words

  return change


def picture(
  value: np.ndarray, shape: tuple[int, ...]
) -> tuple[np.ndarray, str] | None:
  """For a table of a square picture: bilinear in both axes.

  Args:
    value: [side*side d], or a grid of any sides [row column d].
    shape: (n, d) of the other square's.
  """
  n, d = shape
  if value.ndim == 2:
    side = math.isqrt(len(value))
    if side * side != len(value):
      return None
    value = value.reshape(side, side, -1)
  new, (rows, columns, width) = math.isqrt(n), value.shape
  if d != width or new * new != n:
    return None
  table = _linear(_linear(value, new, axis=0), new, axis=1).reshape(n, d)
  same = (rows, columns) == (new, new)
  words = f"{rows} x {columns} -> {new} x {new}, bilinear"
  return table, "" if same else words


def _linear(x: np.ndarray, n: int, axis: int) -> np.ndarray:
  """Linear interpolation of cell centres to n cells."""
  old = x.shape[axis]
  place = np.clip((np.arange(n) + 0.5) * old / n - 0.5, 0, old - 1)
  low = np.floor(place).astype(int)
  share = (place - low).reshape([-1 if a == axis else 1 for a in range(x.ndim)])
  high = np.minimum(low + 1, old - 1)
  low, high = (np.take(x, i, axis=axis) for i in (low, high))
  return (low + share * (high - low)).astype(x.dtype)


_MODALITIES = ("video", "audio")
_BLOCK = re.compile(r"(\w+)/block_(\d+)/(.+)")
# Behind all tokens: in MBT, in early fusion or shared, in mid-fusion.
_LAST_NORM = ("norm", "encoder/norm", "encoder_joint/norm")


def av_encoder(
  params: Params, source: Params
) -> Callable[[str], Iterator[str]]:
  """How one audiovisual encoder starts another: target path -> source paths.

  Both are AV-MAE's encoder of any kind, of one modality too, or MBT, under the
  house's names; or the source is {'audio': …, 'video': …} of two of them.
  AV-MAE (arXiv:2212.05922) §4.1, and the authors' code for what it leaves out:

  - every block of a modality's stream starts from the block of the same depth
    that this modality passed through: its own stack, then the joint blocks of
    mid-fusion; a stack that served both is copied to both streams;
  - a source of one modality starts both streams (table 3). The other patch
    embedding has no origin and stays random;
  - the last LayerNorm starts from the one that served all tokens. Separate
    encoders have none, and LayerNorms inside an encoder are left out;
  - blocks that serve both modalities start from the video's where the source
    has two.

  Raises:
    InputError: the source has no such encoder, or another number of blocks.
  """
  two = set(source) == set(_MODALITIES) and all(
    f"embed_{m}" in source[m] for m in _MODALITIES
  )
  names = [m for m in _MODALITIES if f"embed_{m}" in params]
  trees_of = {m: source[m] if two else source for m in names}
  for m, tree in trees_of.items():
    depth, wanted = len(layers(tree, m)), len(layers(params, m))
    if depth != wanted:
      raise InputError(
        f"the source has {depth} blocks for {m}, the model {wanted}"
      )

  def candidates(path: str) -> Iterator[str]:
    root, _, leaf = path.rpartition("/")
    stack = path.split("/")[0]
    own = next((m for m in names if stack.endswith(m)), None)
    m = own or names[0]
    prefix = f"{m}/" if two else ""
    block = _BLOCK.fullmatch(path)
    if block:
      layer = layers(params, m).index(f"{stack}/block_{block[2]}")
      yield f"{prefix}{layers(trees_of[m], m)[layer]}/{block[3]}"
      return
    if own or not two:
      yield prefix + path
    if root in _LAST_NORM and not two:
      yield from (f"{norm}/{leaf}" for norm in _LAST_NORM)
    if root == f"encoder_{own}/norm" and "encoder_joint" not in params:
      yield f"{prefix}encoder/norm/{leaf}"

  return candidates


def layers(tree: Params, m: str) -> list[str]:
  """The blocks that modality `m` passes through, in order, by path."""
  (other,) = set(_MODALITIES) - {m}
  own = (m, "shared", f"encoder_{m}", "encoder", other, f"encoder_{other}")
  stack = next((name for name in own if name in tree), None)
  if stack is None:
    raise InputError(
      f"there is no audiovisual encoder among {', '.join(sorted(tree))}"
    )
  return [
    f"{name}/{block}"
    for name in (stack, "encoder_joint")
    for block in sorted(tree.get(name, {}))
    if block.startswith("block_")
  ]
