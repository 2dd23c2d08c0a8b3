"""UAVM's public checkpoints: their names and layouts, and ours.

A public file is a flat PyTorch state dict whose keys start with `module.` (a
copy without it is read as well). Linear weights are [out in] there and [in out]
here; positions have a leading dimension of 1 there.

| there | here |
|---|---|
| `a_trans`, `v_trans` | `encoder_audio`, `encoder_video` |
| `a_in_proj`, `v_in_proj` (N = 0) | `embed_audio`, `embed_video` |
| `s_trans` | `encoder_shared` and, its `mlp_head`, `classifier` |
| `a_s_trans`, `v_s_trans` (independent) | `encoder_late_…`, `classifier_…` |
| `a_mlp`, `v_mlp` (N_s = 0) | `classifier_audio`, `classifier_video` |

Every public stack has a projection, used only if it changes the width, and a
classifier, used only in the last stack. What is not used is no parameter here:
`to_house` hands it out as `aside`, `to_reference` puts it back, or zeros in its
place, so that the public classes load the file strictly. No result depends on
it, and the published training drives it to zero (weight decay, no gradient).

VGGSound's classes are taken to be in the order of CAV-MAE's list, by the same
authors; see `class_lists.class_order`.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from avjax import trees
from avjax.errors import InputError
from avjax.nn.uavm import MODALITIES, SHARED
from avjax.weights import transfer

PREFIX = "module."
TOKENS = 30  # of a modality, in every public model

_LEAVES = {"weight": "scale", "bias": "bias"}
_STACKS = {
  "a_trans": "encoder_audio",
  "v_trans": "encoder_video",
  "s_trans": SHARED,
  "a_s_trans": "encoder_late_audio",
  "v_s_trans": "encoder_late_video",
}
_BLOCK = {
  "attn.qkv": "attention/qkv",
  "attn.proj": "attention/out",
  "mlp.fc1": "mlp/fc1",
  "mlp.fc2": "mlp/fc2",
}
_TELLS = re.compile(rf"(module\.)?({'|'.join(_STACKS)})\.blocks\.\d+\..+")


def is_uavm(names: Iterable[str]) -> bool:
  """Whether these are the names of a UAVM checkpoint."""
  return any(_TELLS.fullmatch(name) for name in names)


def knows(name: str) -> bool:
  """Whether a public UAVM file can have this key."""
  key = name.removeprefix(PREFIX)
  depth = 1 + max([0, *map(int, re.findall(r"\d+", key))])
  known = _names(depth, False) | _names(depth, True)
  return key in known or bool(_DEAD.fullmatch(key))


def to_house(
  state: Mapping[str, Any],
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
  """A public state dict under the house's names.

  Args:
    state: arrays by public key, with or without `module.`.

  Returns:
    Nested parameters, and by public key what no result depends on. Numbers
    are not changed.

  Raises:
    InputError: a key that the family does not have (the nearest is named), or
      an array of a wrong shape.
  """
  bare = {key.removeprefix(PREFIX): np.asarray(v) for key, v in state.items()}
  names = _names(_depth(bare), _late(bare))
  params, aside, unknown = {}, {}, []
  for key, value in bare.items():
    if key in names and not _is_dead_projection(key, bare):
      params[names[key]] = value[0] if value.ndim == 3 else _turned(value)
    elif _DEAD.fullmatch(key):
      aside[key] = value
    else:
      unknown.append(key)
  if unknown:
    raise transfer.foreign_keys(unknown, len(bare), names, "a UAVM")
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
    params: a tree under the house's names.
    aside: of `to_house`; zeros stand for what it does not have.
    prefix: of every key.

  Raises:
    InputError: a name that the family has no place for.
  """
  flat = trees.flatten(params)
  late = any(path.startswith("encoder_late_") for path in flat)
  places = {house: key for key, house in _names(_depth(flat), late).items()}
  state: dict[str, np.ndarray] = {}
  for path, value in flat.items():
    if path not in places:
      raise InputError(f"a UAVM checkpoint has no place for {path!r}")
    value, key = np.asarray(value), places[path]
    table = key.endswith("pos_embed")
    state[key] = value[None] if table else _turned(value)
  dead = {key: np.asarray(value) for key, value in (aside or {}).items()}
  for key, shape in dead_shapes(params).items():
    dead.setdefault(key, np.zeros(shape, np.float32))
  return {prefix + key: value for key, value in {**state, **dead}.items()}


def dead_shapes(params: Any) -> dict[str, tuple[int, ...]]:
  """What the public classes have beside these parameters, by public key."""
  found: dict[str, tuple[int, ...]] = {}
  ends = [params[name] for name in params if name.startswith("classifier")]
  for stack, house in _STACKS.items():
    if house not in params or "positions" not in params[house]:
      continue
    d = params[house]["positions"].shape[-1]
    if "project" not in params[house]:
      shapes = {"weight": (d, d), "bias": (d,)}
      found |= {f"{stack}.in_proj.{name}": x for name, x in shapes.items()}
    if stack in ("a_trans", "v_trans") and ends:
      (k,) = ends[0]["out"]["bias"].shape
      shapes = {"0.weight": (d,), "0.bias": (d,), "1.weight": (k, d)}
      shapes["1.bias"] = (k,)
      found |= {f"{stack}.mlp_head.{name}": x for name, x in shapes.items()}
  return found


def public_model(params: Any) -> dict[str, Any]:
  """Values of `config.model` that the arrays show.

  Of a model without specific layers, positions of 2 · 30 tokens tell the
  cross-modal one.
  """
  depths = {name: _blocks(tree) for name, tree in params.items()}
  own = params.get("encoder_audio")
  late = params.get(SHARED) or params.get("encoder_late_audio")
  tokens = TOKENS if own is None else len(own["positions"])
  together = SHARED in params and len(late["positions"]) == 2 * tokens
  if own is None and not together:
    tokens = len(late["positions"])
  if own is None:
    width = len(params["embed_audio"]["out"]["bias"])
  else:
    width = own["positions"].shape[1]
  unified = "cross_modal" if together else "unified"
  found = {
    "variant": unified if SHARED in params else "independent",
    "specific_layers": depths.get("encoder_audio", 0),
    "shared_layers": 0 if late is None else _blocks(late),
    "width": width,
    "tokens": tokens,
  }
  if late is not None:
    found["shared_width"] = late["positions"].shape[1]
  return found


# --- Names -------------------------------------------------------------------

_DEAD = re.compile(
  r"([av]_|[av]_s_|s_)trans\.in_proj\.(weight|bias)|"
  r"[av]_trans\.mlp_head\.[01]\.(weight|bias)"
)


def _names(depth: int, late: bool) -> dict[str, str]:
  """Public key -> house path of everything that a model can have.

  Args:
    depth: blocks of every stack.
    late: whether classifiers of a modality belong to stacks of their own.
  """
  pairs, norms, linear = {}, {}, {}
  for stack, house in _STACKS.items():
    pairs[f"{stack}.pos_embed"] = f"{house}/positions"
    norms[f"{stack}.in_layernorm"] = f"{house}/norm_in"
    linear[f"{stack}.in_proj"] = f"{house}/project"
    for i in range(depth):
      block, place = f"{stack}.blocks.{i}", f"{house}/block_{i:02d}"
      norms |= {f"{block}.norm{k}": f"{place}/norm{k}" for k in (1, 2)}
      linear |= {f"{block}.{a}": f"{place}/{b}" for a, b in _BLOCK.items()}
  ends = {"s_trans.mlp_head": "classifier"}
  for m in MODALITIES:
    head = f"{m[0]}_s_trans.mlp_head" if late else f"{m[0]}_mlp"
    ends |= {head: f"classifier_{m}", f"{m[0]}_in_proj": f"embed_{m}"}
  for a, b in ends.items():
    norms[f"{a}.0"], linear[f"{a}.1"] = f"{b}/norm", f"{b}/out"
  for a, b in norms.items():
    pairs |= {f"{a}.{leaf}": f"{b}/{name}" for leaf, name in _LEAVES.items()}
  for a, b in linear.items():
    pairs[f"{a}.weight"] = f"{b}/kernel"
    if not a.endswith("attn.qkv"):
      pairs[f"{a}.bias"] = f"{b}/bias"
  return pairs


def _late(state: Iterable[str]) -> bool:
  return any(re.match(r"[av]_s_trans\.", key) for key in state)


def _depth(names: Iterable[str]) -> int:
  """One more than the highest number of a block, on either side."""
  found = (re.search(r"blocks\.(\d+)\.|/block_(\d+)/", n) for n in names)
  return 1 + max((int(x[1] or x[2]) for x in found if x), default=-1)


def _blocks(tree: Any) -> int:
  return sum(name.startswith("block_") for name in tree)


def _is_dead_projection(key: str, state: Mapping[str, np.ndarray]) -> bool:
  """A stack's projection that does not change the width."""
  stack, _, rest = key.partition(".")
  weight = state.get(f"{stack}.in_proj.weight")
  if not rest.startswith("in_proj.") or weight is None:
    return False
  return weight.shape[0] == weight.shape[-1]


# --- Arrays ------------------------------------------------------------------


def _turned(value: np.ndarray) -> np.ndarray:
  """A linear weight [out in] as [in out], or back."""
  return np.ascontiguousarray(value.T) if value.ndim == 2 else value


def _check_shapes(state: Mapping[str, np.ndarray]) -> None:
  """Compares the shapes in every stack with its positions.

  Raises:
    InputError: names the key and both shapes.
  """
  for key, value in state.items():
    stack, _, rest = key.partition(".")
    table = state.get(f"{stack}.pos_embed")
    if table is None or not rest.startswith("blocks."):
      continue
    d = table.shape[-1]
    shapes = {
      "attn.qkv.weight": (3 * d, d),
      "attn.proj.weight": (d, d),
      "mlp.fc1.weight": (4 * d, d),
      "mlp.fc1.bias": (4 * d,),
      "mlp.fc2.weight": (d, 4 * d),
    }
    wanted = shapes.get(rest.split(".", 2)[2], (d,))
    if value.shape != wanted:
      raise InputError(f"{key!r} has shape {value.shape}; expected {wanted}")
