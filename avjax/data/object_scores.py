"""Object scores of clips on disk: how sure a model is of each label.

A folder holds one pair of files a modality, `audio` and `video`, see
`avjax.data.clip_rows`:

- `audio.npy`: float16 [clips, labels]; a row of NaN has no scores;
- `audio.json`: `labels` (names by column), `clips` (ids by row), `source` (what
  made the scores, by key) and `failed` (id -> reason); the last two are
  optional.

A label and a clip are named once. `python -m data_prep.object_labels` writes
the files, and so may any other program: `numpy.save` and a JSON file.
Thresholds and how the two are merged are choices of the training (DETECLAP,
arXiv:2409.11729, §III).
"""

import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging
from jaxtyping import Bool, Float, Float16

from avjax.data import clip_rows
from avjax.errors import InputError

MODALITIES = ("audio", "video")
MAX_MISSING = 0.5  # share of a split's clips
BLOCK = 1 << 16  # rows looked at together: the array may exceed the memory


class Scores(clip_rows.Rows):
  """Stored scores of one modality, float16 [clips, labels].

  Attributes:
    labels: names by column.
    clips: ids by row.
    source: what made the scores, in words by key.
    failed: id -> why a clip has none.

  Raises:
    InputError: the files are missing or do not fit each other.
  """

  WORDS = "scores"
  MADE_BY = "Object scores are made by `python -m data_prep.object_labels`"
  LISTS = ("labels", "clips")

  def understand(self, said: Mapping[str, Any]) -> None:
    """Takes the labels."""
    self.labels: list[str] = said["labels"]

  def opened(self, mode: str) -> np.ndarray:
    """float16 [clips, labels] on disk."""
    shape = (len(self.clips), len(self.labels))
    return clip_rows.mapped(self.path, shape, (np.float16,), mode)

  def done(self) -> Bool[np.ndarray, "clips"]:
    """Clips that have scores."""
    return scored_rows(self.values)


class Column(clip_rows.Column):
  """The scores of the clips of a split, by the clip's number.

  Args:
    scores: of one modality.
    ids: of the split's clips in order.

  Raises:
    InputError: more than half of the clips have no scores.
  """

  def __init__(self, scores: Scores, ids: Sequence[str]):
    rows = scores.done_rows(ids)
    super().__init__(scores, rows)
    self._blank = np.full(len(scores.labels), np.nan, np.float16)
    missing = np.flatnonzero(rows < 0)
    if len(missing) > MAX_MISSING * len(rows):
      raise InputError(
        f"{scores.path} has scores of {len(rows) - len(missing)} of the "
        f"{len(rows)} clips; at least {1 - MAX_MISSING:.0%} are needed. "
        f"{ids[missing[0]]!r} has none"
      )
    if len(missing):
      logging.warning(
        "%s has no scores of %d of the %d clips, such as %r",
        scores.path, len(missing), len(rows), ids[missing[0]],
      )  # fmt: skip

  def __getitem__(self, number: int) -> Float16[np.ndarray, "labels"]:
    row = self._rows[number]
    return self._blank if row < 0 else self._values[row]


def read(folder: str | os.PathLike) -> dict[str, Scores]:
  """The scores in a folder by modality; one may be absent.

  Raises:
    InputError: there are none, or the two have other labels.
  """
  path = pathlib.Path(folder).expanduser()
  there = [m for m in MODALITIES if (path / f"{m}.json").exists()]
  found = {m: Scores(path, m) for m in there or MODALITIES}
  if len(there) == 2:
    a, b = (scores.labels for scores in found.values())
    difference = clip_rows.different(a, b)
    if difference:
      raise InputError(
        f"{path}: the labels of audio and video differ ({difference})"
      )
  return found


def columns(folder: str | os.PathLike, ids: Sequence[str]) -> dict[str, Column]:
  """By batch key, the scores of the clips of a split; see `Column`."""
  return {f"objects/{m}": Column(s, ids) for m, s in read(folder).items()}


class Writer(clip_rows.RowsWriter, Scores):
  """Scores that are being made; what was made before is kept.

  One process at a time writes a modality of a folder; `close` lets the next.

  Args:
    folder: is made if need be.
    modality: 'audio' or 'video'.
    labels: names by column.
    source: what makes the scores; must be the same at each call, but for
      the version of the `library`.
    clips: ids that are to be scored. New ones are added to those on disk.

  Raises:
    InputError: the folder holds scores of other labels or of another source:
      names the difference; it cannot be written, or another process does.
  """

  KIND = Scores

  def __init__(
    self,
    folder: str | os.PathLike,
    modality: str,
    *,
    labels: Sequence[str],
    source: Mapping[str, Any],
    clips: Sequence[str],
  ):
    check_labels(labels)
    said = {"labels": list(labels), "source": dict(source)}
    self._columns = len(labels)
    super().__init__(folder, modality, said=said, clips=clips)

  def grow(self, path: pathlib.Path, count: int, old: Scores | None) -> None:
    """Adds rows without scores."""
    values = old.values if old else None
    if old is None or count > len(values):
      shape = (count, self._columns)
      clip_rows.lengthen(path, shape, np.float16, old=values, fill=np.nan)

  def write(
    self,
    ids: Sequence[str],
    scores: Float[np.ndarray, "n labels"] | Sequence[np.ndarray],
  ) -> None:
    """Stores the scores of some clips, rounded to float16.

    Raises:
      ValueError: a score is not finite, or an id is not among the clips.
    """
    rows, rounded = self.take(ids, np.asarray(scores), np.float16)
    self.values[rows] = rounded


def check_labels(labels: Sequence[str]) -> None:
  """Refuses a list of labels that is empty or names one twice.

  Raises:
    InputError: says which.
  """
  if not labels:
    raise InputError("the list of labels is empty")
  repeated = clip_rows.twice(labels)
  if repeated:
    raise InputError(f"label {repeated[0]!r} is listed twice")


def scored_rows(values: np.ndarray) -> np.ndarray:
  """bool [clips]: rows without NaN."""
  found = np.ones(len(values), np.bool_)
  for k in range(0, len(values), BLOCK):
    found[k : k + BLOCK] = np.isfinite(values[k : k + BLOCK]).all(axis=1)
  return found
