"""Object scores of clips on disk: how sure a model is of each label.

A folder holds one pair of files a modality, `audio` and `video`:

- `audio.npy`: float16 [clips, labels]; a row of NaN has no scores;
- `audio.json`: `labels` (names by column), `clips` (ids by row), `source` (what
  made the scores, by key) and `failed` (id -> reason); the last two are
  optional.

A label and a clip are named once. `python -m data_prep.object_labels` writes
the files, and so may any other program: `numpy.save` and a JSON file.
Thresholds and how the two are merged are choices of the training (DETECLAP,
arXiv:2409.11729, §III).
"""

import collections
import errno
import fcntl
import functools
import json
import os
import pathlib
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging
from jaxtyping import Bool, Float, Float16, Int

from avjax.errors import InputError

MODALITIES = ("audio", "video")
MAX_MISSING = 0.5  # share of a split's clips
KEYS = ("labels", "clips", "source", "failed")
BLOCK = 1 << 16  # rows looked at together: the array may exceed the memory


class Scores:
  """Stored scores of one modality, read as they are asked for.

  Attributes:
    labels: names by column.
    clips: ids by row.
    source: what made the scores, in words by key.
    failed: id -> why a clip has none.

  Raises:
    InputError: the files are missing or do not fit each other.
  """

  def __init__(self, folder: str | os.PathLike, modality: str):
    self.path = pathlib.Path(folder).expanduser() / f"{modality}.npy"
    said = _read(self.path.with_suffix(".json"))
    self.labels: list[str] = said["labels"]
    self.clips: list[str] = said["clips"]
    self.source: dict[str, Any] = said["source"]
    self.failed: dict[str, str] = said["failed"]
    self.values  # noqa: B018 - checks the array

  @functools.cached_property
  def values(self) -> np.ndarray:
    """float16 [clips, labels] on disk."""
    return self._opened("r")

  def _opened(self, mode: str) -> np.ndarray:
    return _mapped(self.path, (len(self.clips), len(self.labels)), mode)

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

  def scored(self) -> Bool[np.ndarray, "clips"]:
    """Clips that have scores."""
    return scored_rows(self.values)


class Column:
  """The scores of the clips of a split, by the clip's number.

  Clips that are scored later than this is made count as without scores. Goes
  to other processes without the names of the clips.

  Args:
    scores: of one modality.
    ids: of the split's clips in order.

  Raises:
    InputError: more than half of the clips have no scores.
  """

  def __init__(self, scores: Scores, ids: Sequence[str]):
    self._path, self._shape = scores.path, scores.values.shape
    self._blank = np.full(len(scores.labels), np.nan, np.float16)
    rows = scores.rows(ids)
    scored = np.append(scores.scored(), False)[rows]
    self._rows = np.where(scored, rows, -1)
    missing = np.flatnonzero(~scored)
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

  @functools.cached_property
  def _values(self) -> np.ndarray:
    return _mapped(self._path, self._shape, "r")

  def __getstate__(self) -> dict[str, Any]:
    return {k: v for k, v in self.__dict__.items() if k != "_values"}

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
    _compare(path, "labels", *(scores.labels for scores in found.values()))
  return found


def columns(folder: str | os.PathLike, ids: Sequence[str]) -> dict[str, Column]:
  """By batch key, the scores of the clips of a split; see `Column`."""
  return {f"objects/{m}": Column(s, ids) for m, s in read(folder).items()}


class Writer(Scores):
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

  def __init__(
    self,
    folder: str | os.PathLike,
    modality: str,
    *,
    labels: Sequence[str],
    source: Mapping[str, Any],
    clips: Sequence[str],
  ):
    folder = pathlib.Path(folder).expanduser()
    check_labels(labels)
    try:
      folder.mkdir(parents=True, exist_ok=True)
      lock = _locked(folder / f"{modality}.lock")
    except OSError as error:
      raise InputError(f"{folder}: {error}") from error
    self._unlock = weakref.finalize(self, os.close, lock)
    try:
      self._extend(folder / f"{modality}.npy", labels, source, clips)
      super().__init__(folder, modality)
    except BaseException:
      self.close()
      raise
    self._wanted, self._noted = set(clips), dict(self.failed)

  def _extend(self, path, labels, source, clips) -> None:
    """Brings the files to the clips asked for: the array first."""
    old = None
    said = {"labels": list(labels), "source": dict(source), "failed": {}}
    if path.with_suffix(".json").exists():
      old = Scores(path.parent, path.stem)
      _compare(path, "labels", old.labels, said["labels"])
      # A library's later version may add to what an earlier one made.
      new = json.loads(json.dumps(source))
      pair = ({**s, "library": None} for s in (old.source, new))
      _compare(path, "source", *pair)
      said["failed"] = old.failed
    before = old.clips if old else []
    known = set(before)
    added = [name for name in dict.fromkeys(clips) if name not in known]
    if added or old is None:
      shape = (len(before) + len(added), len(labels))
      _grow(path, shape, old.values if old else None)
      _write(path.with_suffix(".json"), said | {"clips": before + added})

  @functools.cached_property
  def values(self) -> np.ndarray:
    """float16 [clips, labels] on disk, to be written."""
    return self._opened("r+")

  def missing(self) -> list[str]:
    """Ids that are asked for and have neither scores nor a reason."""
    return [
      name
      for name, done in zip(self.clips, self.scored(), strict=True)
      if not done and name in self._wanted and name not in self.failed
    ]

  def write(
    self, ids: Sequence[str], scores: Float[np.ndarray, "n labels"]
  ) -> None:
    """Stores the scores of some clips, rounded to float16.

    Raises:
      ValueError: a score is not finite, or an id is not among the clips.
    """
    rows = self._rows_of(ids)
    with np.errstate(over="ignore"):  # infinite: refused
      rounded = scores.astype(np.float16)
    if not np.isfinite(rounded).all():
      raise ValueError(f"scores of {list(ids)} are not all finite")
    self.values[rows] = rounded
    for name in ids:
      self.failed.pop(name, None)

  def _rows_of(self, ids: Sequence[str]) -> list[int]:
    strange = [name for name in ids if name not in self._place]
    if strange:
      raise ValueError(f"{self.path} has no row for clip {strange[0]!r}")
    return [self._place[name] for name in ids]

  def fail(self, name: str, reason: str) -> None:
    """Notes why a clip has no scores; `retry` forgets it."""
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
      said = {key: getattr(self, key) for key in KEYS}
      _write(self.path.with_suffix(".json"), said)
      self._noted = dict(self.failed)

  def close(self) -> None:
    """Lets another process write; does not save."""
    self._unlock()

  def __enter__(self) -> "Writer":
    return self

  def __exit__(self, *_: Any) -> None:
    """Saves and closes."""
    try:
      self.save()
    finally:
      self.close()


def check_labels(labels: Sequence[str]) -> None:
  """Refuses a list of labels that is empty or names one twice.

  Raises:
    InputError: says which.
  """
  if not labels:
    raise InputError("the list of labels is empty")
  twice = _twice(labels)
  if twice:
    raise InputError(f"label {twice[0]!r} is listed twice")


def _twice(names: Sequence[str]) -> list[str]:
  return [name for name, n in collections.Counter(names).items() if n > 1]


def _locked(path: pathlib.Path) -> int:
  """An open file that no other process holds; freed when the process ends."""
  file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
  try:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except OSError as error:
    if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
      os.close(file)
      raise InputError(
        f"another process writes {path.stem} scores to {path.parent}: wait for "
        "it, or name another folder"
      ) from None
    # Some network file systems have no locks: as if there were one.
  return file


def scored_rows(values: np.ndarray) -> np.ndarray:
  """bool [clips]: rows without NaN."""
  found = np.ones(len(values), np.bool_)
  for k in range(0, len(values), BLOCK):
    found[k : k + BLOCK] = np.isfinite(values[k : k + BLOCK]).all(axis=1)
  return found


def _open(path: pathlib.Path, mode: str = "r") -> np.ndarray:
  try:
    return np.load(path, mmap_mode=mode)
  except (OSError, ValueError, EOFError) as error:
    raise InputError(f"{path}: {error}") from error


def _mapped(
  path: pathlib.Path, shape: tuple[int, int], mode: str
) -> np.ndarray:
  """The array on disk, which has to be of this shape or longer."""
  values = _open(path, mode)
  # Rows beyond those named are what an interrupted `Writer` had added.
  rows, columns = values.shape if values.ndim == 2 else (0, 0)
  fits = rows >= shape[0] and columns == shape[1]
  if not fits or values.dtype != np.float16:
    raise InputError(
      f"{path} is {values.dtype} of shape {values.shape}; its JSON file "
      f"names float16 of shape {shape}"
    )
  return values[: shape[0]]


def _grow(
  path: pathlib.Path, shape: tuple[int, int], old: np.ndarray | None
) -> None:
  """Replaces the array by a longer one, whole at any time."""
  part = path.with_name(f"{path.stem}.part.npy")
  values = np.lib.format.open_memmap(part, "w+", np.float16, shape)
  start = 0 if old is None else len(old)
  if start:
    values[:start] = old
  values[start:] = np.nan
  values.flush()
  part.replace(path)


def _write(path: pathlib.Path, said: Mapping[str, Any]) -> None:
  part = path.with_suffix(".part")
  part.write_text(json.dumps(said, indent=1), encoding="utf-8")
  part.replace(path)


def _read(path: pathlib.Path) -> dict[str, Any]:
  try:
    said = json.loads(path.read_text(encoding="utf-8"))
  except (OSError, ValueError) as error:
    raise InputError(
      f"{path}: {error}. Object scores are made by `python -m "
      "data_prep.object_labels`"
    ) from error
  said = {
    "source": {},
    "failed": {},
    **(said if isinstance(said, dict) else {}),
  }
  for key in KEYS[:2]:
    names = said.get(key)
    if not isinstance(names, list) or not all(
      isinstance(name, str) for name in names
    ):
      raise InputError(f"{path}: {key!r} is not a list of texts")
    twice = _twice(names)
    if twice:
      raise InputError(f"{path}: {key!r} names {twice[0]!r} twice")
  for key in KEYS[2:]:
    if not isinstance(said[key], dict):
      raise InputError(f"{path}: {key!r} is not a table")
  return said


def _compare(path: pathlib.Path, what: str, old: Any, new: Any) -> None:
  if old == new:
    return
  if isinstance(old, Mapping):
    keys = sorted(k for k in {*old, *new} if old.get(k) != new.get(k))
    detail = "; ".join(
      f"{k}: {old.get(k)!r} there, {new.get(k)!r}" for k in keys
    )
  else:
    pairs = enumerate(zip(old, new, strict=False))
    odd = next(
      (f"{k}: {a!r} there, {b!r}" for k, (a, b) in pairs if a != b), ""
    )
    detail = f"{len(old)} there, {len(new)} now; {odd}".rstrip("; ")
  raise InputError(
    f"{path} holds scores of other {what} ({detail} now): name another folder, "
    "or delete it and its JSON file"
  )
