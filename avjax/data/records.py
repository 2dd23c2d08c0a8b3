"""Built data sets on disk: their splits, class names and records.

A record is a `tf.train.Example` as TFDS writes it. Only the fields that are
asked for are taken from it, without copying: a clip holds over a hundred JPEG
files of which a training step wants sixteen, and parsing the rest costs more
than decoding one. `tfds.builder_from_directory` reads the same files.
"""

import pathlib
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from avjax.data import id_list
from avjax.data.datasets import built_dir
from avjax.errors import InputError, lookup

_RAW = tfds.decode.DeserializeMethod.RAW_BYTES


class Record:
  """One stored clip; the fields are those of `data_prep/builder.py`.

  Raises:
    ValueError: the bytes are not a record.
  """

  def __init__(self, data: bytes):
    self._data = data
    try:
      self._lists = _quick_lists(data) or _find_lists(data)
    except IndexError as error:
      raise ValueError("a record ends too early") from error

  def _values(self, name: str, kind: int) -> Iterator[tuple[int, int, int]]:
    found, start, stop = self._lists.get(name, (kind, 0, 0))
    if found != kind:
      raise ValueError(f"field {name!r} of a record has another type")
    return _fields(self._data, start, stop)

  def blobs(self, name: str) -> list[memoryview]:
    """Byte strings, not copied; empty if the field is missing."""
    data = memoryview(self._data)
    return [data[a:b] for _, a, b in self._values(name, 1)]

  def text(self, name: str) -> str:
    """A single text."""
    return str(self.blobs(name)[0], "utf-8")

  def floats(self, name: str) -> np.ndarray:
    """Float32 values."""
    parts = [self._data[a:b] for _, a, b in self._values(name, 2)]
    return np.frombuffer(b"".join(parts), np.float32)

  def integers(self, name: str) -> list[int]:
    """Integers (signed 64 bits)."""
    numbers = []
    for _, start, stop in self._values(name, 3):
      while start < stop:
        number, start = _varint(self._data, start)
        numbers.append(number - (1 << 64) if number >> 63 else number)
    return numbers


def _find_lists(data: bytes) -> dict[str, tuple[int, int, int]]:
  """Where each feature's values lie: name -> field number, start, stop.

  Field numbers 1, 2, 3 of tf.train.Feature are lists of bytes, floats and
  integers.
  """
  lists = {}
  for _, start, stop in _fields(data, 0, len(data)):
    for _, start_, stop_ in _fields(data, start, stop):
      entry = list(_fields(data, start_, stop_))
      if len(entry) == 2:
        (_, *key), (_, *value) = entry
        name = str(data[slice(*key)], "utf-8")
        for field in _fields(data, *value):
          lists[name] = field
  return lists


def _quick_lists(data: bytes) -> dict[str, tuple[int, int, int]] | None:
  """As `_find_lists`, in a quarter of its time, of records as TFDS writes them.

  One message, of entries of a name of less than 128 bytes and a feature with
  one list each; None, if the record has another form.
  """
  end = len(data)
  if data[:1] != b"\n":
    return None
  length, at = _varint(data, 1)
  if at + length != end:
    return None
  lists = {}
  while at < end:
    # Tags, all of fields with a length: entry, name, feature, list.
    if data[at] != 10:
      return None
    length = data[at + 1]
    at += 2
    if length > 127:
      length, at = _varint(data, at - 1)
    stop, name_end = at + length, at + 2 + data[at + 1]
    if data[at] != 10 or data[at + 1] > 127 or data[name_end] != 18:
      return None
    name = data[at + 2 : name_end]
    at, length = name_end + 2, data[name_end + 1]
    if length > 127:
      length, at = _varint(data, name_end + 1)
    if not length or at + length != stop:
      return None
    kind, length = data[at], data[at + 1]
    at += 2
    if length > 127:
      length, at = _varint(data, at - 1)
    if at + length != stop or kind not in (10, 18, 26):
      return None
    lists[str(name, "utf-8")] = (kind >> 3, at, stop)
    at = stop
  return lists if at == end else None


def _varint(data: bytes, at: int) -> tuple[int, int]:
  """A protocol-buffer integer and the position after it."""
  byte = data[at]
  if byte < 128:
    return byte, at + 1
  number, shift = byte & 127, 7
  while True:
    at += 1
    byte = data[at]
    number |= (byte & 127) << shift
    if byte < 128:
      return number, at + 1
    shift += 7


def _fields(data: bytes, at: int, end: int) -> Iterator[tuple[int, int, int]]:
  """(field number, start, stop) of each field with a length.

  An integer that is not packed is given as its own bytes.
  """
  while at < end:
    tag, at = _varint(data, at)
    if tag & 7 == 2:
      length, at = _varint(data, at)
      stop = at + length
    elif tag & 7 == 0:
      stop = _varint(data, at)[1]
    else:
      stop = at + {1: 8, 5: 4}.get(tag & 7, len(data))
    if stop > end:
      raise ValueError("a field of a record is longer than the record")
    yield tag >> 3, at, stop
    at = stop


class Split:
  """Records of one split in their stored order; may go to other processes.

  Args:
    data: `config.data`.
    split: a split of the built data set.
    limit: first clips only; 0 = all.
    exclude: file of ids (`avjax.data.id_list`) whose clips are as if they were
      not there; '' = none.

  Attributes:
    excluded: in words, how many clips are left out; '' without `exclude`.

  Raises:
    InputError: the data set is not built or has no such split, or `exclude`
      cannot be read or leaves no clip.
  """

  def __init__(
    self, data: Any, split: str, limit: int = 0, *, exclude: str = ""
  ):
    if limit < 0:
      raise InputError(f"limit is {limit}; expected 0 (all clips) or more")
    self.folder, self.name = built_dir(data), split
    info = tfds.builder_from_directory(self.folder).info
    stored = lookup(
      dict(info.splits), split, f"split of {self.folder}"
    ).num_examples
    self.metadata = dict(info.metadata or {})
    self._open()
    self._kept: np.ndarray | None = None  # numbers of stored clips
    self.excluded = ""
    if exclude:
      self._leave_out(exclude)
      stored = len(self._kept)
    self._count = min(limit, stored) if limit else stored

  def _leave_out(self, path: str) -> None:
    listed = id_list.read(path)
    out, unknown = id_list.named(self.column("id").tolist(), listed)
    self.excluded = (
      f"{path}: {out.sum()} of the {len(out)} clips of split {self.name!r} of "
      f"{self.folder} are left out; {unknown} of the {len(set(listed))} ids "
      "are of no clip there"
    )
    if out.all():
      raise InputError(self.excluded)
    self._columns = {}
    self._kept = np.flatnonzero(~out)

  def _open(self) -> None:
    self._source: Any = None
    self._columns: dict[str, np.ndarray] = {}
    self._lock = threading.Lock()

  def __getstate__(self) -> dict[str, Any]:
    made_here = ("_source", "_columns", "_lock")
    return {k: v for k, v in self.__dict__.items() if k not in made_here}

  def __setstate__(self, state: dict[str, Any]) -> None:
    self.__dict__.update(state)
    self._open()

  def __len__(self) -> int:
    return self._count

  def __getitem__(self, number: int) -> Record:
    if self._source is None:
      with self._lock:
        if self._source is None:
          builder = tfds.builder_from_directory(self.folder)
          self._source = builder.as_data_source(
            self.name, deserialize_method=_RAW
          )
    if self._kept is not None:
      number = self._kept[number]
    return Record(self._source[int(number)])

  def column(self, name: str) -> np.ndarray:
    """One value of every clip, from the index beside the records.

    Args:
      name: `id`, `seconds`, `has_audio`, `has_video`; `label` holds the labels
        of all clips in a row, `label_ends` where each clip's end.
    """
    if name not in self._columns:
      path = self.folder / f"index_{self.name}.npz"
      if not path.exists():
        raise InputError(f"{path} is missing; build the data set again")
      with np.load(path) as arrays:
        self._columns[name] = self._of_kept(arrays, name)
    return self._columns[name]

  def _of_kept(self, arrays: Any, name: str) -> np.ndarray:
    """A column of the index without what is excluded."""
    values = arrays[name]
    if self._kept is None:
      return values
    if name not in ("label", "label_ends"):
      return values[self._kept]
    counts = np.diff(arrays["label_ends"], prepend=0)
    if name == "label_ends":
      return np.cumsum(counts[self._kept])
    kept = np.zeros(len(counts), bool)
    kept[self._kept] = True
    return values[np.repeat(kept, counts)]

  def labels(self) -> list[np.ndarray]:
    """The class numbers of each clip, the main one first; may be empty."""
    ends = self.column("label_ends")[: len(self)]
    return np.split(self.column("label"), ends)[: len(self)]

  def labels_of(self, number: int) -> np.ndarray:
    """The class numbers of one clip, the main one first; may be empty."""
    ends = self.column("label_ends")
    start = ends[number - 1] if number else 0
    return self.column("label")[start : ends[number]]

  def label_weights(self) -> np.ndarray:
    """float64 [clips]: sum over labels of 1000 / (clips with it + 0.01).

    The weights of the public AudioSet recipes (PSLA, AST, CAV-MAE).
    """
    ends = self.column("label_ends")[: self._count]
    labels = self.column("label")[: ends[-1]]
    counts = np.bincount(labels)
    each = 1000.0 / (counts[labels] + 0.01)
    sums = np.concatenate([[0.0], np.cumsum(each)])
    return np.diff(sums[np.concatenate([[0], ends])])


def class_names(data: Any, head: str = "label") -> Sequence[str]:
  """Names of a head's classes, in the order of their numbers.

  Raises:
    InputError: the data set is not built, or has no such head.
  """
  folder: pathlib.Path = built_dir(data)
  metadata = tfds.builder_from_directory(folder).info.metadata or {}
  return lookup(metadata.get("classes", {}), head, f"head of {folder}")
