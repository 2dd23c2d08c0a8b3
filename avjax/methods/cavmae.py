"""CAV-MAE: contrastive audio-visual masked autoencoder (arXiv:2210.07839).

As DETECLAP (arXiv:2409.11729, §II), AVSiam and CoAVT describe it; what they
leave open follows the public code:

- the contrastive loss has one direction, from each image to the sounds; its
  vectors are means over the visible tokens;
- a reconstruction target is standardised with the unbiased variance;
- `int(n (1 - ratio))` of n tokens are kept.

The encoder is in `avjax/nn/cav_encoder.py`. Weight decay applies to every
parameter; those that no loss reaches are of the group `frozen`.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from avjax import losses
from avjax.errors import InputError
from avjax.methods.base import Inputs, Loaded, Method, ParamInfo, Params
from avjax.methods.cavmae_config import DECODER_SIZES, check, default_model
from avjax.nn import av_encoder, cav_encoder, masking, sizes, tokenizers
from avjax.nn.cav_encoder import (
  ALONE,
  INPUTS,
  TOGETHER,
  CAVEncoder,
  Ids,
  Pass,
  Tokens,
)
from avjax.nn.transformer import stack_layers, unstack_layers
from avjax.optim import FROZEN
from avjax.weights import transfer

__all__ = ["CAVMAE", "CAVMethod", "MaskedAutoencoder", "default_model"]

# LayerNorms of the joint block, and the ending that tells their set.
NORM = re.compile(r"encoder_joint/(?:block_00/)?norm\d?(|_audio|_video)/")
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
    blank = self.param("mask_token", cav_encoder.normal, (d,))
    for m, raw in patches.items():
      kept = x[:, start : (start := start + ids[m].shape[1])]
      whole.append(masking.unshuffle(kept, ids[m], blank, raw.shape[1]))
      places.append(sum(self.places(m, d, "decoder_")))
    x = jnp.concatenate(whole, 1) + jnp.concatenate(places).astype(x.dtype)
    size = self.decoder_size
    x = self.transformer("decoder", size.depth, size, norm=True)(x)
    first = whole[0].shape[1]
    return dict(zip(patches, jnp.split(x, [first], axis=1), strict=True))


class CAVMethod(Method):
  """What pretraining and fine-tuning share."""

  fixed_positions = False
  passes: Sequence[Pass] = ()  # of the training, through the joint block

  def __init__(self, config: Any):
    super().__init__(config)
    self.model = check(config.model)
    self.size = sizes.resolve(self.model)
    self.num_layers = self.size.depth

  def encoder(
    self, inputs: Inputs, cls: Any = CAVEncoder, **more: Any
  ) -> CAVEncoder:
    """The Flax module for inputs of this size."""
    stack = {k: self.model[k] for k in ("attention", "remat", "scan")}
    grids = cav_encoder.grids(inputs, self.model)
    return cls(self.size, grids, self.fixed_positions, stack, **more)

  def apply(
    self, module: CAVEncoder, params: Params, inputs: Inputs, *rest: Any
  ) -> Any:
    """Runs a module on the inputs' patches, in the dtype of the config."""
    cav_encoder.check_places(params, module.grids)
    patches = cav_encoder.patches(inputs, self.model)
    patches = {m: patches[m].astype(self.config.dtype) for m in module.grids}
    if self.model.scan:
      params = stack_layers(params)
      joint = unstack_layers(params["encoder_joint"])  # never scanned
      params = {**params, "encoder_joint": joint}
    return module.apply({"params": params}, patches, *rest)

  def draw_params(self, rng: jax.Array, inputs: Inputs, module: CAVEncoder,
                  *rest: Any) -> Params:  # fmt: skip
    """Initial parameters under per-layer names, whatever `scan` says."""
    passes = [ALONE[m] for m in module.grids]
    passes = [("", tuple(module.grids)), *passes]
    module = module.clone(stack={**module.stack, "scan": False})
    patches = cav_encoder.patches(inputs, self.model)
    params = module.init(rng, patches, passes, *rest)["params"]
    return cav_encoder.first_values(params)

  def embed(self, params: Params, inputs: Inputs) -> dict[str, jax.Array]:
    """Retrieval features: what the contrastive loss compares, unmasked.

    Returns:
      'audio' and 'video' [b d] of the modalities in the inputs: the mean over
      all tokens after the modality's own pass, of length 1.
    """
    module = self.encoder(inputs)
    passes = [ALONE[m] for m in module.grids]
    tokens = self.apply(module, params, inputs, passes)
    pooled = [x.astype(jnp.float32).mean(1) for x in tokens]
    return dict(zip(module.grids, map(losses.unit, pooled), strict=True))

  def param_info(self, path: str) -> ParamInfo:
    """Layer 0 is the input, then the blocks; the joint block is the last."""
    stack, _, rest = path.partition("/")
    layer = self.num_layers + 1
    if stack.startswith(("embed_", "positions_", "modality_token_")):
      layer = 0
    elif stack.startswith("encoder_") and rest.startswith("block_"):
      block = int(rest.split("/")[0].removeprefix("block_"))
      joint = stack == "encoder_joint"
      layer = self.num_layers if joint else block + 1
    return ParamInfo(layer, self.group(path))

  def group(self, path: str) -> str:
    """FROZEN where no pass of the training gets: PyTorch, which the numbers
    come from, leaves parameters without gradient alone, decay included.
    """
    norm = NORM.match(path)
    if norm and norm[1] not in [ending for ending, _ in self.passes]:
      return FROZEN
    reached = {m for _, names in self.passes for m in names}
    root = path.split("/")[0]
    missed = tuple(m for m in INPUTS if m not in reached)
    return FROZEN if root.endswith(missed) else "default"

  def adapt(
    self, params: Params, source: Params, source_config: Mapping[str, Any]
  ) -> Loaded:
    """See `Method.adapt`: from pretraining or fine-tuning of this family.

    Position tables of another clip length or picture size are resized by
    `transfer.time_axis` and `transfer.picture`; a classifier of other classes
    keeps its initial values. {'audio': …, 'video': …} of two sources gives
    each branch its own; what both share comes from the video's.
    """
    mels = self.config.data.fbank.num_mels // self.model.patch_audio[0]
    tables = {}
    for prefix in ("", "decoder_"):
      tables[f"{prefix}positions_audio"] = transfer.time_axis(mels)
      tables[f"{prefix}positions_video"] = transfer.picture
    two = set(source) == set(INPUTS)

    def candidates(path: str) -> list[str]:
      m = "audio" if "_audio" in path else "video"
      return [f"{m}/{path}" if two else path]

    return transfer.fill(
      params,
      source,
      candidates,
      reshape=tables,
      optional=("classifier/out", "head_"),
    )


class CAVMAE(CAVMethod):
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
    return self.draw_params(rng, inputs, module, self.draw(inputs, rng))

  # --- Masking ---

  def draw(self, inputs: Inputs, rng: jax.Array) -> Ids:
    """Kept tokens by modality, in ascending order of noise.

    Noise among the inputs is taken as it is; else every example draws by its
    own index, the audio in the structure that `masking` names.
    """
    b = len(inputs[INPUTS["audio"]])
    index = inputs.get("index", jnp.arange(b, dtype=jnp.uint32))
    keys, ids = masking.example_keys(rng, index), {}
    grids = cav_encoder.grids(inputs, self.model)
    for i, (m, grid) in enumerate(grids.items()):
      noise, n = inputs.get(f"noise/{m}"), grid[0] * grid[1]
      ratio, own = self.model[f"mask_{m}"], masking.fold_in(keys, i)
      if noise is None:
        noise = masking.example_noise(own, n)
        if m == "audio" and self.model.masking != "unstructured":
          rows, columns = lines(self.model.masking, grid, ratio)
          noise = masking.whole_lines(
            noise, own, grid, rows=rows, columns=columns
          )
      ids[m] = masking.ids_keep(noise, int(n * (1 - ratio)))
    return ids

  # --- Objective ---

  def loss(
    self, params: Params, inputs: Inputs, rng: jax.Array, step: jax.Array
  ) -> tuple[jax.Array, dict[str, Any]]:
    """mae_weight (L_a + L_v) + contrast_weight L_c (DETECLAP, eq. 7).

    Raises:
      InputError: a batch that `group_size` does not divide.
    """
    del step
    model, ids = self.model, self.draw(inputs, rng)
    module = self.autoencoder(inputs)
    out = self.apply(module, params, inputs, self.passes, ids)
    total, metrics, seen = 0.0, {}, {}
    if model.mae_weight:
      metrics, seen = self.reconstruction(out["prediction"], inputs, ids)
      total = model.mae_weight * sum(metrics.values())
    if model.contrast_weight:
      loss, accuracy = self.contrast(out["contrast"], inputs)
      total = total + model.contrast_weight * loss
      metrics["loss_contrast"] = loss
      metrics["contrast_accuracy"] = accuracy
    seen |= {f"{k}/{m}": x for k, by in out.items() for m, x in by.items()}
    return total, {"metrics": metrics, "intermediates": seen}

  def reconstruction(
    self, prediction: Tokens, inputs: Inputs, ids: Ids
  ) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """L_a and L_v over the removed patches; targets and masks."""
    metrics, seen = {}, {}
    for m, x in cav_encoder.patches(inputs, self.model).items():
      target, _, _ = self.standardise(m, x)
      removed = masking.removed(ids[m], x.shape[1])
      metrics[f"loss_{m}"] = losses.masked_mse(
        prediction[m], target, removed, present(inputs, (m,))
      )
      seen[f"target/{m}"], seen[f"removed/{m}"] = target, removed
    return metrics, seen

  def standardise(self, m: str, patches: Float[Array, "b n p"]) -> Any:
    """Targets, and the mean and deviation that undo them."""
    kind = "patch" if self.model.norm_pix else "none"
    return tokenizers.standardise(patches, m, kind, ddof=1)

  def contrast(
    self, pooled: Mapping[str, Float[Array, "b d"]], inputs: Inputs
  ) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """L_c and its accuracy: each image among the sounds (DETECLAP, eq. 4)."""
    return losses.contrastive(
      pooled["video"],
      pooled["audio"],
      self.model.temperature,
      two_way=self.model.contrast_two_way,
      group_size=self.model.group_size,
      weights=present(inputs, tuple(INPUTS)),
    )

  def reconstruct(
    self, params: Params, inputs: Inputs, rng: jax.Array
  ) -> dict[str, jax.Array]:
    """Pictures of what the model makes of masked inputs.

    Returns:
      '<m>/input', 'joint/<m>/output' and 'joint/<m>/mask' of the input's
      shape, the targets' statistics undone; mask is true where a patch was
      removed. What fills no patch is shown as it is.
    """
    ids = self.draw(inputs, rng)
    module = self.autoencoder(inputs)
    out = self.apply(module, params, inputs, [TOGETHER], ids)
    result = {}
    for m, x in cav_encoder.patches(inputs, self.model).items():
      _, mean, deviation = self.standardise(m, x)
      image = out["prediction"][m].astype(jnp.float32) * deviation + mean
      removed = masking.removed(ids[m], x.shape[1])[..., None]
      removed = jnp.broadcast_to(removed, x.shape)
      canvas = inputs[INPUTS[m]]
      none = jnp.zeros(canvas.shape, bool)
      result[f"{m}/input"] = canvas
      paste = cav_encoder.paste
      result[f"joint/{m}/output"] = paste(m, image, canvas, self.model)
      result[f"joint/{m}/mask"] = paste(m, removed, none, self.model)
    return result

  def group(self, path: str) -> str:
    """See `CAVMethod.group`; fixed tables and an unused decoder, too."""
    if path.startswith(("positions_", "decoder_positions_")):
      return FROZEN
    if not self.model.mae_weight and path.startswith(DECODER):
      return FROZEN
    return super().group(path)


def present(inputs: Inputs, names: Sequence[str]) -> Bool[Array, "b"]:
  """Examples that are no padding and have all of the named modalities."""
  told = ("valid", *(f"has_{m}" for m in names))
  flags = [inputs[key] for key in told if key in inputs]
  b = len(next(iter(inputs.values())))
  return jnp.stack([jnp.ones(b, bool), *flags]).all(0)


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
