"""Weights of the Audio Spectrogram Transformer (AST, arXiv:2104.01778).

https://github.com/YuanGongND/ast (`.pth`), and the same models for the library
`transformers` (`MIT/ast-finetuned-…`, safetensors). AST is a ViT with a CLS and
a distillation token that reads a log-mel spectrogram: its kernel, of one
channel, has mel bins in rows and time in columns, and so has its grid of
positions. It becomes an image tree, see `avjax/weights/image.py`, with
`positions` of that grid and a kernel [h w 1 d]. The distillation token, its
position and the classifiers have no use here: they stand under `unused/`.
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from avjax.errors import InputError
from avjax.weights import vit

PATCH, MELS = 16, 128
STRIDES = (10, 12, 14, 16)  # of mel bins and of frames alike
FRAMES = (1_024, 512, 128)  # AudioSet, ESC-50, Speech Commands


def _places(length: int, stride: int) -> int:
  return (length - PATCH) // stride + 1


# Patches -> (mel rows, time columns). A file tells the product alone.
GRIDS = {
  _places(MELS, stride) * _places(frames, stride): (
    _places(MELS, stride),
    _places(frames, stride),
  )
  for frames in FRAMES
  for stride in STRIDES
}
_PREFIX = re.compile(r"(module\.)?(v\.|audio_spectrogram_transformer\.)?")
# Names in `transformers` -> in timm, of whose DeiT AST is made.
_ROOTS = {
  "embeddings.cls_token": "cls_token",
  "embeddings.distillation_token": "dist_token",
  "embeddings.position_embeddings": "pos_embed",
  "embeddings.patch_embeddings.projection": "patch_embed.proj",
  "layernorm": "norm",
  "classifier.layernorm": "mlp_head.0",
  "classifier.dense": "mlp_head.1",
}
_BLOCK = {
  "layernorm_before": "norm1",
  "attention.output.dense": "attn.proj",
  "layernorm_after": "norm2",
  "intermediate.dense": "mlp.fc1",
  "output.dense": "mlp.fc2",
}
_PARTS = ("query", "key", "value")
_QUERY = re.compile(
  r"encoder\.layer\.(\d+)\.attention\.attention\.(\w+)\.(\w+)"
)
_NEEDED = ("pos_embed", "cls_token", "patch_embed.proj.weight")


def is_ast(state: Mapping[str, np.ndarray]) -> bool:
  """Whether a file is AST's: a distilled ViT under `v.`, or of one channel."""
  if any(re.match(r"(module\.)?v\.blocks\.0\.", name) for name in state):
    return True
  kernel = next((x for n, x in state.items() if n.endswith(".projection.weight")
                 and "embeddings.patch_embeddings" in n), None)  # fmt: skip
  distilled = any(n.endswith("embeddings.distillation_token") for n in state)
  return distilled and kernel is not None and kernel.shape[1] == 1


def knows(name: str) -> bool:
  """Whether AST has a parameter of this name."""
  short = _PREFIX.sub("", name, count=1)
  if _QUERY.fullmatch(short):
    return True
  own = r"(pos_embed|cls_token|dist_token|(mlp_head\.\d|head|head_dist)\.\w+)"
  timm = _timm_name(short)
  return bool(re.fullmatch(own, timm) or vit.torch_name(timm))


def to_image(state: Mapping[str, np.ndarray]) -> dict[str, Any]:
  """The image tree, whichever of the two namings `state` has.

  Raises:
    InputError: a parameter is missing, patches are not 16 x 16 pixels of one
      channel, or the number of positions is that of no known grid.
  """
  named = _timm(state)
  lost = [name for name in _NEEDED if name not in named]
  if lost:
    raise InputError(f"the weights of an AST have no {lost[0]!r}")
  kernel = named["patch_embed.proj.weight"]
  if kernel.shape[1:] != (1, PATCH, PATCH):
    raise InputError(
      f"the patches have shape {kernel.shape[1:]} (channels, mel bins, "
      f"frames); those of an AST have {(1, PATCH, PATCH)}"
    )
  table = named.pop("pos_embed").reshape(-1, kernel.shape[0])
  if len(table) - 2 not in GRIDS:
    known = ", ".join(f"{r}x{c}" for r, c in GRIDS.values())
    raise InputError(
      f"{len(table)} positions are no CLS, distillation token and known grid "
      f"of mel rows x time columns ({known})"
    )
  tree = vit.tree_of({
    vit.torch_name(name) or vit.UNUSED + name: vit.from_torch(name, value)
    for name, value in named.items()
  })  # fmt: skip
  tree["cls_position"] = table[0]
  tree.setdefault("unused", {})["dist_position"] = table[1]
  rows, columns = GRIDS[len(table) - 2]
  tree["positions"] = table[2:].reshape(rows, columns, -1)
  return tree


def _timm_name(name: str) -> str:
  """timm's name of one that has lost its prefix; itself where it is none."""
  if name in _ROOTS:
    return _ROOTS[name]
  root, _, leaf = name.rpartition(".")
  block = re.fullmatch(r"encoder\.layer\.(\d+)\.(.+)", root)
  if block and block[2] in _BLOCK:
    return f"blocks.{block[1]}.{_BLOCK[block[2]]}.{leaf}"
  return f"{_ROOTS[root]}.{leaf}" if root in _ROOTS else name


def _timm(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Arrays under timm's names, query, key and value in one."""
  short = {_PREFIX.sub("", n, count=1): np.asarray(x) for n, x in state.items()}
  named = {}
  for name, value in short.items():
    part = _QUERY.fullmatch(name)
    if part is None:
      named[_timm_name(name)] = value
    elif part[2] == "query":
      names = [name.replace(".query.", f".{p}.") for p in _PARTS]
      lost = [n for n in names if n not in short]
      if lost:
        raise InputError(f"the weights have {name!r} but not {lost[0]!r}")
      joined = np.concatenate([short[n] for n in names])
      named[f"blocks.{part[1]}.attn.qkv.{part[3]}"] = joined
  return named
