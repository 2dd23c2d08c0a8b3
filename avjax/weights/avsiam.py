"""AVSiam's public checkpoints: their names and layouts, and ours.

A public file is a flat PyTorch state dict of the Base model whose keys start
with `module.` (a copy without it is read as well); pretraining and fine-tuning
share a vocabulary. Linear weights are [out in] there and [in out] here;
convolutions [out in row column] there, [row*column*in out] here.

- `my_blocks` is `vit_base.blocks` a second time.
- `vit_base` has three sets of LayerNorms a block; sound goes through `_a`,
  pictures through `_v`. Its last ones are `norm_a` and, for pictures, `norm`.
- The multimodal layers use their `_a` set for everything.
- `ast_base`, where there is one, is the second encoder of sound.
- Row 0 of `vit_base.pos_embed` is that of a CLS token which is not there.

What no result depends on is no parameter here: `to_house` hands it out as
`aside`, `to_reference` puts it back. The decoder may have any depth.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from avjax import trees
from avjax.errors import InputError
from avjax.methods import avsiam_config
from avjax.weights import transfer

PREFIX = "module."
POSITIONS = "vit_base.pos_embed"
ALIAS = "my_blocks."

_LEAVES = {"weight": "scale", "bias": "bias"}
_BLOCK = {
  "attn.qkv": "attention/qkv",
  "attn.proj": "attention/out",
  "mlp.fc1": "mlp/fc1",
  "mlp.fc2": "mlp/fc2",
}
_PLAIN = {"norm1": "norm1", "norm2": "norm2"}
# Public stack -> (house stack, LayerNorms that are used).
_STACKS = {
  "vit_base.blocks.": (
    "encoder",
    {
      f"norm{k}_{m[0]}": f"norm{k}_{m}"
      for k in (1, 2)
      for m in ("audio", "video")
    },
  ),
  "ast_base.blocks.": ("encoder_mae_audio", _PLAIN),
  "mm_layer_": ("multimodal", {"norm1_a": "norm1", "norm2_a": "norm2"}),
  "decoder_blocks.": ("decoder", _PLAIN),
}
_NORMS = {
  "vit_base.norm_a": "encoder/norm_audio",
  "vit_base.norm": "encoder/norm_video",
  "ast_base.norm_a": "encoder_mae_audio/norm",
  "decoder_norm": "decoder/norm",
  "mlp_head_a.0": "classifier_audio/norm",
  "mlp_head.0": "classifier_video/norm",
  "mlp_head_mm.0": "classifier_av/norm",
}
_LINEAR = {
  "vit_base.patch_embed_a.proj": "embed_audio",
  "vit_base.patch_embed.proj": "embed_video",
  "decoder_embed": "decoder_project",
  "decoder_pred_a": "head_audio",
  "decoder_pred_v": "head_video",
  "mlp_head_a.1": "classifier_audio/out",
  "mlp_head.1": "classifier_video/out",
  "mlp_head_mm.1": "classifier_av/out",
}
_OTHERS = {
  POSITIONS: "positions_video",
  "vit_base.pos_embed_a": "positions_audio",
  "decoder_pos_embed_a": "decoder_positions_audio",
  "decoder_pos_embed_v": "decoder_positions_video",
  "mask_token": "mask_token",
  "decoder_modality_a": "decoder_modality_token_audio",
  "decoder_modality_v": "decoder_modality_token_video",
}
_ASIDE = re.compile(
  r"(vit_base|ast_base)\.(cls_token|head\.\w+)|my_patch_embed(_a)?\.proj\.\w+|"
  r"ast_base\.(norm\.\w+|patch_embed(_a)?\.proj\.\w+|pos_embed(_a)?)|"
  r"((vit_base|ast_base|decoder)[._]blocks\.\d+|mm_layer_\d+)"
  r"\.norm[12](_[av])?\.\w+|mlp_head_mm_v2\..+"
)


def to_house(
  state: Mapping[str, Any],
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
  """A public state dict under the house's names.

  Args:
    state: arrays by public key, with or without `module.`.

  Returns:
    Nested parameters, and what is no parameter here by public key; of
    `vit_base.pos_embed` that is its first row. Numbers are not changed.

  Raises:
    InputError: a key that the family does not have (the nearest is named), two
      copies of the blocks that differ, or an array of a wrong shape.
  """
  bare = {key.removeprefix(PREFIX): np.asarray(v) for key, v in state.items()}
  _drop_alias(bare)
  names = _names(_depths(bare, 0))
  params, aside, unknown = {}, {}, []
  for key, value in bare.items():
    if key in names:
      params[names[key]] = _tidy(key, value)
      if key == POSITIONS:
        aside[key] = value[:, :1]
    elif _ASIDE.fullmatch(key):
      aside[key] = value
    else:
      unknown.append(key)
  if unknown:
    raise transfer.foreign_keys(unknown, len(bare), names, "an AVSiam")
  _check_shapes(bare)
  return trees.unflatten(params), aside


def to_reference(
  params: Any,
  aside: Mapping[str, np.ndarray] | None = None,
  *,
  prefix: str = PREFIX,
) -> dict[str, np.ndarray]:
  """The inverse of `to_house`: a public state dict.

  Args:
    params: a tree under the house's names, of `norms='modality'`.
    aside: of `to_house`; None = without what no result depends on.
    prefix: of every key.

  Raises:
    InputError: a name that the family has no place for.
  """
  flat = trees.flatten(params)
  aside = {k: np.asarray(v) for k, v in (aside or {}).items()}
  places = {house: key for key, house in _names(_depths(flat, 1)).items()}
  state: dict[str, np.ndarray] = {}
  for path, value in flat.items():
    if path not in places:
      raise InputError(f"an AVSiam checkpoint has no place for {path!r}")
    state[places[path]] = _untidy(places[path], np.asarray(value))
  if POSITIONS in state:
    table = state[POSITIONS]
    first = aside.pop(POSITIONS, np.zeros_like(table[:, :1]))
    state[POSITIONS] = np.concatenate([first, table], axis=1)
  state |= aside
  inner = "vit_base.blocks."
  state |= {
    key.replace(inner, ALIAS): v
    for key, v in state.items()
    if key.startswith(inner)
  }
  return {prefix + key: value for key, value in state.items()}


def knows(name: str) -> bool:
  """Whether a public AVSiam file can have this key."""
  key = name.removeprefix(PREFIX).replace(ALIAS, "vit_base.blocks.")
  number = max([0, *map(int, re.findall(r"\d+", key))])
  known = _names(dict.fromkeys(_STACKS, number + 1))
  return key in known or bool(_ASIDE.fullmatch(key))


def public_model(model: Any, params: Any) -> dict[str, Any]:
  """Values of `config.model` that a public file's model has.

  `public_base` needs the second encoder; a file without one gets the rest.
  """
  values = dict(avsiam_config.PUBLIC_BASE)
  blocks = [n for n in params.get("decoder", {}) if n.startswith("block_")]
  if blocks:
    values["decoder_depth"] = len(blocks)
    values["public_base"] = "encoder_mae_audio" in params
  return {key: value for key, value in values.items() if key in model}


# --- Names -------------------------------------------------------------------


def _names(depths: Mapping[str, int]) -> dict[str, str]:
  """Public key -> house path of everything that a model can have."""
  pairs = dict(_OTHERS)
  modules = [*_NORMS.items()]
  for stack, (house, norms) in _STACKS.items():
    first = int(stack == "mm_layer_")
    for i in range(depths[stack]):
      block = f"{stack}{i + first}.", f"{house}/block_{i:02d}/"
      modules += [(block[0] + a, block[1] + b) for a, b in norms.items()]
      for a, b in _BLOCK.items():
        pairs[f"{block[0]}{a}.weight"] = f"{block[1]}{b}/kernel"
        pairs[f"{block[0]}{a}.bias"] = f"{block[1]}{b}/bias"
  for a, b in modules:
    pairs |= {f"{a}.{leaf}": f"{b}/{name}" for leaf, name in _LEAVES.items()}
  for a, b in _LINEAR.items():
    pairs |= {f"{a}.weight": f"{b}/kernel", f"{a}.bias": f"{b}/bias"}
  return pairs


def _depths(names: Any, side: int) -> dict[str, int]:
  """How many blocks of every stack there are; side 0 = public, 1 = house."""
  found = {}
  for stack, (house, _) in _STACKS.items():
    start = (re.escape(stack), re.escape(house) + "/block_")[side]
    numbers = [re.match(rf"{start}(\d+)[./]", name) for name in names]
    found[stack] = len({int(match[1]) for match in numbers if match})
  return found


def _drop_alias(state: dict[str, np.ndarray]) -> None:
  """Takes the second copy of the encoder's blocks away, or as the only one."""
  for key in [key for key in state if key.startswith(ALIAS)]:
    value = state.pop(key)
    place = key.replace(ALIAS, "vit_base.blocks.")
    if not np.array_equal(state.setdefault(place, value), value):
      raise InputError(
        f"{key!r} and {place!r} differ; in AVSiam they are one parameter"
      )


# --- Arrays ------------------------------------------------------------------


def _tidy(key: str, value: np.ndarray) -> np.ndarray:
  """Public shape -> house shape."""
  if value.ndim == 4:
    return transfer.patch_rows(value)
  if value.ndim == 3:
    if "pos_embed" in key:
      return value[0, 1:] if key == POSITIONS else value[0]
    return value.reshape(-1)
  return value.T if value.ndim == 2 else value


def _untidy(key: str, value: np.ndarray) -> np.ndarray:
  """House shape -> public shape."""
  if "patch_embed" in key and value.ndim == 2:
    return transfer.patch_kernel(value, 1 if "_a." in key else 3, key)
  if "pos_embed" in key:
    return value[None]
  if "token" in key or "modality" in key:
    return value.reshape(1, 1, -1)
  return np.ascontiguousarray(value.T) if value.ndim == 2 else value


def _check_shapes(state: Mapping[str, np.ndarray]) -> None:
  """Compares the shapes in every block with its width.

  Raises:
    InputError: names the key and both shapes.
  """
  widths = {}
  for key, value in state.items():
    match = re.fullmatch(r"(\w+\.blocks|mm_layer|decoder_blocks)(.*)", key)
    if match and match[2].endswith("attn.proj.bias"):
      widths.setdefault(match[1], len(value))
  for key, wanted in _wanted(state, widths):
    if state[key].shape != wanted:
      raise InputError(
        f"{key!r} has shape {state[key].shape}; expected {wanted}"
      )


def _wanted(
  state: Mapping[str, np.ndarray], widths: Mapping[str, int]
) -> Iterator[tuple[str, tuple[int, ...]]]:
  for key, value in state.items():
    stack = next((s for s in widths if key.startswith(s)), None)
    if stack is None:
      continue
    d, f = widths[stack], value.shape[0 if "fc1" in key else -1]
    shapes = {
      "attn.qkv.weight": (3 * d, d),
      "attn.qkv.bias": (3 * d,),
      "attn.proj.weight": (d, d),
      "mlp.fc1.weight": (f, d),
      "mlp.fc2.weight": (d, f),
    }
    for leaf, shape in shapes.items():
      if key.endswith(leaf):
        yield key, shape
    if re.search(r"norm\w*\.\w+$|proj\.bias$|fc2\.bias$", key):
      yield key, (d,)
