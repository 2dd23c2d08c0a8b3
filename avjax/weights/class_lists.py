"""The order of the classes in public classifiers, and their names.

The package's lists are in `avjax/data/classes`.
"""

import importlib.resources
import json
from typing import Any

import numpy as np


def class_order(params: Any, *, to_house: bool) -> Any:
  """VGGSound's classifiers of CAV-MAE or UAVM in our order of classes, or back.

  Their authors number the 309 classes as a list of their own does, we as the
  authors of the data set do. Other numbers of classes stay as they are:
  AudioSet's order is one and the same.
  """
  order = np.asarray(_class_list("vggsound")["cavmae"])
  index = np.argsort(order) if to_house else order
  changed = {}
  for name, tree in params.items():
    out = tree.get("out") if name.startswith("classifier") else None
    if out is not None and out["bias"].shape == order.shape:
      out = {leaf: np.asarray(x)[..., index] for leaf, x in out.items()}
      changed[name] = {**tree, "out": out}
  return {**params, **changed}


def class_names(family: str, config: Any) -> dict[str, list[str]]:
  """Names in the order of a classifier's logits, by head, without the data.

  They are the lists of `avjax/data/classes`: {} where there is none for
  `config.data.name`, where it has another number of classes, or where the
  order is not known, as for the released MBT weights.
  """
  wanted = config.model.get("classes")
  file = _class_list(config.data.name)
  if not wanted or not file or tuple(config.data.heads) != ("label",):
    return {}
  if orderless(family) or wanted.get("label") != len(file["names"]):
    return {}
  return {"label": file["names"]}


def orderless(family: str) -> bool:
  """Whether a family's public files do not say their classes' order."""
  return family.startswith("mbt")


def _class_list(data: str) -> dict[str, Any]:
  """The package's list of a data set's classes; {} = there is none."""
  folder = importlib.resources.files("avjax.data") / "classes"
  file = folder / f"{data}.json"
  return json.loads(file.read_text()) if file.is_file() else {}
