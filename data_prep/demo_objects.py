"""Object scores of `av_demo` from what is truly in its clips, degraded.

A clip's sounds, those from outside the picture too, are its audio objects; what
is drawn in it, silent things too, its visual objects. So neither holds all of
the other. Scores err at a stated rate, each modality by itself: `missed` of the
objects that are there score below 0.5, `imagined` of those that are not score
above. A score is the sigmoid of a normal variate of variance 1, whose mean
gives just that share.
"""

import pathlib
import statistics
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float16

from avjax.data import demo, object_scores, records
from avjax.errors import InputError
from data_prep import av_demo

SPLITS = ("train", "test")


def ensure(data: Any, folder: pathlib.Path) -> pathlib.Path:
  """Writes the scores of a built av_demo, unless they are there.

  Args:
    data: `config.data` with `dir` set; `demo` has the error rates.
    folder: that holds the data set.

  Returns:
    The folder of the scores, one for each pair of rates.

  Raises:
    InputError: a rate is not between 0 and 1.
  """
  rates = {name: data["demo"][name] for name in ("missed", "imagined")}
  for name, rate in rates.items():
    if not 0 < rate < 1:
      raise InputError(f"data.demo.{name} is {rate}; it lies between 0 and 1")
  out = folder / "_".join(["objects", *map(str, rates.values())])
  place = {**data, "dir": str(folder)}
  splits = [records.Split(place, name) for name in SPLITS]
  with av_demo.lock(folder / ".lock"):
    for modality in object_scores.MODALITIES:
      _write(out, modality, splits, rates)
  return out


def _write(
  out: pathlib.Path,
  modality: str,
  splits: Sequence[records.Split],
  rates: Mapping[str, float],
) -> None:
  stream = object_scores.MODALITIES.index(modality)
  with object_scores.Writer(
    out,
    modality,
    labels=demo.CLASSES,
    source={"model": "av_demo's own objects", **rates},
    clips=[str(name) for split in splits for name in split.column("id")],
  ) as writer:
    for split in splits if writer.missing() else ():
      names, present = truth(split, modality)
      pairs = zip(names, present, strict=True)
      found = [scores(row, name, stream, **rates) for name, row in pairs]
      if found:
        writer.write(names, np.stack(found))
    writer.save()


def truth(
  split: records.Split, modality: str
) -> tuple[list[str], Bool[np.ndarray, "clips 24"]]:
  """Ids, and which of `demo.CLASSES` each clip holds in one modality."""
  place = {name: k for k, name in enumerate(demo.CLASSES)}
  present = np.zeros((len(split), len(place)), bool)
  names = []
  for number in range(len(split)):
    record = split[number]
    names.append(record.text("id"))
    if modality == "audio":
      found: Sequence[int] = record.integers("label")
    else:
      drawn = {str(name, "utf-8") for name in record.blobs("objects/name")}
      found = [place[name] for name in drawn]
    present[number, list(found)] = True
  return names, present


def scores(
  present: Bool[np.ndarray, "k"],
  name: str,
  stream: int,
  *,
  missed: float,
  imagined: float,
) -> Float16[np.ndarray, "k"]:
  """Scores of one clip; they follow from its id and the stream alone."""
  rng = np.random.default_rng([zlib.crc32(name.encode()), stream])
  normal = statistics.NormalDist()
  mean = np.where(present, -normal.inv_cdf(missed), normal.inv_cdf(imagined))
  logits = mean + rng.standard_normal(len(present))
  return (1 / (1 + np.exp(-logits))).astype(np.float16)
