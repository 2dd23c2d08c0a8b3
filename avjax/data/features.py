"""Frozen features of clips on disk: what a network makes of each.

A folder holds three files a modality, `audio` and `video`, of one data set and
one pair of networks; see `avjax.data.clip_rows`:

- `audio.npy`: float16 or float32 [clips, n, d], the tokens of each clip in the
  order of time;
- `audio_lengths.npy`: int16 [clips], how many of the n tokens there are; 0 =
  the clip has no features;
- `audio.json`: `clips` (ids by row), `source` (what made the features, by key)
  and `failed` (id -> reason).

`python -m data_prep.features` writes them: extracts, or takes published ones.
UAVM reads them (arXiv:2208.00061, §II-A).
"""

import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging
from jaxtyping import Bool, Float, Float32, Int16

from avjax.batch import MODALITIES
from avjax.data import clip_rows, example
from avjax.errors import InputError, lookup

MAX_MISSING = 0.5  # share of a split's clips
DTYPES = {"float16": np.float16, "float32": np.float32}
# Of a float32, the bits that a float16 can set; exponents 127 - 15 apart.
_PARTS, _SHIFT = np.int32(-0x70002000), np.float32(2.0**112)


class Features(clip_rows.Rows):
  """Stored features of one modality, [clips, n, d].

  Attributes:
    lengths: tokens of each clip, 0 = none.
    clips: ids by row.
    source: what made the features, in words by key.
    failed: id -> why a clip has none.

  Raises:
    InputError: the files are missing or do not fit each other.
  """

  WORDS = "features"
  MADE_BY = "Features are made by `python -m data_prep.features`"

  def understand(self, said: Mapping[str, Any]) -> None:
    """Reads the lengths."""
    path, count = lengths_path(self.path), len(self.clips)
    kinds = (np.int16,)
    self.lengths = np.array(clip_rows.mapped(path, (count,), kinds, "r"))

  def opened(self, mode: str) -> np.ndarray:
    """float16 or float32 [clips, n, d] on disk."""
    shape = (len(self.clips), 0, 0)
    return clip_rows.mapped(self.path, shape, (*DTYPES.values(),), mode)

  def done(self) -> Bool[np.ndarray, "clips"]:
    """Clips that have features."""
    return self.lengths > 0


def lengths_path(path: pathlib.Path) -> pathlib.Path:
  """The file of the lengths beside that of the features."""
  return path.with_name(f"{path.stem}_lengths.npy")


class Column(clip_rows.Column):
  """The features of the clips of a split, by the clip's number.

  Args:
    features: of one modality.
    ids: of the split's clips in order.

  Attributes:
    lengths: stored tokens of each clip of the split.
  """

  def __init__(self, features: Features, ids: Sequence[str]):
    rows = features.done_rows(ids)
    super().__init__(features, rows)
    self.lengths = np.where(rows < 0, 0, features.lengths[rows])

  def read(self, number: int, out: Float32[np.ndarray, "n d"]) -> bool:
    """Writes a clip's first tokens, zeros after them; false = it has none."""
    length = min(int(self.lengths[number]), len(out))
    if length:
      widen(self._values[int(self._rows[number]), :length], out[:length])
    out[length:] = 0
    return length > 0


def widen(
  stored: Float[np.ndarray, "n d"], out: Float32[np.ndarray, "n d"]
) -> None:
  """Copies float32, or finite float16 exactly and in a fifth of NumPy's time.

  Exponent and fraction of a float16 are moved to their places in a float32,
  whose exponent counts from 127 instead of 15.
  """
  if stored.dtype != np.float16:
    out[:] = stored
    return
  bits = out.view(np.int32)
  bits[:] = stored.view(np.int16)  # the sign fills the upper half
  bits <<= 13
  bits &= _PARTS
  out *= _SHIFT


class Reader:
  """The clips of a split: their features and labels, nothing of the media.

  Args:
    data: `config.data`.
    split: `records.Split` or a mixture of them.

  Raises:
    InputError: the folder lacks a modality of `data.modality`, has features of
      another width than `data.feature_width`, or lacks more than half of the
      clips.
  """

  def __init__(self, data: Any, split: Any):
    self._split, self._heads = split, tuple(data["heads"])
    self._folder = pathlib.Path(data["features"]).expanduser()
    ids = split.column("id")[: len(split)].tolist()
    self._columns = {}
    for modality in MODALITIES:
      if modality[0] in data["modality"]:
        stored = Features(self._folder, modality)
        width = stored.values.shape[2]
        if width != data["feature_width"]:
          raise InputError(
            f"{stored.path} has features of width {width}; "
            f"data.feature_width is {data['feature_width']}"
          )
        self._columns[modality] = Column(stored, ids)
    self._check(ids)

  def _check(self, ids: Sequence[str]) -> None:
    """Counts the clips that have features of any modality, and of each."""
    there = {m: column.lengths > 0 for m, column in self._columns.items()}
    any_ = np.any([*there.values()], axis=0)
    for what, found in {"": any_, **there}.items():
      absent = np.flatnonzero(~found)
      if not len(absent):
        continue
      counts = (
        f"{self._folder} has {what}{' ' * bool(what)}features of "
        f"{found.sum()} of the {len(ids)} clips"
      )
      name = ids[absent[0]]
      share = MAX_MISSING if not what else 1.0
      if len(absent) > share * len(ids) or not found.any():
        raise InputError(
          f"{counts} of {self._split.folder}; {name!r} has none. Name the "
          "features of this data set in data.features, or make them: `python "
          "-m data_prep.features`"
        )
      logging.warning("%s; such as %r has none", counts, name)

  def clip(self, number: int) -> example.Clip:
    """A clip's id and labels.

    Only heads that the index lacks are read from the record.

    Raises:
      ValueError: it has no features of any modality.
    """
    if not any(column.lengths[number] for column in self._columns.values()):
      raise ValueError(f"no features in {self._folder}")
    if set(self._heads) - {"label"}:
      return example.from_record(self._split[number], "", self._heads)
    labels = {h: self._split.labels_of(number).tolist() for h in self._heads}
    name = str(self._split.column("id")[number])
    return example.Clip(name, (), 0.0, (), labels)

  def fill(self, number: int, out: Mapping[str, np.ndarray], row: int) -> None:
    """Fills `features/*` and `has_*` of one row of a batch."""
    for modality, column in self._columns.items():
      has = column.read(number, out[f"features/{modality}"][row])
      out[f"has_{modality}"][row] = has


class Writer(clip_rows.RowsWriter, Features):
  """Features that are being made; what was made before is kept.

  One process at a time writes a modality of a folder; `close` lets the next.
  Only `save` makes clips count as done.

  Args:
    folder: is made if need be.
    modality: 'audio' or 'video'.
    tokens: n; of a clip that has more, the first are kept.
    width: d.
    dtype: 'float16' or 'float32'.
    source: what makes the features; must be the same at each call, but for
      the version of the `library`.
    clips: ids of which features are to be made. New ones are added to those
      on disk.

  Raises:
    InputError: the folder holds features of another shape, dtype or source:
      names the difference; it cannot be written, or another process does.
  """

  KIND = Features

  def __init__(
    self,
    folder: str | os.PathLike,
    modality: str,
    *,
    tokens: int,
    width: int,
    dtype: str = "float16",
    source: Mapping[str, Any],
    clips: Sequence[str],
  ):
    self._shape, self._dtype = (tokens, width), lookup(DTYPES, dtype, "dtype")
    said = {"source": dict(source)}
    super().__init__(folder, modality, said=said, clips=clips)

  def grow(self, path: pathlib.Path, count: int, old: Features | None) -> None:
    """Adds rows without features: their room first, then their lengths."""
    values = old.values if old else None
    if old is not None:
      new = {"shape": self._shape, "dtype": np.dtype(self._dtype).name}
      there = {"shape": values.shape[1:], "dtype": values.dtype.name}
      self.compare(path, "form", there, new)
      if count == len(values):
        return
    shape = (count, *self._shape)
    clip_rows.lengthen(path, shape, self._dtype, old=values)
    lengths = np.zeros(count, np.int16)
    if old is not None:
      lengths[: len(values)] = old.lengths
    _write_lengths(path, lengths)

  def write(
    self,
    ids: Sequence[str],
    features: Sequence[Float[np.ndarray, "_ d"]] | Float[np.ndarray, "b _ d"],
  ) -> None:
    """Stores the features of some clips.

    Raises:
      ValueError: they are not finite in the dtype that is stored, have no
        tokens or another width; or an id is not among the clips.
    """
    tokens, width = self._shape
    for name, one in zip(ids, features, strict=True):
      if not len(one) or one.shape[1] != width:
        raise ValueError(
          f"features of {name!r} have the shape {one.shape}; the width is "
          f"{width}"
        )
      (row,), rounded = self.take([name], one[:tokens], self._dtype)
      self.values[row, : len(rounded)] = rounded
      self.lengths[row] = len(rounded)

  def save(self) -> None:
    """Makes sure that what was written so far is on disk."""
    self.values.flush()
    _write_lengths(self.path, self.lengths)  # once the features are there
    super().save()


def _write_lengths(
  path: pathlib.Path, lengths: Int16[np.ndarray, "clips"]
) -> None:
  target = lengths_path(path)
  part = target.with_name(f"{target.stem}.part.npy")
  np.save(part, lengths)
  part.replace(target)
