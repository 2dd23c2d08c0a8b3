"""CAV-MAE: contrastive audio-visual masked autoencoder (arXiv:2210.07839).

As DETECLAP (arXiv:2409.11729, §II), AVSiam and CoAVT describe it; what they
leave open follows the public code:

- the contrastive loss has one direction, from each image to the sounds; its
  vectors are means over the visible tokens;
- a reconstruction target is standardised with the unbiased variance;
- `int(n (1 - ratio))` of n tokens are kept.

The encoder is in `avjax/nn/cav_encoder.py`, what fine-tuning shares in
`avjax/methods/cavmae_base.py`.
"""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from avjax.errors import InputError
from avjax.methods.base import Inputs, Params
from avjax.methods.cavmae_base import CAVMethod
from avjax.methods.cavmae_config import DECODER_SIZES, default_model
from avjax.methods.pretraining import Pretraining, Rows
from avjax.nn import av_encoder, cav_encoder, masking, sizes
from avjax.nn.cav_encoder import (
  ALONE,
  INPUTS,
  TOGETHER,
  CAVEncoder,
  Ids,
  Pass,
  Tokens,
)
from avjax.nn.masking import Keys
from avjax.nn.transformer import NORMAL
from avjax.optim import FROZEN

__all__ = ["CAVMAE", "MaskedAutoencoder", "default_model"]

DECODER = ("decoder", "mask_token", "head_")

# Share of the mask ratio by which both axes are masked in time_frequency.
BOTH = 0.7


class MaskedAutoencoder(CAVEncoder):
  """Encoder, decoder and heads (§II-B of DETECLAP).

  Attributes:
    decoder_size: of the decoder.
  """

  decoder_size: sizes.Size = DECODER_SIZES["B"]

  @nn.compact
  def __call__(
    self, patches: Tokens, passes: Sequence[Pass], ids: Ids
  ) -> dict[str, Tokens]:
    """What the passes give.

    Args:
      patches: raw patches [b n p] by modality.
      passes: through the joint block; the first decodes if it is TOGETHER.
      ids: kept tokens [b k] by modality.

    Returns:
      'joint': {'av': [b k d]}; 'contrast': mean over the tokens of a modality's
      own pass [b d], before L2; 'decoded' [b n d] and 'prediction' [b n p].
    """
    encoded = self.encode(patches, passes, ids)
    out = {"joint": {}, "contrast": {}, "decoded": {}, "prediction": {}}
    for (_, names), x in zip(passes, encoded, strict=True):
      if len(names) == 1:
        out["contrast"][names[0]] = x.astype(jnp.float32).mean(1)
        continue
      out["joint"]["av"] = x
      out["decoded"] = self.decode(x, patches, ids)
    for m, x in out["decoded"].items():
      width = patches[m].shape[2]
      out["prediction"][m] = av_encoder.dense(x, width, f"head_{m}")
    return out

  def decode(
    self, x: Float[Array, "b k d"], patches: Tokens, ids: Ids
  ) -> Tokens:
    """One decoder over both: visible and mask tokens in their places."""
    d, start, places = self.decoder_size.width, 0, []
    x, whole = av_encoder.dense(x, d, "decoder_project"), []
    blank = self.param("mask_token", NORMAL, (d,))
    for m, raw in patches.items():
      kept = x[:, start : (start := start + ids[m].shape[1])]
      whole.append(masking.unshuffle(kept, ids[m], blank, raw.shape[1]))
      places.append(sum(self.places(m, d, "decoder_")))
    x = jnp.concatenate(whole, 1) + jnp.concatenate(places).astype(x.dtype)
    size = self.decoder_size
    x = self.transformer("decoder", size.depth, size, norm=True)(x)
    first = whole[0].shape[1]
    return dict(zip(patches, jnp.split(x, [first], axis=1), strict=True))


class CAVMAE(Pretraining, CAVMethod):
  """Pretraining; `config.model` as `cavmae_config.default_model` has it.

  An example that lacks a modality is left out of that modality's loss, and
  out of the contrastive loss both as anchor and as candidate.
  """

  modes = ()
  fixed_positions = True

  def __init__(self, config: Any):
    super().__init__(config)
    # A branch of weight 0 is not computed.
    self.passes = [TOGETHER] if self.model.mae_weight else []
    if self.model.contrast_weight:
      self.passes += ALONE.values()

  def autoencoder(self, inputs: Inputs) -> MaskedAutoencoder:
    """The Flax module that is pretrained.

    Raises:
      InputError: a modality is not among the inputs.
    """
    for m, key in INPUTS.items():
      if key not in inputs:
        raise InputError(f"CAV-MAE needs {key!r} in the inputs for its {m}")
    size = sizes.resolve(self.model, "decoder_", DECODER_SIZES)
    return self.encoder(inputs, MaskedAutoencoder, decoder_size=size)

  def init(self, rng: jax.Array, inputs: Inputs) -> Params:
    """See `Method.init`."""
    module = self.autoencoder(inputs)
    ids = self.draw(inputs, rng)
    return self.first_params(self.draw_params(rng, inputs, module, ids))

  def noise(
    self, m: str, keys: Keys, grid: tuple[int, int]
  ) -> Float[Array, "b n"]:
    """See `CAVMethod.noise`; audio in the structure that `masking` names."""
    noise, kind = super().noise(m, keys, grid), self.model.masking
    if m != "audio" or kind == "unstructured":
      return noise
    rows, columns = lines(kind, grid, self.model.mask_audio)
    return masking.whole_lines(noise, keys, grid, rows=rows, columns=columns)

  def example_rows(
    self, params: Params, inputs: Inputs, rng: jax.Array
  ) -> tuple[Rows, dict[str, jax.Array]]:
    """See `Pretraining.example_rows`."""
    ids = self.draw(inputs, rng)
    out = self.apply(self.autoencoder(inputs), params, inputs, self.passes, ids)
    seen = {f"{k}/{m}": x for k, by in out.items() for m, x in by.items()}
    rows = {k: x for k, x in seen.items() if k.startswith("contrast/")}
    if self.model.mae_weight:
      removed = {
        m: masking.removed(ids[m], x.shape[1])
        for m, x in out["prediction"].items()
      }
      errors, more = self.errors(out["prediction"], inputs, removed)
      rows, seen = {**rows, **errors}, {**seen, **more}
    return rows, seen

  def reconstruct(
    self, params: Params, inputs: Inputs, rng: jax.Array
  ) -> dict[str, jax.Array]:
    """Pictures of what the model makes of masked inputs.

    Returns:
      '<m>/input', 'joint/<m>/output' and 'joint/<m>/mask' of the input's
      shape, the targets' statistics undone; mask is true where a patch was
      removed. What fills no patch is shown as it is.
    """
    module = self.autoencoder(inputs)
    ids = self.draw(inputs, rng)
    out = self.apply(module, params, inputs, [TOGETHER], ids)
    removed = {
      m: masking.removed(ids[m], x.shape[1])
      for m, x in out["prediction"].items()
    }
    return cav_encoder.pictures(inputs, out["prediction"], removed, self.model)

  def group(self, path: str) -> str:
    """See `CAVMethod.group`; fixed tables and an unused decoder, too."""
    if path.startswith(("positions_", "decoder_positions_")):
      return FROZEN
    if not self.model.mae_weight and path.startswith(DECODER):
      return FROZEN
    return super().group(path)


def lines(kind: str, grid: tuple[int, int], ratio: float) -> tuple[int, int]:
  """Mel rows and time columns that structured masking removes (public code).

  All of the ratio on one axis, or BOTH of it on each. The number of tokens
  that are kept does not depend on it: `masking.whole_lines` fills up.
  """
  rows, columns = grid
  return {
    "time": (0, int(columns * ratio)),
    "frequency": (int(rows * ratio), 0),
    "time_frequency": (int(rows * ratio * BOTH), int(columns * ratio * BOTH)),
  }[kind]
