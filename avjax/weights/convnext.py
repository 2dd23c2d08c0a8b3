"""Weights of ConvNeXt: torchvision's, and UAVM's audio feature extractor.

https://github.com/pytorch/vision: `features.`, `classifier.`; a stem of three
channels. https://github.com/YuanGongND/uavm: the same modules in a row, so
`module.model.0.` and `module.model.2.`; a stem of one channel. Both directions
are exact.
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from avjax import trees
from avjax.errors import InputError
from avjax.nn import convnext
from avjax.nn.convnext import PATCH
from avjax.weights import transfer

_FEATURES = re.compile(r"(?:module\.)?(?:features|model\.0)\.(.+)")
_CLASSIFIER = re.compile(r"(?:module\.)?(?:classifier|model\.2)\.(.+)")
# Modules by place in a block, a step down, the stem and the classifier.
_BLOCK = {"0": "conv", "2": "norm", "3": "mlp/fc1", "5": "mlp/fc2"}
_DOWN = {"0": "norm", "1": "down"}
_STEM = {"0": "embed", "1": "embed_norm"}
_HEAD = {"0": "norm", "2": "out"}


def is_convnext(state: Mapping[str, np.ndarray]) -> bool:
  """Whether a file is a ConvNeXt's, of either naming."""
  return any(name_of(name) == "stage_0/block_00/layer_scale" for name in state)


def knows(name: str) -> bool:
  """Whether ConvNeXt has a parameter of this name."""
  return name_of(name) is not None


def name_of(name: str) -> str | None:
  """The house's name of a parameter; None = unknown."""
  head, inner = _CLASSIFIER.fullmatch(name), _FEATURES.fullmatch(name)
  if head:
    return _leaf("classifier/", _HEAD, head[1])
  if not inner:
    return None
  place, _, rest = inner[1].partition(".")
  if not place.isdigit() or int(place) > 7:
    return None
  if place == "0":
    return _leaf("", _STEM, rest)
  stage = int(place) // 2
  if int(place) % 2 == 0:
    return _leaf(f"stage_{stage}/", _DOWN, rest)
  block = re.fullmatch(r"(\d+)\.(?:block\.(.+)|layer_scale)", rest)
  if not block:
    return None
  root = f"stage_{stage}/block_{int(block[1]):02d}/"
  return _leaf(root, _BLOCK, block[2]) if block[2] else f"{root}layer_scale"


def _leaf(root: str, table: Mapping[str, str], rest: str) -> str | None:
  place, _, leaf = rest.partition(".")
  if place not in table or leaf not in ("weight", "bias"):
    return None
  kernel = "scale" if "norm" in table[place] else "kernel"
  return f"{root}{table[place]}/{leaf.replace('weight', kernel)}"


def to_house(
  state: Mapping[str, np.ndarray],
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
  """Parameters under the house's names, and arrays that are none.

  Raises:
    InputError: a parameter is missing.
  """
  flat, aside = {}, {}
  for name, value in state.items():
    path = name_of(name)
    if path is None:
      aside[name] = value
    else:
      flat[path] = _layout(path, np.asarray(value))
  public = _public_names(flat)
  lost = [name for path, name in public.items() if path not in flat]
  if lost:
    raise InputError(f"the weights of a ConvNeXt have no {lost[0]!r}")
  return trees.unflatten(flat), aside


def to_reference(
  params: Any, aside: Mapping[str, np.ndarray] | None = None
) -> dict[str, np.ndarray]:
  """The inverse of `to_house`: UAVM's names for a stem of one channel."""
  flat = {path: np.asarray(x) for path, x in trees.flatten(params).items()}
  names = _public_names(flat)
  state = {names[path]: _unlayout(path, x) for path, x in flat.items()}
  return state | dict(aside or {})


def public_model(params: Any) -> dict[str, Any]:
  """Values of `config.model` that the arrays of a classifier of sounds show.

  Raises:
    InputError: the stem is one of images.
  """
  if len(params["embed"]["kernel"]) != PATCH * PATCH:
    raise InputError(
      "the weights are of an image model: give --config, the model that they "
      "are to start"
    )
  size = convnext.size_of(params)
  names = [name for name, known in convnext.SIZES.items() if known == size]
  values = {"size": names[0]} if names else {
    "width": size.width, "depths": size.depths
  }  # fmt: skip
  classes = len(params["classifier"]["out"]["bias"])
  return {**values, "classes": {"label": classes}}


def _public_names(flat: Mapping[str, np.ndarray]) -> dict[str, str]:
  """House path -> public name of all that a model of this size has.

  Raises:
    InputError: there is no stem.
  """
  if "embed/kernel" not in flat or "embed/bias" not in flat:
    raise InputError("the weights of a ConvNeXt have no stem")
  sound = len(flat["embed/kernel"]) == PATCH * PATCH
  names = ("module.model.0", "module.model.2") if sound else (
    "features", "classifier"
  )  # fmt: skip
  depths = convnext.size_of(trees.unflatten(flat)).depths
  public = [f"{names[0]}.0.{place}" for place in _STEM]
  for i, depth in enumerate(depths):
    stage = f"{names[0]}.{2 * i + 1}"
    public += [f"{stage}.{j}.block.{n}" for j in range(depth) for n in _BLOCK]
    public += [f"{names[0]}.{2 * i}.{place}" for place in _DOWN if i]
  if any(path.startswith("classifier/") for path in flat):
    public += [f"{names[1]}.{place}" for place in _HEAD]
  public = [f"{name}.{leaf}" for name in public for leaf in ("weight", "bias")]
  public += [
    f"{names[0]}.{2 * i + 1}.{j}.layer_scale"
    for i, depth in enumerate(depths)
    for j in range(depth)
  ]
  return {str(name_of(name)): name for name in public}


def _layout(path: str, value: np.ndarray) -> np.ndarray:
  """PyTorch's [out in], [d c h w] and [d 1 1] in the house's layouts."""
  if path.endswith("/conv/kernel"):
    return value.transpose(2, 3, 1, 0)
  if value.ndim == 4:
    return transfer.patch_rows(value)
  if path.endswith("layer_scale"):
    return value.reshape(-1)
  return value.T if value.ndim == 2 else value


def _unlayout(path: str, value: np.ndarray) -> np.ndarray:
  if path.endswith("/conv/kernel"):
    return np.ascontiguousarray(value.transpose(3, 2, 0, 1))
  if path.endswith(("embed/kernel", "down/kernel")):
    side = PATCH if path == "embed/kernel" else 2
    return transfer.patch_kernel(value, len(value) // side**2, path)
  if path.endswith("layer_scale"):
    return value.reshape(-1, 1, 1)
  return np.ascontiguousarray(value.T) if value.ndim == 2 else value
