"""CAV-MAE's public checkpoints: their names and layouts, and ours.

A public file is a flat PyTorch state dict of float32 whose keys all start with
`module.` (a copy without it is read as well). Pretraining and fine-tuning
share a vocabulary. Linear weights are [out in] there and [in out] here;
convolutions [out in row column] there, [row*column*in out] here. Every public
block carries six LayerNorms; those that no pass uses are no parameters here:
`to_house` hands them out as `aside`, `to_reference` puts them back.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from avjax import trees
from avjax.errors import InputError
from avjax.weights import transfer

PREFIX = "module."

# (public, house, public shape). {m} is a|v there and audio|video here, {i} a
# layer. Names of sizes: d and e widths of encoder and decoder, f and g of
# their MLPs, k classes; p and P pixels of a patch's rows and columns; those
# ending in * belong to a modality.
_BLOCK = (
  ("norm1.{norm}", "norm1/{norm}", "d"),
  ("attn.qkv.weight", "attention/qkv/kernel", "3d d"),
  ("attn.qkv.bias", "attention/qkv/bias", "3d"),
  ("attn.proj.weight", "attention/out/kernel", "d d"),
  ("attn.proj.bias", "attention/out/bias", "d"),
  ("norm2.{norm}", "norm2/{norm}", "d"),
  ("mlp.fc1.weight", "mlp/fc1/kernel", "f d"),
  ("mlp.fc1.bias", "mlp/fc1/bias", "f"),
  ("mlp.fc2.weight", "mlp/fc2/kernel", "d f"),
  ("mlp.fc2.bias", "mlp/fc2/bias", "d"),
)
_JOINT_NORMS = (
  ("norm1_{m}.{norm}", "norm1_{m}/{norm}", "d"),
  ("norm2_{m}.{norm}", "norm2_{m}/{norm}", "d"),
)
# No pass uses them; in all blocks but the joint one.
_DEAD = re.compile(
  r"(blocks_[av]|decoder_blocks)\.\d+\.norm[12]_[av]\.(weight|bias)"
)


def _in(public: str, house: str, rows: Any) -> list[tuple[str, str, str]]:
  return [(public + a, house + b, shape) for a, b, shape in rows]


def _decoder(rows: Any) -> list[tuple[str, str, str]]:
  widths = str.maketrans("df", "eg")
  return [(a, b, shape.translate(widths)) for a, b, shape in rows]


_TABLE = (
  ("modality_{m}", "modality_token_{m}", "1 1 d"),
  ("pos_embed_{m}", "positions_{m}", "1 n* d"),
  ("patch_embed_{m}.proj.weight", "embed_{m}/kernel", "d c* p P"),
  ("patch_embed_{m}.proj.bias", "embed_{m}/bias", "d"),
  *_in("blocks_{m}.{i}.", "encoder_{m}/block_{i}/", _BLOCK),
  *_in("blocks_u.{i}.", "encoder_joint/block_{i}/", _BLOCK + _JOINT_NORMS),
  ("norm.{norm}", "encoder_joint/norm/{norm}", "d"),
  ("norm_{m}.{norm}", "encoder_joint/norm_{m}/{norm}", "d"),
  ("mask_token", "mask_token", "1 1 e"),
  ("decoder_modality_{m}", "decoder_modality_token_{m}", "1 1 e"),
  ("decoder_pos_embed_{m}", "decoder_positions_{m}", "1 n* e"),
  ("decoder_embed.weight", "decoder_project/kernel", "e d"),
  ("decoder_embed.bias", "decoder_project/bias", "e"),
  *_in("decoder_blocks.{i}.", "decoder/block_{i}/", _decoder(_BLOCK)),
  ("decoder_norm.{norm}", "decoder/norm/{norm}", "e"),
  ("decoder_pred_{m}.weight", "head_{m}/kernel", "o* e"),
  ("decoder_pred_{m}.bias", "head_{m}/bias", "o*"),
  ("mlp_head.0.{norm}", "classifier/norm/{norm}", "d"),
  ("mlp_head.1.weight", "classifier/out/kernel", "k d"),
  ("mlp_head.1.bias", "classifier/out/bias", "k"),
)
_WORDS = {
  "m": {"a": "audio", "v": "video"},
  "norm": {"weight": "scale", "bias": "bias"},
}
_CHANNELS = {"audio": 1, "video": 3}


def to_house(
  state: Mapping[str, Any],
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
  """A public state dict under the house's names.

  Args:
    state: arrays by public key, with or without `module.`.

  Returns:
    Nested parameters, and what is no parameter here by public key: the
    LayerNorms that no pass uses. Numbers are not changed.

  Raises:
    InputError: a key that the family does not have (the nearest is named), or
      an array whose shape does not go with the others'.
  """
  sizes: dict[str, tuple[int, str]] = {}
  params, aside, unknown = {}, {}, []
  bare = {key.removeprefix(PREFIX): np.asarray(v) for key, v in state.items()}
  found = {key: _find(key, 0) for key in bare}
  # In the table's order, so that widths are known before blocks come.
  rank = {key: row[0] if row else len(_TABLE) for key, row in found.items()}
  for key in sorted(bare, key=rank.__getitem__):
    value = bare[key]
    if _DEAD.fullmatch(key):
      width = "e" if key.startswith("decoder") else "d"
      _check_shape(key, value, width, "", sizes)
      aside[key] = value
    elif found[key] is None:
      unknown.append(key)
    else:
      row, words = found[key]
      _, house, shape = _TABLE[row]
      _check_shape(key, value, shape, words.get("m", ""), sizes)
      params[_fill(house, words, 1)] = _tidy(house, value)
  if unknown:
    raise _unknown_keys(unknown, len(bare))
  return trees.unflatten(params), aside


def to_reference(
  params: Any,
  aside: Mapping[str, np.ndarray] | None = None,
  *,
  prefix: str = PREFIX,
) -> dict[str, np.ndarray]:
  """The inverse of `to_house`: a public state dict.

  Args:
    params: a tree under the house's names.
    aside: of `to_house`; None = ones and zeros, as a fresh public model has.
    prefix: of every key. The public code loads nothing, silently, from a file
      without `module.`.

  Raises:
    InputError: a name that the family has no place for, or a patch that is
      not square.
  """
  state: dict[str, np.ndarray] = {}
  for path, value in trees.flatten(params).items():
    found = _find(path, 1)
    if found is None:
      raise InputError(f"a CAV-MAE checkpoint has no place for {path!r}")
    row, words = found
    public, house, _ = _TABLE[row]
    m = _WORDS["m"].get(words.get("m", ""), "")
    state[_fill(public, words, 0)] = _untidy(path, house, m, np.asarray(value))
  for key, width in _dead_keys(state):
    fresh = np.ones if key.endswith("weight") else np.zeros
    state[key] = fresh(width, np.float32)
  for key, value in (aside or {}).items():
    state[key.removeprefix(PREFIX)] = np.asarray(value)
  return {prefix + key: value for key, value in state.items()}


# --- Names -------------------------------------------------------------------


def _pattern(template: str, side: int) -> re.Pattern[str]:
  """A template as a regular expression; side 0 = public, 1 = house."""

  def group(match: re.Match[str]) -> str:
    name = match[1]
    words = [pair[side] for pair in _WORDS.get(name, {}).items()]
    return f"(?P<{name}>{'|'.join(words) or r'[0-9]+'})"

  escaped = template.replace(".", r"\.")
  return re.compile(re.sub(r"\{(\w+)\}", group, escaped))


_PATTERNS = tuple(
  tuple(_pattern(row[side], side) for row in _TABLE) for side in (0, 1)
)


def _find(name: str, side: int) -> tuple[int, dict[str, str]] | None:
  """The row of a name, and what stands for its fields, in public words."""
  for row, pattern in enumerate(_PATTERNS[side]):
    match = pattern.fullmatch(name)
    if match:
      words = match.groupdict()
      for field, pairs in _WORDS.items():
        if side and field in words:
          back = {house: public for public, house in pairs.items()}
          words[field] = back[words[field]]
      return row, words
  return None


def _fill(template: str, words: Mapping[str, str], side: int) -> str:
  """A template with its fields filled in; side 0 = public, 1 = house."""
  values = dict(words)
  if "i" in values:
    number = int(values["i"])
    values["i"] = f"{number:02d}" if side else str(number)
  for field, pairs in _WORDS.items():
    if side and field in values:
      values[field] = pairs[values[field]]
  return template.format(**values)


def _dead_keys(state: Mapping[str, np.ndarray]) -> Iterator[tuple[str, int]]:
  """Unused LayerNorms that go with the blocks in a state dict."""
  for key, value in list(state.items()):
    match = re.fullmatch(
      r"((?:blocks_[av]|decoder_blocks)\.\d+\.norm[12])\.(\w+)", key
    )
    if match:
      for m in _WORDS["m"]:
        yield f"{match[1]}_{m}.{match[2]}", len(value)


def _unknown_keys(names: list[str], present: int) -> InputError:
  known = set()
  for public, _, _ in _TABLE:
    for m in _WORDS["m"]:
      for norm in _WORDS["norm"]:
        known.add(_fill(public, {"m": m, "norm": norm, "i": "0"}, 0))
  return transfer.foreign_keys(
    names,
    present,
    known,
    "a CAV-MAE",
    bare=lambda name: re.sub(r"\.\d+\.(?=\w+[12]|attn|mlp)", ".0.", name),
  )


# --- Arrays ------------------------------------------------------------------


def _check_shape(
  key: str,
  value: np.ndarray,
  shape: str,
  m: str,
  sizes: dict[str, tuple[int, str]],
) -> None:
  """Compares with the sizes that earlier keys gave, and adds new ones.

  Args:
    key: of the array.
    value: the array.
    shape: such as '3d d'.
    m: modality, 'a' or 'v' or ''.
    sizes: name -> (size, key that it was read from).
  """
  names = [name.replace("*", f" of {m}") for name in shape.split()]
  fits = len(names) == value.ndim
  for name, size in zip(names, value.shape, strict=False):
    if name.isdigit():
      fits = fits and size == int(name)
      continue
    factor = 3 if name.startswith("3") else 1
    name = name.removeprefix("3")
    known, _ = sizes.setdefault(name, (size // factor, key))
    fits = fits and size == factor * known
  if not fits:
    wanted = [_size(name, sizes) for name in names]
    comma = "," if len(wanted) == 1 else ""
    bare = [name.removeprefix("3") for name in names]
    origin = {sizes[name][1] for name in bare if name in sizes} - {key}
    told = f" as {', '.join(sorted(origin))} has it" if origin else ""
    raise InputError(
      f"{key!r} has shape {value.shape}; expected "
      f"({', '.join(wanted)}{comma}){told}"
    )


def _size(name: str, sizes: Mapping[str, tuple[int, str]]) -> str:
  if name.isdigit():
    return name
  factor = 3 if name.startswith("3") else 1
  name = name.removeprefix("3")
  return str(factor * sizes[name][0]) if name in sizes else name


def _tidy(house: str, value: np.ndarray) -> np.ndarray:
  """Public shape -> house shape."""
  if value.ndim == 4:
    return transfer.patch_rows(value)
  if value.ndim == 3:
    return value.reshape(value.shape[1:] if "positions" in house else -1)
  return value.T if value.ndim == 2 else value


def _untidy(path: str, house: str, m: str, value: np.ndarray) -> np.ndarray:
  """House shape -> public shape."""
  if house.startswith("embed_") and value.ndim == 2:
    return transfer.patch_kernel(value, _CHANNELS[m], path)
  if "positions" in house:
    return value[None]
  if "token" in house:
    return value.reshape(1, 1, -1)
  return np.ascontiguousarray(value.T) if value.ndim == 2 else value
