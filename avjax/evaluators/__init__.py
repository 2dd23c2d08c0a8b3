"""Evaluators by name."""

import importlib
from typing import Any

from avjax.errors import lookup
from avjax.evaluators.base import Context, Evaluator

EVALUATORS = {
  "captions": "avjax.evaluators.captions:Captions",
  "classification": "avjax.evaluators.classification:Classification",
  "layers": "avjax.evaluators.layers:Layers",
  "linear_probe": "avjax.evaluators.linear_probe:LinearProbe",
  "reconstruction": "avjax.evaluators.reconstruction:Reconstruction",
  "retrieval": "avjax.evaluators.retrieval:Retrieval",
  "text_retrieval": "avjax.evaluators.text_retrieval:TextRetrieval",
}


def make(context: Context, section: Any) -> Evaluator:
  """The evaluator of one entry of `config.evals`."""
  path = lookup(EVALUATORS, section.type, "evaluator")
  module, name = path.split(":")
  return getattr(importlib.import_module(module), name)(context, section)
