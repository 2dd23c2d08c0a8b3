"""Object labels of a run: how many, which, and what scored them.

A run that learns objects (DETECLAP) notes this beside its checkpoints, so that
it can be used where the scores are not, and does not go on with others.
"""

import json
from typing import Any

from avjax.data import object_scores
from avjax.errors import InputError
from avjax.workdir import Workdir, write_text


def counted(config: Any) -> Any:
  """The config with `model.objects` set, if the method has such a key.

  Raises:
    InputError: `data.object_scores` names no scores.
  """
  folder = config.data.object_scores
  if not folder or config.model.get("objects", None) != 0:
    return config
  scores = next(iter(object_scores.read(folder).values()))
  config = config.copy_and_resolve_references()
  with config.unlocked():
    config.model.objects = len(scores.labels)
  return config


def without_scores(config: Any) -> Any:
  """A run's config for all but training, which alone reads the scores."""
  if config.model.get("objects", 0):
    with config.unlocked():
      config.data.object_scores = ""
  return config


def note(data: Any, run: Workdir, *, begun: bool) -> None:
  """Writes `objects.json`, or compares with it.

  Args:
    data: `config.data`.
    run: the run's folder.
    begun: it has trained before.

  Raises:
    InputError: the run has learnt other labels, or those of other models.
  """
  if not data.object_scores:
    return
  found = object_scores.read(data.object_scores)
  said = {
    "labels": next(iter(found.values())).labels,
    "source": {m: scores.source for m, scores in found.items()},
  }
  if begun and run.objects.exists():
    old = json.loads(run.objects.read_text())
    for key, value in said.items():
      if old[key] != value:
        raise InputError(
          f"{run.root} was trained with other {key} of objects than those in "
          f"{data.object_scores}; {run.objects} has them"
        )
  write_text(run.objects, json.dumps(said, indent=2) + "\n")
