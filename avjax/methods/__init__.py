"""One file per paper; METHODS names them."""

import importlib
from typing import Any

from avjax.errors import lookup
from avjax.methods.base import Method

METHODS = {
  "avmae": "avjax.methods.avmae:AVMAE",
  "mbt": "avjax.methods.mbt:MBT",
  "cavmae": "avjax.methods.cavmae:CAVMAE",
  "cavmae_finetune": "avjax.methods.cavmae_finetune:CAVMAEFinetune",
  "deteclap": "avjax.methods.deteclap:DETECLAP",
  "avsiam": "avjax.methods.avsiam:AVSiam",
  "avsiam_finetune": "avjax.methods.avsiam_finetune:AVSiamFinetune",
  "convnext": "avjax.methods.convnext:ConvNeXtClassifier",
  "uavm": "avjax.methods.uavm:UAVM",
  "coavt": "avjax.methods.coavt:CoAVT",
  "coavt_finetune": "avjax.methods.coavt_finetune:CoAVTFinetune",
}


def make(config: Any) -> Method:
  """The method that `config.method` names.

  Raises:
    InputError: no such method; the nearest is named.
  """
  module, name = lookup(METHODS, config.method, "method").split(":")
  return getattr(importlib.import_module(module), name)(config)
