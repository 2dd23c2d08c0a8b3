"""`config.model` of AV-MAE: its keys, their values, and what may go together.

Section and table numbers are those of arXiv:2212.05922.
"""

from typing import Any

from ml_collections import ConfigDict

from avjax.config import with_overrides
from avjax.errors import InputError, lookup
from avjax.nn import av_encoder, sizes

# The authors' code for B and L; the paper has no other size.
DECODER_SIZES = {
  "Ti": sizes.Size(96, 4, 3, 384),
  "S": sizes.Size(192, 4, 3, 768),
  "B": sizes.Size(384, 4, 6, 1536),
  "L": sizes.Size(512, 4, 8, 2048),
  "H": sizes.Size(512, 4, 8, 2048),
}

STANDARDISE = ("none", "patch", "channel")
DECODERS = ("shared", "early", "separate")
# Which modalities an objective reconstructs.
OBJECTIVES = {
  "joint": ("video", "audio"),
  "inpaint_video_from_audio": ("video",),
  "inpaint_audio_from_video": ("audio",),
  "inpaint_both": ("video", "audio"),
}


def default_model(size: str = "B", **overrides: Any) -> ConfigDict:
  """`config.model`: every key, with the paper's values.

  Raises:
    InputError: an override that is no key; the nearest is named.
  """
  numbers = ("width", "depth", "heads", "mlp")
  values = {
    "size": size,  # Ti, S, B, L, H
    # 0 = as the size says.
    **dict.fromkeys(numbers, 0),
    **{f"decoder_{name}": 0 for name in numbers},
    "patch_video": (2, 16, 16),  # t, h, w
    "patch_audio": (16, 16),  # time, mel
    "modality": "av",  # a = AudioMAE, v = VideoMAE (table 3)
    "encoder": "mid",  # early, separate, shared, mid
    "fusion_layers": 2,  # S of mid
    "decoder": "shared",  # shared, early, separate
    "mask_video": 0.9,
    "mask_audio": 0.5,
    "objective": "joint",  # see OBJECTIVES
    "standardise": "none",  # patch, channel: see `standardise`
    "positions": "sinusoid_1d",  # learned_1d, none
    "modality_tokens": False,
    "normalise_output": True,  # a LayerNorm ends every stack
    "loss_unmasked": False,  # the kept tokens count, too
    "drop_path": 0.0,
    "scan": False,
    "remat": "none",  # see avjax.nn.transformer.REMAT
    "attention": "auto",  # see avjax.nn.attention.IMPLEMENTATIONS
    "allow_any": False,  # also the pairs that the paper rules out
  }
  return with_overrides(values, overrides)


def check(model: Any) -> Any:
  """`model` itself, if the paper allows the combination.

  Raises:
    InputError: an unknown name, or a pair that cannot work, with the reason.
  """
  lookup(av_encoder.MODALITIES, model.modality, "model.modality")
  lookup(dict.fromkeys(av_encoder.KINDS), model.encoder, "model.encoder")
  lookup(dict.fromkeys(DECODERS), model.decoder, "model.decoder")
  lookup(OBJECTIVES, model.objective, "model.objective")
  lookup(dict.fromkeys(STANDARDISE), model.standardise, "model.standardise")
  inpaints = model.objective != "joint"
  if inpaints and model.modality != "av":
    raise InputError(
      f"model.objective={model.objective} needs both modalities; "
      f"model.modality is {model.modality!r}"
    )
  depth = sizes.resolve(model).depth
  if model.encoder == "mid" and not 0 < model.fusion_layers < depth:
    raise InputError(
      f"model.fusion_layers={model.fusion_layers} is not between 1 and "
      f"{depth - 1}, for a depth of {depth}"
    )
  if model.allow_any:
    return model
  if model.encoder == model.decoder == "separate":
    raise InputError(
      "model.encoder=separate with model.decoder=separate would be two "
      "uncoupled autoencoders (§3.3)"
    )
  if inpaints and model.encoder not in ("early", "mid"):
    raise InputError(
      f"model.objective={model.objective} needs an encoder that joins the "
      f"modalities, early or mid (§3.4); model.encoder is {model.encoder!r}"
    )
  return model
