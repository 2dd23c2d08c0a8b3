"""A row of numbers for each clip, on disk: what scores and features share.

A folder holds of each modality `<modality>.npy`, a row a clip, and
`<modality>.json`: `clips` (ids by row), `source` (what made the rows, by key)
and `failed` (id -> reason), the last two optional, and what a kind of rows
adds. A clip is named once. Any program may write such files: `numpy.save` and
a JSON file.
"""

import collections
import errno
import fcntl
import functools
import io
import json
import os
import pathlib
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from avjax.errors import InputError
from avjax.workdir import write_text


class Rows:
  """Stored rows of one modality, read as they are asked for.

  A kind of rows is a class of its own, which says what makes a row complete.

  Attributes:
    WORDS: what the rows are, in messages.
    MADE_BY: a sentence that says how they are made.
    LISTS: keys of the JSON file that are lists of different names.
    clips: ids by row.
    source: what made the rows, in words by key.
    failed: id -> why a clip has none.

  Raises:
    InputError: the files are missing or do not fit each other.
  """

  WORDS = "rows"
  MADE_BY = ""
  LISTS: tuple[str, ...] = ("clips",)

  def __init__(self, folder: str | os.PathLike, modality: str):
    self.path = pathlib.Path(folder).expanduser() / f"{modality}.npy"
    said = _read(self.path.with_suffix(".json"), self.LISTS, self.MADE_BY)
    self.clips: list[str] = said["clips"]
    self.source: dict[str, Any] = said["source"]
    self.failed: dict[str, str] = said["failed"]
    self.understand(said)
    self.values  # noqa: B018 - checks the array

  def understand(self, said: Mapping[str, Any]) -> None:
    """Takes what this kind of rows adds to the JSON file."""

  def opened(self, mode: str) -> np.ndarray:
    """The array on disk, 'r' or 'r+'; see `mapped`."""
    raise TypeError(f"{type(self).__name__} has no array")

  def done(self) -> Bool[np.ndarray, "clips"]:
    """Clips whose rows are complete."""
    raise TypeError(f"{type(self).__name__} has no rows")

  @functools.cached_property
  def values(self) -> np.ndarray:
    """[clips, …] on disk."""
    return self.opened("r")

  def __getstate__(self) -> dict[str, Any]:
    made_here = ("values", "_place")
    return {k: v for k, v in self.__dict__.items() if k not in made_here}

  @functools.cached_property
  def _place(self) -> dict[str, int]:
    return {name: k for k, name in enumerate(self.clips)}

  def rows(self, ids: Sequence[str]) -> Int[np.ndarray, "n"]:
    """The row of each id; -1 = not among the clips."""
    place = self._place
    return np.array([place.get(str(name), -1) for name in ids], np.int64)

  def done_rows(self, ids: Sequence[str]) -> Int[np.ndarray, "n"]:
    """The row of each id; -1 = none, or not complete."""
    rows = self.rows(ids)
    return np.where(np.append(self.done(), False)[rows], rows, -1)


class Column:
  """The rows of the clips of a split, by the clip's number.

  Rows that are made later than this count as absent. Goes to other processes
  without the names of the clips.

  Args:
    stored: of one modality.
    rows: of the split's clips in order, -1 = none; see `Rows.done_rows`.
  """

  def __init__(self, stored: Rows, rows: Int[np.ndarray, "n"]):
    values = stored.values
    self._file = stored.path, values.shape, (values.dtype,)
    self._rows = rows

  @functools.cached_property
  def _values(self) -> np.ndarray:
    # A plain array: slices of np.memmap cost more than reading a row.
    return mapped(*self._file, "r").view(np.ndarray)

  def __getstate__(self) -> dict[str, Any]:
    return {k: v for k, v in self.__dict__.items() if k != "_values"}


class RowsWriter(Rows):
  """Rows that are being made; what was made before is kept.

  One process at a time writes a modality of a folder; `close` lets the next.

  Args:
    folder: is made if need be.
    modality: 'audio' or 'video'.
    said: the JSON file's further keys, with `source`; must be the same at each
      call, but for the version of the source's `library`.
    clips: ids whose rows are to be made. New ones are added to those on disk.

  Attributes:
    KIND: the class that reads them.

  Raises:
    InputError: the folder holds rows of another kind or source: names the
      difference; it cannot be written, or another process does.
  """

  KIND: type[Rows] = Rows

  def __init__(
    self,
    folder: str | os.PathLike,
    modality: str,
    *,
    said: Mapping[str, Any],
    clips: Sequence[str],
  ):
    folder = pathlib.Path(folder).expanduser()
    try:
      folder.mkdir(parents=True, exist_ok=True)
      lock = _locked(folder / f"{modality}.lock", self.WORDS)
    except OSError as error:
      raise InputError(f"{folder}: {error}") from error
    self._unlock = weakref.finalize(self, os.close, lock)
    try:
      self._extend(folder / f"{modality}.npy", said, clips)
      super().__init__(folder, modality)
    except OSError as error:  # such as a full disk
      self.close()
      raise InputError(f"{folder}: {error}") from error
    except BaseException:
      self.close()
      raise
    self._wanted, self._noted = set(clips), dict(self.failed)

  def _extend(self, path, said, clips) -> None:
    """Brings the files to the clips asked for: the arrays first."""
    old, said = None, {**json.loads(json.dumps(said)), "failed": {}}
    if path.with_suffix(".json").exists():
      old = self.KIND(path.parent, path.stem)
      for key in self.LISTS[:-1]:
        self.compare(path, key, getattr(old, key), said[key])
      # A library's later version may add to what an earlier one made.
      pair = ({**s, "library": None} for s in (old.source, said["source"]))
      self.compare(path, "source", *pair)
      said["failed"] = old.failed
    before = old.clips if old else []
    known = set(before)
    added = [name for name in dict.fromkeys(clips) if name not in known]
    self.grow(path, len(before) + len(added), old)
    if added or old is None:
      _write(path.with_suffix(".json"), said | {"clips": before + added})

  def grow(self, path: pathlib.Path, count: int, old: Any) -> None:
    """Makes the arrays `count` rows long; `old` reads the present ones."""
    raise TypeError(f"{type(self).__name__} has no array")

  def compare(self, path: pathlib.Path, what: str, old: Any, new: Any) -> None:
    """Refuses to mix rows of two kinds.

    Raises:
      InputError: `old` is not `new`; says in which key or entry.
    """
    difference = different(old, new)
    if difference:
      raise InputError(
        f"{path} holds {self.WORDS} of other {what} ({difference} now): name "
        "another folder, or delete it and its JSON file"
      )

  @functools.cached_property
  def values(self) -> np.ndarray:
    """[clips, …] on disk, to be written."""
    return self.opened("r+")

  def missing(self) -> list[str]:
    """Ids that are asked for and have neither a row nor a reason."""
    return [
      name
      for name, done in zip(self.clips, self.done(), strict=True)
      if not done and name in self._wanted and name not in self.failed
    ]

  def take(
    self, ids: Sequence[str], values: np.ndarray, dtype: Any
  ) -> tuple[list[int], np.ndarray]:
    """Rows of clips that no longer fail, and their values in another dtype.

    Raises:
      ValueError: a value is not finite in it, or an id is not among the clips.
    """
    rows = self._rows_of(ids)
    with np.errstate(over="ignore"):  # infinite: refused
      rounded = values.astype(dtype)
    if not np.isfinite(rounded).all():
      raise ValueError(f"{self.WORDS} of {list(ids)} are not all finite")
    for name in ids:
      self.failed.pop(name, None)
    return rows, rounded

  def _rows_of(self, ids: Sequence[str]) -> list[int]:
    strange = [name for name in ids if name not in self._place]
    if strange:
      raise ValueError(f"{self.path} has no row for clip {strange[0]!r}")
    return [self._place[name] for name in ids]

  def fail(self, name: str, reason: str) -> None:
    """Notes why a clip has no row; `retry` forgets it."""
    self._rows_of([name])
    self.failed[name] = reason

  def retry(self) -> None:
    """Asks again for those of the clips asked for that failed."""
    for name in self._wanted & set(self.failed):
      del self.failed[name]

  def save(self) -> None:
    """Makes sure that what was written so far is on disk."""
    self.values.flush()
    if self.failed != self._noted:  # the file names every clip: it may be large
      said = {key: getattr(self, key) for key in (*self.LISTS, *TABLES)}
      _write(self.path.with_suffix(".json"), said)
      self._noted = dict(self.failed)

  def close(self) -> None:
    """Lets another process write; does not save."""
    self._unlock()

  def __enter__(self) -> "RowsWriter":
    return self

  def __exit__(self, *_: Any) -> None:
    """Saves and closes."""
    try:
      self.save()
    finally:
      self.close()


# ------------------------------------------------------------------- files

TABLES = ("source", "failed")  # keys of every JSON file


def twice(names: Sequence[str]) -> list[str]:
  """Names that are listed more than once."""
  return [name for name, n in collections.Counter(names).items() if n > 1]


def different(old: Any, new: Any) -> str:
  """In words, where two tables or lists differ; '' = nowhere."""
  if old == new:
    return ""
  if isinstance(old, Mapping):
    keys = sorted(k for k in {*old, *new} if old.get(k) != new.get(k))
    return "; ".join(f"{k}: {old.get(k)!r} there, {new.get(k)!r}" for k in keys)
  pairs = enumerate(zip(old, new, strict=False))
  odd = next((f"{k}: {a!r} there, {b!r}" for k, (a, b) in pairs if a != b), "")
  return f"{len(old)} there, {len(new)} now; {odd}".rstrip("; ")


def mapped(
  path: pathlib.Path, shape: tuple[int, ...], dtypes: Sequence[Any], mode: str
) -> np.ndarray:
  """The array on disk, not read yet.

  Args:
    path: of the `.npy` file.
    shape: that it has to have, or more rows; 0 after the first = any.
    dtypes: of which it has to be one.
    mode: 'r' or 'r+'.

  Raises:
    InputError: it is no such array: says what it is.
  """
  try:
    values = np.load(path, mmap_mode=mode)
  except (OSError, ValueError, EOFError) as error:
    raise InputError(f"{path}: {error}") from error
  # Rows beyond those named are what an interrupted `RowsWriter` had added.
  fits = values.ndim == len(shape) and values.shape[0] >= shape[0]
  pairs = zip(values.shape[1:], shape[1:], strict=False)
  if (
    not fits
    or not all(there == asked or not asked for there, asked in pairs)
    or values.dtype not in dtypes
  ):
    kinds = " or ".join(str(np.dtype(dtype)) for dtype in dtypes)
    raise InputError(
      f"{path} is {values.dtype} of shape {values.shape}; its JSON file "
      f"names {kinds} of shape {shape}"
    )
  return values[: shape[0]]


def lengthen(
  path: pathlib.Path,
  shape: tuple[int, ...],
  dtype: Any,
  *,
  old: np.ndarray | None,
  fill: float | None = None,
) -> None:
  """Makes a `.npy` file of more rows, or a new one; whole at any time.

  The file grows in its place, so that nothing is copied, where its header
  leaves room, as NumPy's does.

  Args:
    path: of the file.
    shape: that it gets.
    dtype: of the values.
    old: the array that the file holds; None = there is none.
    fill: value of the new rows; None = any.

  Raises:
    OSError: the disk is full.
  """
  header = io.BytesIO()
  said = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype))}
  np.lib.format.write_array_header_1_0(
    header, said | {"fortran_order": False, "shape": shape}
  )
  offset, start = header.tell(), 0 if old is None else len(old)
  here = start and old.flags.c_contiguous and old.offset == offset
  target = path if here else path.with_name(f"{path.stem}.part.npy")
  size = offset + int(np.prod(shape)) * np.dtype(dtype).itemsize
  with target.open("r+b" if here else "w+b") as file:
    _reserve(file.fileno(), size)
    values = np.memmap(file, dtype, "r+", offset, shape)
    if start and not here:
      values[:start] = old
    if fill is not None:
      values[start:] = fill
    values.flush()
    file.seek(0)
    file.write(header.getvalue())
  if not here:
    target.replace(path)


def _reserve(file: int, size: int) -> None:
  """Takes the room on the disk: a mapped file that lacks it ends the process.

  Raises:
    OSError: there is none.
  """
  if hasattr(os, "posix_fallocate"):
    os.posix_fallocate(file, 0, size)
  elif os.fstat(file).st_size < size:
    os.ftruncate(file, size)


def _locked(path: pathlib.Path, words: str) -> int:
  """An open file that no other process holds; freed when the process ends."""
  file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
  try:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except OSError as error:
    if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
      os.close(file)
      raise InputError(
        f"another process writes {path.stem} {words} to {path.parent}: wait "
        "for it, or name another folder"
      ) from None
    # Some network file systems have no locks: as if there were one.
  return file


def _write(path: pathlib.Path, said: Mapping[str, Any]) -> None:
  write_text(path, json.dumps(said, indent=1))


def _read(
  path: pathlib.Path, lists: Sequence[str], made_by: str
) -> dict[str, Any]:
  try:
    said = json.loads(path.read_text(encoding="utf-8"))
  except (OSError, ValueError) as error:
    raise InputError(f"{path}: {error}. {made_by}") from error
  said = {
    **{key: {} for key in TABLES},
    **(said if isinstance(said, dict) else {}),
  }
  for key in lists:
    names = said.get(key)
    if not isinstance(names, list) or not all(
      isinstance(name, str) for name in names
    ):
      raise InputError(f"{path}: {key!r} is not a list of texts")
    repeated = twice(names)
    if repeated:
      raise InputError(f"{path}: {key!r} names {repeated[0]!r} twice")
  for key in TABLES:
    if not isinstance(said[key], dict):
      raise InputError(f"{path}: {key!r} is not a table")
  return said
