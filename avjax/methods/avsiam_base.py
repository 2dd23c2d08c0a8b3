"""What pretraining and fine-tuning of AVSiam share.

The encoder is in `avjax/nn/siam_encoder.py`. Weight decay applies to every
parameter of this family.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from avjax import losses
from avjax.errors import InputError
from avjax.methods.avsiam_config import check
from avjax.methods.base import Inputs, Loaded, ParamInfo, Params
from avjax.methods.cavmae_base import PatchMethod
from avjax.nn import cav_encoder
from avjax.nn.cav_encoder import INPUTS
from avjax.nn.siam_autoencoder import MULTIMODAL
from avjax.nn.siam_encoder import SiamEncoder
from avjax.weights import transfer


class SiamMethod(PatchMethod):
  """What pretraining and fine-tuning share."""

  check = staticmethod(check)  # of `config.model`
  optional = ("classifier_", "head_")

  def encoder(
    self, inputs: Inputs, cls: Any = SiamEncoder, **more: Any
  ) -> SiamEncoder:
    """The Flax module for inputs of this size."""
    model, apart = self.model, self.model.encoder == "separate"
    return cls(
      size=self.size,
      grids=cav_encoder.grids(inputs, model),
      stack={k: model[k] for k in ("attention", "remat", "scan")},
      stacks={m: f"encoder_{m}" if apart else "encoder" for m in INPUTS},
      norms=model.norms,
      eps=model.eps,
      double=model.double_input,
      **more,
    )

  def embed(self, params: Params, inputs: Inputs) -> dict[str, jax.Array]:
    """Retrieval features: what the contrastive loss compares, unmasked.

    Returns:
      'audio' and 'video' [b d] of the modalities in the inputs: the mean over
      all tokens after the encoder's last LayerNorm, of length 1.
    """
    tokens = self.apply(self.encoder(inputs), params, inputs)
    pooled = {m: x.astype(jnp.float32).mean(1) for m, x in tokens.items()}
    return {m: losses.unit(x) for m, x in pooled.items()}

  def param_info(self, path: str) -> ParamInfo:
    """Layer 0 is the input, then the encoder's blocks, then the rest."""
    stack, _, rest = path.partition("/")
    layer = self.num_layers + 1
    if stack.startswith(("embed_", "positions_")):
      layer = 0
    elif stack.startswith("encoder") and rest.startswith("block_"):
      layer = 1 + int(rest.split("/")[0].removeprefix("block_"))
    return ParamInfo(layer, self.group(path))

  def group(self, path: str) -> str:
    """The parameter group: that of the multimodal layers, or the default."""
    own = path.startswith(f"{MULTIMODAL}/")
    return MULTIMODAL if own else "default"

  def adapt(
    self, params: Params, source: Params, source_config: Mapping[str, Any]
  ) -> Loaded:
    """See `Method.adapt`: from pretraining or fine-tuning of this family.

    Position tables of another clip length or picture size are resized by
    `transfer.time_axis` and `transfer.picture`; a classifier of other classes
    keeps its initial values. Separate encoders may start from a shared one.

    Raises:
      InputError: another number of blocks, or a shape that nothing changes.
    """
    del source_config
    for stack in ("encoder", "encoder_audio", "encoder_video"):
      check_blocks(params, source, stack)
    return transfer.fill(
      params, source, candidates, reshape=self.tables(), optional=self.optional
    )


def candidates(path: str) -> list[str]:
  """Where another model of the family may have a parameter."""
  stack, _, rest = path.partition("/")
  m = next((m for m in INPUTS if stack == f"encoder_{m}"), "")
  names = [path]
  if m:
    root, _, leaf = rest.rpartition("/")
    names += [f"encoder/{rest}", f"encoder/{root}_{m}/{leaf}"]
  return names


def check_blocks(params: Params, source: Params, stack: str) -> None:
  """Compares the blocks of an encoder with those of a source.

  Raises:
    InputError: the source has another number; names both.
  """
  if stack not in params:
    return
  origin = source.get(stack, source.get("encoder", {}))
  found, wanted = (
    sum(name.startswith("block_") for name in tree)
    for tree in (origin, params[stack])
  )
  if found and found != wanted:
    raise InputError(
      f"the source has {found} blocks in {stack}, the model {wanted}"
    )
