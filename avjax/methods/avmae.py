"""Audiovisual Masked Autoencoders (Georgescu et al., ICCV 2023).

arXiv:2212.05922. Section and equation numbers are the paper's; the encoders of
§3.1 and §3.2 are in `avjax/nn/av_encoder.py`. What the paper leaves open
follows the authors' public code:

- the "Shared" decoder is one set of weights that decodes each modality by
  itself: modalities meet in the encoder alone;
- targets are the inputs as they are; mask tokens and heads start at zero.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from avjax import losses
from avjax.errors import InputError
from avjax.methods.avmae_config import (
  DECODER_SIZES,
  OBJECTIVES,
  check,
  default_model,
)
from avjax.methods.base import Inputs, Method, ParamInfo, Params
from avjax.nn import av_encoder, masking, sizes, tokenizers
from avjax.nn.av_encoder import INPUTS, MODALITIES, AVEncoder, Keep, Tokens
from avjax.nn.transformer import stack_layers

__all__ = ["AVMAE", "MaskedAutoencoder", "default_model"]

ZEROS = nn.initializers.zeros
Ids = Mapping[str, Int[Array, "b _"]]  # kept tokens by modality


class MaskedAutoencoder(AVEncoder):
  """Encoder, decoder and heads.

  Attributes:
    decoder_size: of the decoder.
    decoder_kind: one of DECODERS.
    targets: modalities to reconstruct.
    inpaint: whether each is decoded from the other modality's tokens.
  """

  decoder_size: sizes.Size = DECODER_SIZES["B"]
  decoder_kind: str = "shared"
  targets: tuple[str, ...] = ("video", "audio")
  inpaint: bool = False

  @nn.compact
  def __call__(
    self, patches: Tokens, ids: Ids, keep: Keep | None = None
  ) -> dict[str, Tokens]:
    """Reconstructs the patches from those that are kept.

    Args:
      patches: raw patches [b n p] by modality.
      ids: kept tokens [b k] by modality; k may be 0.
      keep: of `draw_keep`.

    Returns:
      By name and modality: 'junction', 'encoded' [b k d], 'decoder_input',
      'decoded' [b n d] and 'prediction' [b n p].
    """
    seen = [m for m in patches if ids[m].shape[1]]
    tokens = {m: self.tokenise(m, patches[m], ids[m]) for m in seen}
    encoded, junction = self.encode(tokens, keep)
    width = self.decoder_size.width
    projected = {
      m: av_encoder.dense(x, width, f"decoder_project_{m}")
      for m, x in encoded.items()
      if not (self.inpaint and self.targets == (m,))
    }
    z = {
      m: self.decoder_input(m, projected, ids, patches[m].shape[1])
      for m in self.targets
    }
    decoded = self.decode(z)
    prediction = {
      m: av_encoder.dense(x, patches[m].shape[2], f"head_{m}", ZEROS)
      for m, x in decoded.items()
    }
    return {
      "junction": junction,
      "encoded": encoded,
      "decoder_input": z,
      "decoded": decoded,
      "prediction": prediction,
    }

  def decoder_input(self, m, projected, ids, n) -> Float[Array, "b n d"]:
    """z_m (§3.4): encoded tokens, mask tokens and new positions.

    Joint reconstruction puts the tokens of m back into their places
    (Unshuffle). Inpainting starts with those of the other modality in kept
    order and fills up with mask tokens, so that the length stays n.
    """
    d = self.decoder_size.width
    token = self.param(f"mask_token_{m}", ZEROS, (d,))
    if self.inpaint:
      (other,) = set(projected) - {m}
      rest = n - projected[other].shape[1]
      if rest < 1:
        raise InputError(
          f"{n - rest} kept tokens of {other} leave none of the {n} tokens of "
          f"{m} to inpaint; raise model.mask_{other}"
        )
      masks = jnp.broadcast_to(token, (len(ids[m]), rest, d))
      x = projected[other]
      x = jnp.concatenate([x, masks.astype(x.dtype)], axis=1)
    elif m in projected:
      x = masking.unshuffle(projected[m], ids[m], token, n)
    else:
      dtype = next(iter(projected.values())).dtype
      x = jnp.broadcast_to(token.astype(dtype), (len(ids[m]), n, d))
    return self.locate(x, m, n, None, "decoder_")

  # --- 3.3 Decoders ---

  def decode(self, z: Tokens) -> Tokens:
    """Decode(z): one transformer for both, over both, or one for each."""
    size = self.decoder_size
    if self.decoder_kind == "separate":
      return {
        m: self.transformer(f"decoder_{m}", size.depth, size)(x)
        for m, x in z.items()
      }
    stack = self.transformer("decoder", size.depth, size)
    if self.decoder_kind == "early":
      return av_encoder.split(stack(av_encoder.concatenate(z)), z)
    return {m: stack(x) for m, x in z.items()}


# --- 3.4 Objective -----------------------------------------------------------


class AVMAE(Method):
  """Pretraining; `config.model` as `default_model` has it.

  An example that lacks a modality (`has_audio`, `has_video`) is left out of
  that modality's loss; the placeholder still passes through the encoder.
  Weight decay is for kernels alone. Layer-wise decay counts encoder blocks.
  """

  modes = ()

  def __init__(self, config: Any):
    super().__init__(config)
    self.model = check(config.model)
    self.size = sizes.resolve(self.model)
    self.num_layers = self.size.depth
    self.modalities = MODALITIES[self.model.modality]
    self.inpaints = self.model.objective != "joint"
    goal = OBJECTIVES[self.model.objective]
    self.targets = tuple(m for m in goal if m in self.modalities)

  def encoder(self, cls: Any = AVEncoder, **more: Any) -> AVEncoder:
    """The Flax module that encodes; one modality alone needs one stack."""
    model = self.model
    stack = {name: model[name] for name in ("attention", "remat", "scan")}
    return cls(
      size=self.size,
      kind=model.encoder if len(self.modalities) == 2 else "shared",
      fusion_layers=model.fusion_layers,
      positions=model.positions,
      modality_tokens=model.modality_tokens,
      stack={"norm": model.normalise_output, **stack},
      **more,
    )

  def autoencoder(self) -> MaskedAutoencoder:
    """The Flax module that is pretrained."""
    return self.encoder(
      MaskedAutoencoder,
      decoder_size=sizes.resolve(self.model, "decoder_", DECODER_SIZES),
      decoder_kind=self.model.decoder,
      targets=self.targets,
      inpaint=self.inpaints,
    )

  def patches(self, inputs: Inputs) -> Tokens:
    """Raw patches x~ of the modalities that the inputs hold."""
    return av_encoder.patches(inputs, self.model)

  def apply(self, module: AVEncoder, params: Params, patches: Tokens, *rest):
    """Runs a module in the dtype of the computation."""
    patches = {m: x.astype(self.config.dtype) for m, x in patches.items()}
    params = stack_layers(params) if self.model.scan else params
    return module.apply({"params": params}, patches, *rest)

  def draw(
    self, inputs: Inputs, patches: Tokens, rng: jax.Array
  ) -> tuple[Ids, Keep | None]:
    """Kept tokens by modality, and stochastic depth: all random choices.

    Raises:
      InputError: a modality of the model is not among the inputs.
    """
    for m in self.modalities:
      if m not in patches:
        raise InputError(f"model.modality needs {INPUTS[m]!r} in the inputs")
    keys, ids = masking.draw_keys(inputs, rng), {}
    for i, (m, x) in enumerate(patches.items()):
      noise, n = inputs.get(f"noise/{m}"), x.shape[1]
      if noise is None:
        noise = masking.example_noise(masking.fold_in(keys, i), n)
      kept = masking.num_kept(n, self.model[f"mask_{m}"])
      ids[m] = masking.ids_keep(noise, kept)
    depth_keys = masking.fold_in(keys, len(INPUTS))
    rate = self.model.drop_path
    return ids, self.encoder().draw_keep(depth_keys, self.modalities, rate)

  def removed(self, m: str, ids: Ids, n: int) -> Bool[Array, "b n"]:
    """M (eq. 1), true = to be reconstructed.

    Inpainting knows no correspondence between the modalities: the last
    tokens in raster order are compared with those that stand there.
    """
    if not self.inpaints:
      return masking.removed(ids[m], n)
    (other,) = set(ids) - {m}
    b, kept = ids[other].shape
    return jnp.broadcast_to(jnp.arange(n) >= kept, (b, n))

  def init(self, rng: jax.Array, inputs: Inputs) -> Params:
    """See `Method.init`."""
    patches = self.patches(inputs)
    ids, _ = self.draw(inputs, patches, rng)
    module = self.autoencoder()
    # A scan's parameters are stacked; names are per layer.
    module = module.clone(stack={**module.stack, "scan": False})
    return module.init(rng, patches, ids)["params"]

  def loss(
    self, params: Params, inputs: Inputs, rng: jax.Array, step: jax.Array
  ) -> tuple[jax.Array, dict[str, Any]]:
    """The mean of the target modalities' losses L_a, L_v (eq. 1)."""
    del step
    patches = self.patches(inputs)
    ids, keep = self.draw(inputs, patches, rng)
    out = self.apply(self.autoencoder(), params, patches, ids, keep)
    metrics, out["target"], out["removed"] = {}, {}, {}
    for m, x in out["prediction"].items():
      target, _, _ = tokenizers.standardise(
        patches[m], m, self.model.standardise
      )
      removed = self.removed(m, ids, x.shape[1])
      counted = removed | self.model.loss_unmasked
      metrics[f"loss_{m}"] = losses.masked_mse(
        x, target, counted, self.present(m, inputs, len(x))
      )
      out["target"][m], out["removed"][m] = target, removed
    seen = {f"{k}/{m}": x for k, by in out.items() for m, x in by.items()}
    aux = {"metrics": metrics, "intermediates": seen}
    return sum(metrics.values()) / len(metrics), aux

  def present(self, m: str, inputs: Inputs, b: int) -> Bool[Array, "b"]:
    """Examples that count for modality m; inpainting needs the other, too."""
    needed = self.modalities if self.inpaints else (m,)
    present = jnp.ones(b, bool)
    for key in ("valid", *(f"has_{name}" for name in needed)):
      present &= inputs.get(key, present)
    return present

  def encode(self, params: Params, inputs: Inputs) -> Tokens:
    """All tokens, unmasked, after the encoder: {modality: [b n d]}."""
    return self.apply(self.encoder(), params, self.patches(inputs))

  def embed(self, params: Params, inputs: Inputs) -> dict[str, jax.Array]:
    """Mean over all tokens of a modality after the encoder, unmasked.

    Returns:
      'video' and 'audio' [b d], and 'av', the mean of those that an example
      has; not normalised.
    """
    tokens = self.encode(params, inputs)
    pooled = {m: x.astype(jnp.float32).mean(1) for m, x in tokens.items()}
    if len(pooled) == 2:
      ones = jnp.ones(len(pooled["video"]))
      has = jnp.stack([inputs.get(f"has_{m}", ones) for m in pooled])
      both = jnp.stack(list(pooled.values())) * has[..., None]
      count = jnp.maximum(has.sum(0), 1)
      pooled["av"] = both.sum(0) / count[:, None]
    return pooled

  def reconstruct(
    self, params: Params, inputs: Inputs, rng: jax.Array
  ) -> dict[str, jax.Array]:
    """Pictures of what the model makes of masked inputs.

    Returns:
      '<m>/input', and by view '<view>/<m>/output' and '<view>/<m>/mask' of the
      input's shape; mask is true where a patch was removed. The view is
      'joint' or 'inpaint' by the objective. A joint model whose decoder spans
      both modalities (early) also inpaints: all tokens of m are removed, all
      of the other kept. Other decoders see nothing of the other modality.
    """
    patches = self.patches(inputs)
    ids, _ = self.draw(inputs, patches, rng)
    first = "inpaint" if self.inpaints else "joint"
    views = [(first, self.targets, ids)]
    crosses = self.model.decoder == "early" and len(patches) == 2
    if crosses and not self.inpaints:
      every = {
        m: jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
        for m, x in patches.items()
      }
      for m in self.targets:
        views.append(("inpaint", (m,), {**every, m: ids[m][:, :0]}))
    result = {f"{m}/input": inputs[INPUTS[m]] for m in self.modalities}
    for view, targets, ids in views:
      out = self.apply(self.autoencoder(), params, patches, ids)
      for m in targets:
        image, mask = self.picture(m, inputs, patches, ids, out["prediction"])
        result[f"{view}/{m}/output"], result[f"{view}/{m}/mask"] = image, mask
    return result

  def picture(self, m, inputs, patches, ids, prediction):
    """Output and mask of the input's shape, targets' statistics undone."""
    _, mean, deviation = tokenizers.standardise(
      patches[m], m, self.model.standardise
    )
    x = prediction[m].astype(jnp.float32) * deviation + mean
    removed = self.removed(m, ids, x.shape[1])[..., None]
    removed = jnp.broadcast_to(removed, x.shape)
    # What does not fill a patch is shown as it is.
    canvas, patch = inputs[INPUTS[m]], self.model[f"patch_{m}"]
    none = jnp.zeros(canvas.shape, bool)
    paste = tokenizers.paste
    return paste(x, canvas, patch), paste(removed, none, patch)

  def param_info(self, path: str) -> ParamInfo:
    """See `Method.param_info`; the joint blocks of mid-fusion are the last."""
    stack, _, rest = path.partition("/")
    layer = self.num_layers + 1
    if stack.startswith(("embed_", "positions_", "modality_token_")):
      layer = 0
    elif stack.startswith("encoder") and rest.startswith("block_"):
      first = self.num_layers - self.model.fusion_layers
      offset = first if stack == "encoder_joint" else 0
      layer = offset + int(rest.split("/")[0].removeprefix("block_")) + 1
    return ParamInfo(layer, decay=path.endswith("kernel"))
