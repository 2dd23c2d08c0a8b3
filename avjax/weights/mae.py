"""MAE weights of ImageNet (arXiv:2111.06377), with and without the decoder.

https://github.com/facebookresearch/mae, CC-BY-NC 4.0. They become an image
tree, see `avjax/weights/image.py`; what CAV-MAE takes from it is the public
script's choice (arXiv:2210.07839; `src/adapt_vmae_weights.py` there).
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from avjax.weights import vit

_DECODER = {
  "mask_token": "mask_token",
  "decoder_pos_embed": "decoder_positions",
  "decoder_embed.weight": "decoder_project/kernel",
  "decoder_embed.bias": "decoder_project/bias",
  "decoder_norm.weight": "decoder/norm/scale",
  "decoder_norm.bias": "decoder/norm/bias",
  "decoder_pred.weight": "head/kernel",
  "decoder_pred.bias": "head/bias",
}


def name_of(name: str) -> str | None:
  """Name in the image tree of a parameter of MAE; None = unknown."""
  return _DECODER.get(name) or vit.torch_name(name)


def is_mae(state: Mapping[str, np.ndarray]) -> bool:
  """Whether a ViT without a classifier is MAE's.

  Its positions are a fixed table whose row for the CLS is zero; a supervised
  ViT learns all of them.
  """
  if any(name in _DECODER for name in state):
    return True
  bare = not any(name.startswith(("head.", "fc_norm.")) for name in state)
  table = state.get("pos_embed")
  return bare and table is not None and not np.any(np.asarray(table)[0, 0])


def to_image(state: Mapping[str, np.ndarray]) -> dict[str, Any]:
  """The image tree; without a decoder where the file has none.

  Raises:
    InputError: positions of no square grid.
  """
  named = {
    name_of(name) or vit.UNUSED + name: vit.from_torch(name, value)
    for name, value in state.items()
  }
  return vit.tree_of(named)
