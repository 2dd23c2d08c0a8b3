"""`config.model` of CoAVT: its keys, their values, what goes together.

Values are those of the paper (arXiv:2401.12264, §IV-B); what it leaves open is
as in BLIP-2 (arXiv:2301.12597), whose objectives it takes up, unless marked as
ours.
"""

from typing import Any

from ml_collections import ConfigDict

from avjax.config import with_overrides
from avjax.errors import InputError, lookup
from avjax.methods import cavmae_config
from avjax.nn import sizes
from avjax.nn.cav_encoder import MODALITIES

OBJECTIVES = ("contrast", "matching", "language")
# Readings of equation 4, see `coavt_objectives.matching`.
READINGS = ("mean_logits", "mean_probability", "each_query")
# See `coavt_objectives.contrast`.
EQUAL_TEXTS = ("excluded", "positive", "negative")


def _common(size: str) -> dict[str, Any]:
  return {
    **cavmae_config.common(size),  # of the joint audio-visual encoder
    # The text and query encoder has the size of the same name, for B that of
    # BERT-base; 0 = as the size says.
    **{f"text_{name}": 0 for name in cavmae_config.NUMBERS},
    "queries": 16,
    "cross_every": 1,  # cross-attention in every block; 2 in BLIP-2
    "query_ffn": False,  # True in BLIP-2: the queries' own MLP
    "dropout": 0.1,  # of the text and query encoder (BERT)
    "freeze_encoder": False,  # True: the audio-visual encoder does not learn
  }


def default_model(size: str = "B", **overrides: Any) -> ConfigDict:
  """`config.model` of pretraining and of fine-tuning for retrieval.

  Raises:
    InputError: an override that is no key; the nearest is named.
  """
  values = {
    **_common(size),
    # Which pairs with text are learned (equation 7). Vanilla: av alone.
    "modes": ("av", "a", "v"),
    # False = Baseline: the mean of the tokens is projected, contrast alone.
    "query_encoder": True,
    "objectives": OBJECTIVES,  # whose sum is learned (equation 6)
    "vocabulary": 30_523,  # words, the last of which is [DEC]
    "positions": 512,  # longest text
    "projection": 256,
    "mask_audio": 0.75,
    "mask_video": 0.5,
    # Of contrast and language; 0 gives equations 2, 3 and 5.
    "label_smoothing": 0.1,
    "matching_loss": "mean_logits",  # see READINGS
    # Two clips whose texts are the same word for word: `excluded` (ours)
    # leaves one out of the other's candidates, `positive` makes both right,
    # `negative` is equations 2 and 3 to the letter.
    "equal_texts": "excluded",
  }
  return with_overrides(values, overrides)


def finetune_model(size: str = "B", **overrides: Any) -> ConfigDict:
  """`config.model` of fine-tuning for classification.

  Raises:
    InputError: an override that is no key; the nearest is named.
  """
  values = {
    **_common(size),
    **cavmae_config.classifier(label_smoothing=0.0),  # none is mentioned
  }
  return with_overrides(values, overrides)


def check(model: Any) -> Any:
  """`model` itself, if its values can work together.

  Raises:
    InputError: names the key, its value and what is possible.
  """
  cavmae_config.check_encoder(model)
  sizes.resolve(model, "text_")
  if model.queries < 1:
    raise InputError(f"model.queries={model.queries}: at least 1")
  if model.scan and model.cross_every != 1:
    raise InputError(
      f"model.cross_every={model.cross_every}: model.scan=True needs blocks "
      "that are alike"
    )
  if "modality" in model:
    return cavmae_config.check_classifier(model)
  _check_names("modes", model.modes, MODALITIES)
  _check_names("objectives", model.objectives, OBJECTIVES)
  lookup(dict.fromkeys(READINGS), model.matching_loss, "model.matching_loss")
  lookup(dict.fromkeys(EQUAL_TEXTS), model.equal_texts, "model.equal_texts")
  if not model.query_encoder and tuple(model.objectives) != ("contrast",):
    raise InputError(
      f"model.objectives={tuple(model.objectives)}: without a query encoder "
      "(model.query_encoder=False) there is nothing but ('contrast',)"
    )
  return model


def _check_names(key: str, names: Any, known: Any) -> None:
  """At least one name, each once and known."""
  for name in names:
    lookup(dict.fromkeys(known), name, f"model.{key}")
  if not names or len(set(names)) < len(names):
    raise InputError(
      f"model.{key}={tuple(names)}: one or more of {', '.join(known)}, each "
      "once"
    )
