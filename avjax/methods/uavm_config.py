"""`config.model` of UAVM: its keys, their values, what goes together.

Values are those of the base model (arXiv:2208.00061, §II-A): N = N_s = 3 and
S_dim = 1024. The paper keeps N + N_s = 6 and the 4 heads throughout.
"""

from typing import Any

from ml_collections import ConfigDict

from avjax.config import with_overrides
from avjax.errors import InputError, lookup

VARIANTS = ("unified", "independent", "cross_modal")
UNUSED = ("untouched", "zero_gradients")
LOSSES = ("auto", "bce", "ce")


def default_model(**overrides: Any) -> ConfigDict:
  """`config.model`: every key, with the paper's values.

  Raises:
    InputError: an override that is no key; the nearest is named.
  """
  values = {
    "variant": "unified",  # see VARIANTS and avjax/nn/uavm.py
    "specific_layers": 3,  # N; 0 = LayerNorm and a linear layer
    # N_s; 0 = nothing is shared. Of the independent variant: of each modality.
    "shared_layers": 3,
    "width": 1024,  # of the N blocks
    "shared_width": 1024,  # S_dim, of the N_s blocks; 16 to 1024 in the paper
    "heads": 4,
    "tokens": 30,  # of a modality
    "lambda_audio": 0.5,  # λ_MT: how often a step trains the audio
    # What happens to parameters that a step does not use. untouched: nothing,
    # as in algorithm 1. zero_gradients: momentum and weight decay move them,
    # as they did in the published runs on several GPUs.
    "unused_params": "untouched",
    "classes": {},  # by head; empty = the data set's
    "label_smoothing": 0.1,  # public
    # bce: mean over the classes; auto: bce where data.multilabel, else ce.
    "loss": "auto",
    "attention": "auto",  # see avjax.nn.attention.IMPLEMENTATIONS
  }
  return with_overrides(values, overrides)


def check(model: Any) -> Any:
  """`model` itself, if its values can work together.

  Raises:
    InputError: names the key, its value and what is possible.
  """
  lookup(dict.fromkeys(VARIANTS), model.variant, "model.variant")
  lookup(dict.fromkeys(UNUSED), model.unused_params, "model.unused_params")
  lookup(dict.fromkeys(LOSSES), model.loss, "model.loss")
  n, shared = model.specific_layers, model.shared_layers
  if min(n, shared) < 0 or n + shared == 0:
    raise InputError(
      f"model.specific_layers={n} and model.shared_layers={shared}: none may "
      "be below 0, nor both 0"
    )
  if model.variant == "cross_modal" and not shared:
    raise InputError(
      "model.variant='cross_modal' with model.shared_layers=0: the modalities "
      "would never meet; it needs 1 at least"
    )
  used = {"width": n, "shared_width": shared}
  for key, layers in used.items():
    if layers and model[key] % model.heads:
      raise InputError(
        f"model.{key}={model[key]} is not divisible by model.heads="
        f"{model.heads}"
      )
  if not 0 <= model.lambda_audio <= 1:
    raise InputError(
      f"model.lambda_audio={model.lambda_audio}: a probability, from 0 to 1"
    )
  return model
