"""ViT weights of ImageNet-21k: the JAX release's npz files, and timm's names.

arXiv:2010.11929; https://github.com/google-research/vision_transformer. Either
becomes an image tree, see `avjax/weights/image.py`. The classifier and
`pre_logits` have no use here: they stand under `unused/`.
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from avjax import trees
from avjax.errors import InputError
from avjax.weights import image

# Name in a PyTorch ViT -> name in the image tree; {} is the block.
_TORCH_BLOCK = {
  "norm1": "norm1",
  "attn.qkv": "attention/qkv",
  "attn.proj": "attention/out",
  "norm2": "norm2",
  "mlp.fc1": "mlp/fc1",
  "mlp.fc2": "mlp/fc2",
}
_TORCH_LEAF = {"weight": "kernel", "bias": "bias"}
_TORCH = {
  "cls_token": "cls",
  "pos_embed": "positions",
  "patch_embed.proj": "embed",
  "norm": "encoder/norm",
}
_JAX_BLOCK = {
  "LayerNorm_0": "norm1",
  "MultiHeadDotProductAttention_1": "attention",
  "LayerNorm_2": "norm2",
  "MlpBlock_3/Dense_0": "mlp/fc1",
  "MlpBlock_3/Dense_1": "mlp/fc2",
}
_JAX = {
  "cls": "cls",
  "Transformer/posembed_input/pos_embedding": "positions",
  "embedding/kernel": "embed/kernel",
  "embedding/bias": "embed/bias",
  "Transformer/encoder_norm/scale": "encoder/norm/scale",
  "Transformer/encoder_norm/bias": "encoder/norm/bias",
}
_PARTS = ("query", "key", "value")
UNUSED = "unused/"  # before the file's own name, in the image tree


def torch_name(name: str) -> str | None:
  """Name in the image tree of a parameter under timm's name; None = unknown."""
  if name in _TORCH and name in ("cls_token", "pos_embed"):
    return _TORCH[name]
  root, _, last = name.rpartition(".")
  leaf = _TORCH_LEAF.get(last)
  block = re.fullmatch(r"(blocks|decoder_blocks)\.(\d+)\.(.+)", root)
  if leaf is None:
    return None
  if block and block[3] in _TORCH_BLOCK:
    stack = "decoder" if block[1].startswith("decoder") else "encoder"
    inner = _TORCH_BLOCK[block[3]]
    path = f"{stack}/block_{int(block[2]):02d}/{inner}"
    return f"{path}/{_scale(leaf) if 'norm' in inner else leaf}"
  if root not in _TORCH:
    return None
  norm = root == "norm"
  return f"{_TORCH[root]}/{_scale(leaf) if norm else leaf}"


def from_torch(name: str, value: np.ndarray) -> np.ndarray:
  """A PyTorch parameter in the house's layout.

  Linear layers [out in] -> [in out]; convolutions [d c h w] -> [h w c d].
  """
  if value.ndim == 4:
    return value.transpose(2, 3, 1, 0)
  if value.ndim == 2 and name.endswith("weight"):
    return value.T
  return value


def jax_name(name: str) -> str | None:
  """Name in the image tree of a parameter of an npz file; None = unknown.

  Query, key and value come as `attention/query/kernel` ….
  """
  if name in _JAX:
    return _JAX[name]
  block = re.fullmatch(r"Transformer/encoderblock_(\d+)/(.+)/(\w+)", name)
  if not block:
    return None
  for theirs, ours in _JAX_BLOCK.items():
    part = block[2].removeprefix(theirs)
    attention = ours == "attention" and part[1:] in (*_PARTS, "out")
    if block[2].startswith(theirs) and (attention or not part):
      return f"encoder/block_{int(block[1]):02d}/{ours}{part}/{block[3]}"
  return None


def to_image(state: Mapping[str, np.ndarray]) -> dict[str, Any]:
  """An image tree, whichever of the two namings `state` has.

  Raises:
    InputError: a query without its key and value; positions of no square grid.
  """
  if any(jax_name(name) for name in state):
    return tree_of(_joined(state))
  named = {
    torch_name(name) or UNUSED + name: from_torch(name, value)
    for name, value in state.items()
  }
  return tree_of(named)


def tree_of(named: Mapping[str, np.ndarray]) -> dict[str, Any]:
  """Renamed arrays as a tree: positions and CLS apart, tokens as vectors."""
  flat = {}
  for path, value in named.items():
    if path.endswith("positions"):
      grid, cls = image.split_positions(value)
      flat[path] = grid
      if cls is not None and path == "positions":
        flat["cls_position"] = cls
    elif path in ("cls", "mask_token"):
      flat[path] = value.reshape(-1)
    else:
      flat[path] = value
  return trees.unflatten(flat)


def _joined(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """npz arrays renamed, heads flattened, query, key and value in one."""
  flat = {}
  for name, value in state.items():
    path = jax_name(name) or UNUSED + name
    parts = re.fullmatch(r"(.+/attention)/(query|key|value|out)/(\w+)", path)
    if parts is None:
      flat[path] = value
    elif parts[2] == "out":
      rows = (-1,) if parts[3] == "kernel" else ()
      flat[path] = value.reshape(*rows, value.shape[-1])
    elif parts[2] == "query":
      names = [name.replace("/query/", f"/{part}/") for part in _PARTS]
      lost = [n for n in names if n not in state]
      if lost:
        raise InputError(f"the weights have {name!r} but not {lost[0]!r}")
      rows = value.shape[:1] if parts[3] == "kernel" else ()
      flat[f"{parts[1]}/qkv/{parts[3]}"] = np.concatenate(
        [state[n].reshape(*rows, -1) for n in names], axis=-1
      )
  return flat


def _scale(leaf: str) -> str:
  return "scale" if leaf == "kernel" else leaf
