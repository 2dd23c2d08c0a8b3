"""The data sets by name: what a built one offers, and its published size."""

import dataclasses
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from avjax.errors import InputError, lookup


@dataclasses.dataclass(frozen=True)
class Dataset:
  """A data set of `data_prep/`, stored as `<data_dir>/<name>/<variant>/`.

  Attributes:
    splits: split -> number of clips as published (the built one may lack
      some); 0 = not fixed.
    heads: head -> number of classes; the batch key is `label` or
      `label/<head>`.
    multilabel: several of the classes may hold at once (sigmoid, mAP).
    seconds: length of a clip, 0 = varies.
  """

  splits: Mapping[str, int]
  heads: Mapping[str, int]
  multilabel: bool = False
  seconds: float = 10.0


DATASETS: dict[str, Dataset] = {
  # avjax/data/demo.py; `train_multi`/`test_multi` carry AudioSet-like labels.
  "av_demo": Dataset(
    {"train": 0, "test": 0},
    {"label": 24, "verb": 8, "noun": 24, "segment": 25},
    seconds=3.0,
  ),
  "vggsound": Dataset({"train": 172_427, "test": 14_448}, {"label": 309}),
  "audioset": Dataset(
    {
      "train_20k": 20_361,
      "train_500k": 508_994,
      "train_2m": 1_857_210,
      "eval": 18_589,
    },
    {"label": 527},
    multilabel=True,
  ),
  "epic_kitchens": Dataset(
    {"train": 67_217, "validation": 9_668},
    {"noun": 300, "verb": 97},
    seconds=0.0,
  ),
  # 28 event categories and background.
  "ave": Dataset(
    {"train": 3_339, "validation": 402, "test": 402}, {"segment": 29}
  ),
  "audiocaps": Dataset({"train": 0, "validation": 0, "test": 0}, {}),
  "clotho": Dataset({"train": 0, "validation": 0, "test": 0}, {}, seconds=0.0),
  "msrvtt": Dataset({"train": 0, "test": 2_990, "test_1ka": 1_000}, {}),
  "acav": Dataset({"train": 0}, {}),
  "folder": Dataset({"train": 0, "test": 0}, {}, seconds=0.0),
}

VARIANTS = {
  "video": "12.5 frames/s: 32 frames at stride 2 of 25 frames/s and less",
  "frames10": "10 frames spread over the clip (the CAV-MAE family)",
}


def data_dir(config_data: Any) -> pathlib.Path:
  """Where built data sets lie: data.dir, $AVJAX_DATA or ~/avjax_data."""
  path = config_data["dir"] or os.environ.get("AVJAX_DATA", "~/avjax_data")
  return pathlib.Path(path).expanduser()


def built_dir(config_data: Any) -> pathlib.Path:
  """Folder of the newest built version of the config's data set.

  Raises:
    InputError: the name is unknown, or nothing is built there: the message
      names the command that builds it, and `:demo`.
  """
  name, variant = config_data["name"], config_data["variant"]
  lookup(DATASETS, name, "data set")
  lookup(VARIANTS, variant, "variant of a data set")
  root = data_dir(config_data) / name / variant
  versions = sorted(
    (p.parent for p in root.glob("*/dataset_info.json")),
    key=lambda p: tuple(int(n) for n in p.name.split(".") if n.isdigit()),
  )
  if not versions:
    raise InputError(
      f"no built data set {name}/{variant} under {data_dir(config_data)}. "
      f"Build it with `python -m data_prep.build --dataset={name} "
      "--media=DIR --annotations=FILE --data_dir=OUT`, name its place with "
      "--config.data.dir or $AVJAX_DATA, or add `:demo` to the config to use "
      "the built-in data set."
    )
  return versions[-1]
