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
from jaxtyping import Array, Bool, Float

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
    self, patches: Tokens, ids: Mapping[str, Any], keep: Keep | None = None
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
    tokens = {
      m: self.tokenise(m, x, ids[m])
      for m, x in patches.items()
      if ids[m].shape[1]
    }
    encoded, junction = self.encode(tokens, keep)
    width = self.decoder_size.width
    projected = {
      m: av_encoder.dense(x, width, f"decoder_project_{m}")
      for m, x in encoded.items()
    }
    z = {
      m: self.decoder_input(m, projected, ids, patches[m].shape[1])
      for m in self.targets
    }
    decoded = self.decode(z)
    prediction = {
      m: av_encoder.dense(
        x, patches[m].shape[2], f"head_{m}", nn.initializers.zeros
      )
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
    token = self.param(f"mask_token_{m}", nn.initializers.zeros, (d,))
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


def standardise(
  x: Float[Array, "b n p"], m: str, kind: str
) -> tuple[Float[Array, "b n p"], Any, Any]:
  """Targets with mean 0 and variance 1, and the statistics that undo it.

  'patch': over a patch, population variance, 1e-6 inside the root (§3.1).
  'channel': each colour of a tubelet by itself; audio stays as it is.
  """
  if kind == "none" or (kind == "channel" and m == "audio"):
    return x, 0.0, 1.0
  parts = x.reshape(*x.shape[:2], -1, 3 if kind == "channel" else 1)
  mean = parts.mean(2, keepdims=True)
  deviation = jnp.sqrt(parts.var(2, keepdims=True) + 1e-6)
  mean, deviation = (
    jnp.broadcast_to(s, parts.shape).reshape(x.shape) for s in (mean, deviation)
  )
  return (x - mean) / deviation, mean, deviation


class AVMAE(Method):
  """Pretraining; `config.model` as `default_model` has it.

  A modality that an example lacks (`has_audio`, `has_video`) is left out of
  that modality's loss; its placeholder still passes through the encoder.
  Weight decay is for kernels alone. Layer-wise decay counts encoder blocks.
  """

  modes = ()

  def __init__(self, config: Any):
    super().__init__(config)
    self.model = check(config.model)
    self.size = sizes.resolve(self.model)
    self.num_layers = self.size.depth
    self.modalities = MODALITIES[self.model.modality]
    goal = OBJECTIVES[self.model.objective]
    self.targets = tuple(m for m in goal if m in self.modalities)

  def encoder(self, cls: Any = AVEncoder, **more: Any) -> AVEncoder:
    """The Flax module that encodes; one modality alone needs one stack."""
    model, both = self.model, len(self.modalities) == 2
    names = ("attention", "remat", "scan")
    stack = {name: model[name] for name in names}
    stack["norm"] = model.normalise_output
    return cls(
      size=self.size,
      kind=model.encoder if both else "shared",
      fusion_layers=model.fusion_layers,
      positions=model.positions,
      modality_tokens=model.modality_tokens,
      **{"stack": stack, **more},
    )

  def autoencoder(self, **more: Any) -> MaskedAutoencoder:
    """The Flax module that is pretrained."""
    return self.encoder(
      MaskedAutoencoder,
      decoder_size=sizes.resolve(self.model, "decoder_", DECODER_SIZES),
      decoder_kind=self.model.decoder,
      inpaint=self.model.objective != "joint",
      **{"targets": self.targets, **more},
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
  ) -> tuple[dict[str, Any], Keep | None]:
    """Kept tokens by modality, and stochastic depth: all random choices.

    Raises:
      InputError: a modality of the model is not among the inputs.
    """
    for m in self.modalities:
      if m not in patches:
        raise InputError(f"model.modality needs {INPUTS[m]!r} in the inputs")
    b = len(patches[self.modalities[0]])
    index = inputs.get("index", jnp.arange(b, dtype=jnp.uint32))
    keys = masking.example_keys(rng, index)
    ids = {}
    for i, (m, x) in enumerate(patches.items()):
      noise, n = inputs.get(f"noise/{m}"), x.shape[1]
      if noise is None:
        noise = masking.example_noise(masking.fold_in(keys, i), n)
      kept = masking.num_kept(n, self.model[f"mask_{m}"])
      ids[m] = masking.ids_keep(noise, kept)
    depth_keys = masking.fold_in(keys, len(INPUTS))
    rate = self.model.drop_path
    return ids, self.encoder().draw_keep(depth_keys, self.modalities, rate)

  def removed(
    self, m: str, ids: Mapping[str, Any], n: int
  ) -> Bool[Array, "b n"]:
    """M (eq. 1), true = to be reconstructed.

    Inpainting knows no correspondence between the modalities: the last
    tokens in raster order are compared with those that stand there.
    """
    if self.model.objective == "joint":
      return masking.removed(ids[m], n)
    (other,) = set(ids) - {m}
    b, kept = ids[other].shape
    return jnp.broadcast_to(jnp.arange(n) >= kept, (b, n))

  def init(self, rng: jax.Array, inputs: Inputs) -> Params:
    """See `Method.init`."""
    patches = self.patches(inputs)
    ids, _ = self.draw(inputs, patches, rng)
    module = self.autoencoder()
    stack = {**module.stack, "scan": False}  # names per layer
    return self.autoencoder(stack=stack).init(rng, patches, ids)["params"]

  def loss(
    self, params: Params, inputs: Inputs, rng: jax.Array, step: jax.Array
  ) -> tuple[jax.Array, dict[str, Any]]:
    """The mean of the target modalities' losses L_a, L_v (eq. 1)."""
    del step
    patches = self.patches(inputs)
    ids, keep = self.draw(inputs, patches, rng)
    out = self.apply(self.autoencoder(), params, patches, ids, keep)
    metrics, out["target"], out["removed"] = {}, {}, {}
    for m, prediction in out["prediction"].items():
      b, n = prediction.shape[:2]
      target, _, _ = standardise(patches[m], m, self.model.standardise)
      removed = self.removed(m, ids, n)
      present = jnp.ones(b, bool)
      for key in ("valid", f"has_{m}"):
        present &= inputs.get(key, present)
      counted = removed | self.model.loss_unmasked
      metrics[f"loss_{m}"] = losses.masked_mse(
        prediction, target, counted, present
      )
      out["target"][m], out["removed"][m] = target, removed
    aux = {
      "metrics": metrics,
      "intermediates": {
        f"{name}/{m}": x for name, by in out.items() for m, x in by.items()
      },
    }
    return sum(metrics.values()) / len(metrics), aux

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
      both modalities ('early') is also shown inpainting: all tokens of m are
      removed, all of the other are kept. The other decoders see no token of
      the other modality, so that view would not depend on the input.
    """
    patches = self.patches(inputs)
    ids, _ = self.draw(inputs, patches, rng)
    result = {f"{m}/input": inputs[INPUTS[m]] for m in self.modalities}
    joint = self.model.objective == "joint"
    for m in self.targets:
      view = f"{'joint' if joint else 'inpaint'}/{m}"
      result |= self.picture(view, m, params, inputs, patches, ids)
    if joint and self.model.decoder == "early" and len(patches) == 2:
      every = {
        m: jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
        for m, x in patches.items()
      }
      for m in self.targets:
        shown = {**every, m: ids[m][:, :0]}
        view = f"inpaint/{m}"
        result |= self.picture(view, m, params, inputs, patches, shown)
    return result

  def picture(self, view, m, params, inputs, patches, ids) -> dict[str, Any]:
    """Output and mask of one modality, targets' statistics undone."""
    out = self.apply(self.autoencoder(), params, patches, ids)
    x = out["prediction"][m].astype(jnp.float32)
    _, mean, deviation = standardise(patches[m], m, self.model.standardise)
    removed = self.removed(m, ids, x.shape[1])[..., None]
    removed = jnp.broadcast_to(removed, x.shape)
    given, patch = inputs[INPUTS[m]], self.model[f"patch_{m}"]
    nothing = jnp.zeros(given.shape, bool)
    return {
      f"{view}/output": tokenizers.paste(x * deviation + mean, given, patch),
      f"{view}/mask": tokenizers.paste(removed, nothing, patch),
    }

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
