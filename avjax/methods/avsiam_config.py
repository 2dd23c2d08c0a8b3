"""`config.model` of AVSiam: its keys, their values, what goes together.

Values are the paper's (arXiv:2403.19638); `public_base=True` takes those of the
public Base code instead, which differs in what `PUBLIC_BASE` lists and in
three things that have no key:

- reconstruction has a pass of its own, three quarters of the tokens removed;
- in it, the sound goes through a second encoder, `encoder_mae_audio`;
- decoder positions, mask and modality tokens start at zero.

The paper's ratios are "discrete, from 0 % to 50 %". Six of them divide its
batches per device (96, 48, 24), five do not. It has no normalisation of the
targets: eq. 3 compares with the inputs themselves.
"""

from typing import Any

from ml_collections import ConfigDict

from avjax import contrast
from avjax.config import with_overrides
from avjax.errors import InputError, lookup
from avjax.nn import sizes

ENCODERS = ("shared", "separate")
NORMS = ("shared", "modality")
MASKING = ("unstructured", "time_frequency")
NUMBERS = ("width", "depth", "heads", "mlp")

# §3.2: six layers, else MAE's; the smaller ones are ours.
DECODER_SIZES = {
  "Ti": sizes.Size(128, 4, 4, 512),
  "S": sizes.Size(256, 4, 8, 1024),
  "B": sizes.Size(512, 6, 16, 2048),
  "L": sizes.Size(512, 6, 16, 2048),
  "H": sizes.Size(512, 6, 16, 2048),
}
PUBLIC_RATIO = 0.75  # of the public pass of reconstruction
# What `public_base` sets, of the keys that a model has.
PUBLIC_BASE = {
  "encoder": "shared",
  "norms": "modality",
  "double_input": True,
  "eps": 1e-5,
  "ratios": (0.0, 0.2, 0.4, 0.6, 0.8),
  "audio_masking": "time_frequency",
  "stop_gradient": False,
  "contrast_two_way": True,
  "norm_pix": False,
}


def common(size: str) -> dict[str, Any]:
  """Keys that pretraining and fine-tuning share."""
  return {
    "size": size,  # Ti, S, B, L, H
    **dict.fromkeys(NUMBERS, 0),  # 0 = as the size says
    "encoder": "shared",  # separate = AVSep, an encoder for each
    "norms": "shared",  # of the shared encoder; modality = a set for each
    "multimodal_depth": 2,
    "patch_audio": (16, 16),  # mel, time
    "patch_video": (1, 16, 16),  # of one frame
    "double_input": False,  # twice (patch + position)
    "eps": 1e-6,  # of all LayerNorms but the encoder's last, which has 1e-6
    "scan": False,
    "remat": "none",  # see avjax.nn.transformer.REMAT
    "attention": "auto",  # see avjax.nn.attention.IMPLEMENTATIONS
    "public_base": False,  # as the public Base code, see PUBLIC_BASE
  }


def default_model(size: str = "B", **overrides: Any) -> ConfigDict:
  """`config.model` of pretraining: every key, with the paper's values.

  Raises:
    InputError: an override that is no key; the nearest is named.
  """
  values = {
    **common(size),
    **{f"decoder_{name}": 0 for name in NUMBERS},
    # Shares of the tokens that are removed: of every so many consecutive
    # examples each has another. (0.5,) = the same for all; (0.0,) = no masks.
    "ratios": (0.0, 0.1, 0.2, 0.3, 0.4, 0.5),
    "audio_masking": "unstructured",  # see MASKING
    "stop_gradient": True,  # before the multimodal layers
    "norm_pix": False,  # targets of mean 0 and unbiased variance 1
    "mae_weight": 1.0,  # 0 = no reconstruction at all
    "contrast_weight": 1.0,  # 0 = no contrast at all
    "contrast_two_way": False,  # False: for each sound, among the images
    "temperature": 0.05,
    **contrast.KEYS,
  }
  return with_overrides(values, public(values, overrides))


def public(values: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
  """`overrides` on those that `public_base=True` stands for, if it is set."""
  if not overrides.get("public_base"):
    return overrides
  found = {k: v for k, v in PUBLIC_BASE.items() if k in values}
  if "decoder_depth" in values:
    found["decoder_depth"] = 8
  return {**found, **overrides}


def check(model: Any) -> Any:
  """`model` itself, if its values can work together.

  Raises:
    InputError: names the key, its value and what is possible.
  """
  lookup(dict.fromkeys(ENCODERS), model.encoder, "model.encoder")
  lookup(dict.fromkeys(NORMS), model.norms, "model.norms")
  if model.encoder == "separate" and model.norms == "modality":
    raise InputError(
      "model.norms='modality' needs model.encoder='shared': separate encoders "
      "have LayerNorms of their own"
    )
  if model.patch_video[0] != 1:
    raise InputError(
      f"model.patch_video={tuple(model.patch_video)}: AVSiam sees one frame, "
      "so the first number is 1"
    )
  _check_public(model)
  if "ratios" in model:
    _check_pretraining(model)
  return model


def _check_public(model: Any) -> None:
  if not model.public_base:
    return
  for key, wanted in PUBLIC_BASE.items():
    if key not in model:
      continue
    found = tuple(model[key]) if key == "ratios" else model[key]
    if found != wanted:
      raise InputError(
        f"model.public_base=True stands for model.{key}={wanted!r}, not "
        f"{found!r}: give public_base to default_model, which sets them all, "
        "or set the keys without it"
      )


def _check_pretraining(model: Any) -> None:
  lookup(dict.fromkeys(MASKING), model.audio_masking, "model.audio_masking")
  contrast.check(model)
  if not model.ratios or not all(0 <= ratio < 1 for ratio in model.ratios):
    raise InputError(
      f"model.ratios={tuple(model.ratios)}: at least one share of the tokens, "
      "each at least 0 and less than 1"
    )
  if not (model.mae_weight or model.contrast_weight):
    raise InputError(
      "model.mae_weight and model.contrast_weight are both 0: nothing to learn"
    )
  if model.stop_gradient and not model.contrast_weight:
    raise InputError(
      "model.contrast_weight=0 trains no encoder while model.stop_gradient is "
      "True"
    )
