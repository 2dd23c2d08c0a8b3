"""Scenic's AV-MAE and MBT checkpoints: their names and layouts, and ours.

Three families share one vocabulary: AV-MAE pretraining (`avmae`), the MBT that
AV-MAE fine-tunes (`mbt`) and the original MBT project (`mbt_original`, the
released MBT-B weights). One table of name pairs per family serves both ways:
`to_house` reads a checkpoint, `to_reference` writes one.

What differs besides names: the reference keeps query, key and value apart and
per head, convolution kernels with their spatial axes, and axes of one before
tokens. Its `rgb` is our video, its `spectrogram` our audio.
"""

import difflib
import functools
import itertools
import os
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from flax import serialization, traverse_util

from avjax.errors import InputError, lookup

Row = tuple[str, str]  # reference template, house template

# What stands in braces in a template: reference word -> house word.
_FIELDS = {
  "m": {"rgb": "video", "spectrogram": "audio"},
  "dense": {"kernel": "kernel", "bias": "bias"},
  "norm": {"scale": "scale", "bias": "bias"},
  "part": {"query": "query", "key": "key", "value": "value"},
}
_PARTS = tuple(_FIELDS["part"])


def _stack(reference: str, house: str, suffix: str = "") -> list[Row]:
  """The rows of one stack's blocks; {i} is the layer, 0 there, 00 here."""
  theirs = reference + "/encoderblock_{i}" + suffix
  ours = house + "/block_{i}"
  attention = theirs + "/MultiHeadDotProductAttention_0"
  return [
    (theirs + "/LayerNorm_0/{norm}", ours + "/norm1/{norm}"),
    # Query, key and value are joined after renaming, see `_join`.
    (attention + "/{part}/{dense}", ours + "/attention/{part}/{dense}"),
    (attention + "/out/{dense}", ours + "/attention/out/{dense}"),
    (theirs + "/LayerNorm_1/{norm}", ours + "/norm2/{norm}"),
    (theirs + "/MlpBlock_0/Dense_0/{dense}", ours + "/mlp/fc1/{dense}"),
    (theirs + "/MlpBlock_0/Dense_1/{dense}", ours + "/mlp/fc2/{dense}"),
  ]


def _normed(reference: str, house: str) -> list[Row]:
  norm = (reference + "/encoder_norm/{norm}", house + "/norm/{norm}")
  return [*_stack(reference, house), norm]


def _avmae(first: str) -> list[Row]:
  del first
  return [
    ("embedding_{m}/{dense}", "embed_{m}/{dense}"),
    ("Encoder_modality_token_{m}", "modality_token_{m}"),
    ("posembed_input_{m}/pos_embedding", "positions_{m}"),
    *_normed("Transformer", "encoder"),
    *_normed("Transformer_{m}", "encoder_{m}"),
    *_normed("Transformer_concat", "encoder_joint"),
    ("decoder_projection_{m}/{dense}", "decoder_project_{m}/{dense}"),
    ("mask_token_{m}", "mask_token_{m}"),
    ("Decoder_modality_token_{m}", "decoder_modality_token_{m}"),
    # The reference has one name for both; `to_house` tells them by width.
    ("posembed_input_{m}/pos_embedding", "decoder_positions_{m}"),
    *_normed("Decoder", "decoder"),
    *_normed("Decoder_{m}", "decoder_{m}"),
    ("output_projection_{m}/{dense}", "head_{m}/{dense}"),
  ]


def _mbt(first: str) -> list[Row]:
  return [
    ("embedding/{dense}", "embed_video/{dense}"),
    ("embedding_spectrogram/{dense}", "embed_audio/{dense}"),
    ("embedding_spec/{dense}", "embed_audio/{dense}"),  # old checkpoints
    ("Encoder_modality_token_{m}", "modality_token_{m}"),
    ("cls", "cls_video" if first == "shared" else f"cls_{first}"),
    ("clsspectrogram", "cls_audio"),
    ("bottleneck", "bottleneck"),
    *_stack("Transformer", first),
    *_stack("Transformer", "audio", "_spec"),
    ("Transformer/encoder_norm/{norm}", "norm/{norm}"),
    ("ProjectionHeadAndClassifier_0/output_projection/{dense}", "head/{dense}"),
  ]


def _mbt_original(first: str) -> list[Row]:
  blocks = "shared" if first == "shared" else "video"
  return [
    ("embedding/{dense}", "embed_video/{dense}"),
    ("embedding_spectrogram/{dense}", "embed_audio/{dense}"),
    ("Transformer/posembed_input/pos_embedding", "positions_video"),
    ("Transformer/posembed_input_spectrogram/pos_embedding", "positions_audio"),
    ("cls", "cls_video" if first == "shared" else f"cls_{first}"),
    ("clsspectrogram", "cls_audio"),
    ("bottleneck", "bottleneck"),
    *_stack("Transformer", blocks),
    *_stack("Transformer", "audio", "_spectrogram"),
    ("Transformer/encoder_norm/{norm}", "norm/{norm}"),
    ("output_projection/{dense}", "head/{dense}"),
  ]


LAYOUTS = {"avmae": _avmae, "mbt": _mbt, "mbt_original": _mbt_original}


def read_msgpack(path: str | os.PathLike[str]) -> dict[str, Any]:
  """The parameters of a released checkpoint file, reference names.

  Msgpack holds numbers and arrays only, so no code of the file runs.

  Raises:
    InputError: no such file, or it is not a Flax msgpack checkpoint.
  """
  file = pathlib.Path(path)
  if not file.is_file():
    raise InputError(f"no weights file {file}")
  try:
    tree = serialization.msgpack_restore(file.read_bytes())
  except ValueError as error:
    raise InputError(f"{file} is not a Flax msgpack file: {error}") from error
  if not isinstance(tree, Mapping):
    raise InputError(f"{file} holds {type(tree).__name__}, not a tree")
  return unwrap(tree)


def unwrap(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
  """The parameter tree inside a checkpoint.

  Pretraining states hold it under optimizer/target[/params], fine-tuning
  states under params; a tree that is neither is the parameters themselves.
  """
  tree = checkpoint
  for key in ("optimizer", "target", "params", "params"):
    if isinstance(tree.get(key), Mapping):
      tree = tree[key]
  return dict(tree)


def layout_of(params: Mapping[str, Any]) -> str:
  """Which of LAYOUTS a tree under reference names follows."""
  names = set(_flat(params))
  if any(n.startswith("ProjectionHeadAndClassifier_0/") for n in names):
    return "mbt"
  original = ("output_projection/", "Transformer/posembed_input")
  if any(n.startswith(original) for n in names):
    return "mbt_original"
  return "mbt" if "bottleneck" in names else "avmae"


def to_house(
  params: Mapping[str, Any], *, layout: str | None = None
) -> dict[str, Any]:
  """Renames a reference tree and joins what the house keeps together.

  Args:
    params: arrays under reference names, nested or by '/'-joined path.
    layout: one of LAYOUTS; None tells it from the names.

  Returns:
    A nested dict under the house's names, float arrays as they came.

  Raises:
    InputError: names that the layout does not know, each with the nearest;
      or a query without its key and value.
  """
  flat = _flat(params)
  layout = layout or layout_of(flat)
  make = lookup(LAYOUTS, layout, "layout of Scenic weights")
  table = make(_first_stream(flat, layout))
  named: dict[str, Any] = {}
  unknown = []
  for path, value in flat.items():
    targets = _rename(path, table, to_house=True)
    if not targets:
      unknown.append(path)
      continue
    named[_position_table(targets, value, flat)] = value
  if unknown:
    raise _unknown_names(unknown, table, layout)
  tidy = {path: _tidy(path, np.asarray(v)) for path, v in named.items()}
  return traverse_util.unflatten_dict(_join(tidy), sep="/")


def to_reference(
  params: Mapping[str, Any],
  layout: str,
  *,
  heads: int,
  decoder_heads: int = 0,
  patch: int = 16,
) -> dict[str, np.ndarray]:
  """The inverse of `to_house`: arrays by '/'-joined reference path.

  Args:
    params: a tree under the house's names.
    layout: one of LAYOUTS.
    heads: attention heads of the encoder.
    decoder_heads: of the decoder; needed only for `avmae` with one.
    patch: side of a patch in pixels and in spectrogram bins.

  Raises:
    InputError: a name that the layout has no place for.
  """
  flat = _flat(params)
  make = lookup(LAYOUTS, layout, "layout of Scenic weights")
  first = next((s for s in ("shared", "video") if s in params), "audio")
  table = make(first)
  result: dict[str, np.ndarray] = {}
  for path, value in _split(flat).items():
    targets = _rename(path, table, to_house=False)
    if not targets or targets[0] in result:
      taken = f"; {targets[0]!r} is taken" if targets else ""
      raise InputError(f"layout {layout!r} has no name for {path!r}{taken}")
    in_decoder = path.startswith("decoder")
    count = decoder_heads if in_decoder else heads
    if not count:
      raise InputError(f"{path!r} is of a decoder, but decoder_heads is 0")
    result[targets[0]] = _untidy(path, np.asarray(value), count, patch)
  return result


def _flat(params: Mapping[str, Any]) -> dict[str, Any]:
  flat = traverse_util.flatten_dict(dict(params), sep="/")
  return {path: value for path, value in flat.items() if value is not None}


def _first_stream(flat: Iterable[str], layout: str) -> str:
  """House name of the blocks that carry no suffix in an MBT tree."""
  roots = {path.split("/")[0] for path in flat}
  if "embedding" not in roots:
    return "audio"
  both = roots & {"embedding_spectrogram", "embedding_spec"}
  suffixed = any(re.search(r"encoderblock_\d+_spec", path) for path in flat)
  return "shared" if both and not suffixed else "video"


def _position_table(
  targets: Sequence[str], value: Any, flat: Mapping[str, Any]
) -> str:
  """Learned positions of encoder and decoder share a name, not a width."""
  if len(targets) == 1 or not targets[0].startswith("positions_"):
    return targets[0]
  widths = {v.shape[-1] for p, v in flat.items() if p.startswith("embedding_")}
  return targets[0] if value.shape[-1] in widths else targets[1]


@functools.cache
def _pattern(template: str, side: int) -> re.Pattern[str]:
  """A template as a regular expression; side 0 = reference, 1 = house."""

  def group(match: re.Match[str]) -> str:
    name = match[1]
    if name == "i":
      return r"(?P<i>\d+)"
    words = _FIELDS[name].items()
    return f"(?P<{name}>{'|'.join(pair[side] for pair in words)})"

  return re.compile(re.sub(r"\{(\w+)\}", group, template))


def _rename(path: str, table: Sequence[Row], *, to_house: bool) -> list[str]:
  """Every name that the table gives to `path`, in the table's order."""
  side = 0 if to_house else 1
  found = []
  for row in table:
    match = _pattern(row[side], side).fullmatch(path)
    if match:
      words = {}
      for name, word in match.groupdict().items():
        if name == "i":
          words[name] = f"{int(word):02d}" if to_house else str(int(word))
        else:
          pairs = _FIELDS[name].items()
          words[name] = next(p[1 - side] for p in pairs if p[side] == word)
      found.append(row[1 - side].format(**words))
  return found


def _unknown_names(
  names: Sequence[str], table: Sequence[Row], layout: str
) -> InputError:
  known = []
  for template, _ in table:
    fields = re.findall(r"\{(\w+)\}", template)
    words = [_FIELDS.get(f, {"0": "00"}) for f in fields]
    for choice in itertools.product(*words):
      known.append(template.format(**dict(zip(fields, choice, strict=True))))
  rows = []
  for name in names[:8]:
    bare = re.sub(r"encoderblock_\d+", "encoderblock_0", name)
    near = difflib.get_close_matches(bare, known, n=1, cutoff=0.4)
    rows.append(repr(name) + (f" (nearest: {near[0]!r})" if near else ""))
  more = f" and {len(names) - 8} more" if len(names) > 8 else ""
  return InputError(
    f"{len(names)} names are not of layout {layout!r}: {', '.join(rows)}{more}"
  )


def _is_token(path: str) -> bool:
  return path.split("/")[0].startswith(
    ("mask_token", "modality_token", "decoder_modality_token", "cls_")
  )


def _is_table(path: str) -> bool:
  return path.startswith(("positions_", "decoder_positions_", "bottleneck"))


def _tidy(path: str, value: np.ndarray) -> np.ndarray:
  """Reference shape -> house shape of one renamed array."""
  if _is_token(path):
    return value.reshape(-1)
  if _is_table(path) or re.search(r"^embed_\w+/kernel$|/out/kernel$", path):
    return value.reshape(-1, value.shape[-1])
  if re.search(r"/attention/(query|key|value)/kernel$", path):
    return value.reshape(value.shape[0], -1)
  if re.search(r"/attention/(query|key|value)/bias$", path):
    return value.reshape(-1)
  return value


def _untidy(path: str, value: np.ndarray, heads: int, patch: int) -> np.ndarray:
  """House shape -> reference shape of one array, before renaming."""
  if _is_token(path):
    return value.reshape(1, 1, -1)
  if _is_table(path):
    return value[None]
  if path == "embed_video/kernel":
    return value.reshape(-1, patch, patch, 3, value.shape[-1])
  if path == "embed_audio/kernel":
    return value.reshape(patch, patch, -1, value.shape[-1])
  if re.search(r"/attention/(query|key|value)/", path):
    return value.reshape(*value.shape[:-1], heads, -1)
  if path.endswith("/attention/out/kernel"):
    return value.reshape(heads, -1, value.shape[-1])
  return value


def _join(flat: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """query, key, value -> qkv along the last axis, in this order."""
  joined = {}
  for path, value in flat.items():
    match = re.fullmatch(r"(.*/attention)/(query|key|value)/(\w+)", path)
    if not match:
      joined[path] = value
      continue
    names = [f"{match[1]}/{part}/{match[3]}" for part in _PARTS]
    lost = [name for name in names if name not in flat]
    if lost:
      raise InputError(f"the weights have {path!r} but not {lost[0]!r}")
    if match[2] == "query":
      parts = [flat[name] for name in names]
      joined[f"{match[1]}/qkv/{match[3]}"] = np.concatenate(parts, axis=-1)
  return joined


def _split(flat: Mapping[str, Any]) -> dict[str, np.ndarray]:
  """qkv -> query, key, value; the inverse of `_join`."""
  split = {}
  for path, value in flat.items():
    if "/attention/qkv/" not in path:
      split[path] = np.asarray(value)
      continue
    parts = np.split(np.asarray(value), 3, axis=-1)
    for part, array in zip(_PARTS, parts, strict=True):
      split[path.replace("/qkv/", f"/{part}/")] = array
  return split
