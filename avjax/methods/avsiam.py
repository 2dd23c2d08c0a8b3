"""AVSiam: one ViT for sound and pictures (arXiv:2403.19638).

§3.1 encoder and average pooling, §3.2 masks of many ratios and the two losses.
The mean of the tokens of each modality is contrasted with the other's; two
multimodal layers and a decoder reconstruct what was masked, from the same
tokens (figure 2), without a gradient to the encoder. AVSep
(`model.encoder='separate'`, table 5) has two encoders instead.

What the paper leaves open: `avjax/methods/avsiam_config.py`. Every instance is
encoded once a step. `model.public_base` follows the public Base code.
"""

import re
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from avjax.errors import InputError
from avjax.methods.avsiam_base import SiamMethod
from avjax.methods.avsiam_config import (
  DECODER_SIZES,
  PUBLIC_RATIO,
  default_model,
)
from avjax.methods.base import Inputs, Params
from avjax.methods.pretraining import Pretraining, Rows
from avjax.nn import cav_encoder, masking, siam_encoder, sizes
from avjax.nn.cav_encoder import INPUTS
from avjax.nn.siam_autoencoder import MULTIMODAL, SiamAutoencoder
from avjax.nn.siam_encoder import Slots
from avjax.optim import FROZEN

__all__ = ["AVSiam", "default_model"]

# What reconstruction alone uses.
DECODER = (MULTIMODAL, "decoder", "mask_token", "head_", "encoder_mae_")

AUDIO_NORM = re.compile(r"encoder/.*norm\d?_audio/")

# Share of the mask ratio by which both axes are masked in time_frequency.
BOTH = 0.7


class AVSiam(Pretraining, SiamMethod):
  """Pretraining; `config.model` as `avsiam_config.default_model` has it.

  The batch of every device must hold every ratio as often: `batch_multiple`
  divides it. An example that lacks a modality is left out of that modality's
  loss, and out of the contrastive loss both as anchor and as candidate.
  """

  modes = ()
  pair = ("audio", "video")  # each sound among the images (eq. 1)

  def __init__(self, config: Any):
    super().__init__(config)
    self.batch_multiple = len(self.model.ratios)

  def autoencoder(self, inputs: Inputs) -> SiamAutoencoder:
    """The Flax module that is pretrained.

    Raises:
      InputError: a modality is not among the inputs.
    """
    for m, key in INPUTS.items():
      if key not in inputs:
        raise InputError(f"AVSiam needs {key!r} in the inputs for its {m}")
    return self.encoder(
      inputs,
      SiamAutoencoder,
      multimodal_depth=self.model.multimodal_depth,
      decoder_size=sizes.resolve(self.model, "decoder_", DECODER_SIZES),
      stop_gradient=self.model.stop_gradient,
      zeros=self.model.public_base,
    )

  def passes(self, module: SiamAutoencoder) -> list[Any]:
    """(module, ratios, ending of the noise's names, losses) of every pass."""
    model = self.model
    contrast, decode = bool(model.contrast_weight), bool(model.mae_weight)
    ratios = tuple(model.ratios)
    if not model.public_base:
      return [(module, ratios, "", contrast, decode)]
    both = [(module, ratios, "", True, False)] if contrast else []
    if decode:
      stacks = {**module.stacks, "audio": "encoder_mae_audio"}
      second = module.clone(stacks=stacks)
      both.append((second, (PUBLIC_RATIO,), "_mae", False, True))
    return both

  def init(self, rng: jax.Array, inputs: Inputs) -> Params:
    """See `Method.init`; all parameters, whatever the losses' weights are."""
    module = self.autoencoder(inputs)
    kept = self.draw(inputs, rng, (0.0,), "")
    params = self.draw_params(rng, inputs, module, kept)
    if self.model.public_base:
      stacks = {**module.stacks, "audio": "encoder_mae_audio"}
      second = module.clone(stacks=stacks)
      params = {**self.draw_params(rng, inputs, second, kept), **params}
    return self.first_params(params)

  # --- Masking ---

  def draw(
    self,
    inputs: Inputs,
    rng: jax.Array,
    ratios: tuple[float, ...],
    ending: str = "",
  ) -> dict[str, Slots]:
    """Which ratio every example gets, and which tokens it keeps (figure 3).

    An example's number decides, and its neighbours' in its block of as many
    examples as there are ratios; sound and picture are drawn independently.
    Noise among the inputs is taken as it is: `noise/<m>` of the tokens [b n],
    `noise_ratio/<m>` [b], whose order in the block gives the ratios' order.

    Args:
      inputs: their shapes, and `index`.
      rng: of the step.
      ratios: shares of tokens that are removed.
      ending: of `noise`, for another pass over the same inputs.
    """
    keys, found = masking.draw_keys(inputs, rng), {}
    grids = cav_encoder.grids(inputs, self.model)
    for i, (m, grid) in enumerate(grids.items()):
      own = masking.fold_in(keys, i + (len(grids) if ending else 0))
      shares = inputs.get(f"noise_ratio/{m}")
      if shares is None:
        shares = masking.example_noise(masking.fold_in(own, 2), 1)[:, 0]
      example, slot = siam_encoder.assign(shares, len(ratios))
      noise, n = inputs.get(f"noise{ending}/{m}"), grid[0] * grid[1]
      if noise is None:
        noise = masking.example_noise(own, n)
        if m == "audio" and self.model.audio_masking != "unstructured":
          noise = noise if ending else lines(noise, own, grid, ratios, slot)
      kept = tuple(
        cav_encoder.num_kept(m, n, ratio, "model.ratios with ")
        for ratio in ratios
      )
      order = masking.ids_keep(noise, max(kept))
      found[m] = Slots(n, kept, order, example, slot)
    return found

  # --- Objective ---

  def example_rows(
    self, params: Params, inputs: Inputs, rng: jax.Array
  ) -> tuple[Rows, dict[str, jax.Array]]:
    """See `Pretraining.example_rows`; examples draw in blocks of neighbours.

    Raises:
      InputError: a batch that the number of ratios does not divide.
    """
    rows, seen = {}, {}
    passes = self.passes(self.autoencoder(inputs))
    for module, ratios, ending, pairs, decode in passes:
      kept = self.draw(inputs, rng, ratios, ending)
      out = self.apply(module, params, inputs, kept, decode)
      if pairs:
        rows |= {f"contrast/{m}": x for m, x in out["pooled"].items()}
      if decode:
        removed = {m: kept[m].removed() for m in kept}
        errors, more = self.errors(out["prediction"], inputs, removed)
        rows, seen = {**rows, **errors}, {**seen, **more}
      if ending:
        out = {f"mae_{name}": x for name, x in out.items()}
      seen |= {f"{k}/{m}": x for k, by in out.items() for m, x in by.items()}
    return rows, seen

  def reconstruct(
    self, params: Params, inputs: Inputs, rng: jax.Array
  ) -> dict[str, jax.Array]:
    """Pictures of what the model makes of inputs masked at the last ratio.

    Returns:
      '<m>/input', 'joint/<m>/output' and 'joint/<m>/mask' of the input's
      shape, the targets' statistics undone; mask is true where a patch was
      removed. What fills no patch is shown as it is.
    """
    module, ratios, ending, _, _ = self.passes(self.autoencoder(inputs))[-1]
    kept = self.draw(inputs, rng, ratios[-1:], ending)
    out = self.apply(module, params, inputs, kept)
    removed = {m: kept[m].removed() for m in kept}
    return cav_encoder.pictures(inputs, out["prediction"], removed, self.model)

  def group(self, path: str) -> str:
    """See `SiamMethod.group`; FROZEN where no loss reaches."""
    if path.startswith(DECODER):
      return super().group(path) if self.model.mae_weight else FROZEN
    # The public reconstruction has another encoder for sound.
    alone = self.model.public_base and not self.model.contrast_weight
    return FROZEN if alone and AUDIO_NORM.match(path) else "default"


def lines(
  noise: Float[Array, "b n"],
  keys: masking.Keys,
  grid: tuple[int, int],
  ratios: tuple[float, ...],
  slot: Int[Array, "g r"],
) -> Float[Array, "b n"]:
  """Noise that removes whole rows and columns first (public code).

  BOTH of an example's ratio of each; as many tokens as without stay.
  """
  rows, columns = (
    jnp.asarray([int(size * BOTH * ratio) for ratio in ratios])[slot]
    for size in grid
  )
  return siam_encoder.whole_lines(
    noise, keys, grid, rows.reshape(-1), columns.reshape(-1)
  )
