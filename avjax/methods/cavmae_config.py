"""`config.model` of CAV-MAE: its keys, their values, what goes together.

Values are those of CAV-MAE's paper (arXiv:2210.07839) and public code.
"""

from typing import Any

from ml_collections import ConfigDict

from avjax import contrast
from avjax.config import with_overrides
from avjax.errors import InputError, lookup
from avjax.nn import sizes
from avjax.nn.cav_encoder import MODALITIES

# MAE's decoder for B, L and H; the smaller ones are ours.
DECODER_SIZES = {
  "Ti": sizes.Size(128, 4, 4, 512),
  "S": sizes.Size(256, 4, 8, 1024),
  "B": sizes.Size(512, 8, 16, 2048),
  "L": sizes.Size(512, 8, 16, 2048),
  "H": sizes.Size(512, 8, 16, 2048),
}
MASKING = ("unstructured", "time", "frequency", "time_frequency")
LOSSES = ("auto", "bce", "ce")
NUMBERS = ("width", "depth", "heads", "mlp")


def common(size: str) -> dict[str, Any]:
  """What every model with this encoder has."""
  return {
    "size": size,  # Ti, S, B, L, H
    # 0 = as the size says; depth counts the joint block.
    **dict.fromkeys(NUMBERS, 0),
    "joint_depth": 1,  # the contrastive passes are defined for one
    "patch_audio": (16, 16),  # mel, time
    "patch_video": (1, 16, 16),  # of one frame
    "scan": False,
    "remat": "none",  # see avjax.nn.transformer.REMAT
    "attention": "auto",  # see avjax.nn.attention.IMPLEMENTATIONS
  }


def classifier(label_smoothing: float) -> dict[str, Any]:
  """What every fine-tuned model with this encoder has besides."""
  return {
    "modality": "av",  # what is trained: av, a, v
    "classes": {},  # by head; empty = the data set's
    "label_smoothing": label_smoothing,
    # bce: mean over the classes; auto: bce where data.multilabel, else ce.
    "loss": "auto",
  }


def default_model(size: str = "B", **overrides: Any) -> ConfigDict:
  """`config.model` of pretraining: every key, with the paper's values.

  Raises:
    InputError: an override that is no key; the nearest is named.
  """
  values = {
    **common(size),
    **{f"decoder_{name}": 0 for name in NUMBERS},
    "mask_audio": 0.75,
    "mask_video": 0.75,
    "masking": "unstructured",  # of audio; see MASKING
    "norm_pix": True,  # targets of mean 0 and unbiased variance 1
    "mae_weight": 1.0,  # 0 = no reconstruction at all (contrast alone)
    "contrast_weight": 0.01,  # 0 = no contrast at all (AV-MAE alone)
    "contrast_two_way": False,  # False: for each image, among the sounds
    "temperature": 0.05,
    **contrast.KEYS,
    # Negatives among so many consecutive examples; 0 = the global batch. The
    # public runs had 12 (base), 27 to 30 (scale+) and 64 (scale++) per GPU.
    "group_size": 0,
  }
  return with_overrides(values, overrides)


def finetune_model(size: str = "B", **overrides: Any) -> ConfigDict:
  """`config.model` of fine-tuning: every key, with the public values.

  Raises:
    InputError: an override that is no key; the nearest is named.
  """
  values = {
    **common(size),
    **classifier(label_smoothing=0.1),
    "freeze_base": False,  # train the classifier alone
  }
  return with_overrides(values, overrides)


def check(model: Any) -> Any:
  """`model` itself, if its values can work together.

  Raises:
    InputError: names the key, its value and what is possible.
  """
  check_encoder(model)
  if "modality" in model:
    return check_classifier(model)
  lookup(dict.fromkeys(MASKING), model.masking, "model.masking")
  contrast.check(model)
  if not (model.mae_weight or model.contrast_weight):
    raise InputError(
      "model.mae_weight and model.contrast_weight are both 0: nothing to learn"
    )
  if model.group_size < 0 or model.group_size == 1:
    raise InputError(
      f"model.group_size={model.group_size}: 0 for the global batch, or at "
      "least 2 examples"
    )
  return model


def check_classifier(model: Any) -> Any:
  """The part of `check` that looks at the keys of `classifier`.

  Raises:
    InputError: as `check`.
  """
  lookup(MODALITIES, model.modality, "model.modality")
  lookup(dict.fromkeys(LOSSES), model.loss, "model.loss")
  return model


def check_encoder(model: Any) -> None:
  """The part of `check` that every model with this encoder shares.

  Raises:
    InputError: as `check`.
  """
  if model.joint_depth != 1:
    raise InputError(
      f"model.joint_depth={model.joint_depth}: only 1 is defined; the public "
      "code gives every joint block of the contrastive passes the same input "
      "instead of the last block's output"
    )
  if sizes.resolve(model).depth < 2:
    raise InputError(
      f"model.depth={model.depth} leaves no block for the modalities: it "
      "counts the joint block, so at least 2"
    )
  if model.patch_video[0] != 1:
    raise InputError(
      f"model.patch_video={tuple(model.patch_video)}: CAV-MAE sees one frame, "
      "so the first number is 1"
    )
