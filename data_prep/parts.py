"""A data set in parts, so that a build may stop and go on, or grow later.

A part holds the records of some consecutive rows: an array_record file, and a
JSON file with what became of every row, written last. The name tells the rows
and the options, so a part that is there need not be made again. Where the
files lie is not in the name, it is compared: a file that has come since is no
reason to decode the others again. The parts become the shards of the data set
as they are.

Two processes may make the same part: each writes files of its own, and the
first to end names them.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from array_record.python import array_record_module

from avjax.errors import InputError
from data_prep import stored

# Every annotation row ends as exactly one of these.
OUTCOMES = (
  "built",
  "missing file",
  "no audio",
  "no video",
  "corrupt",
  "too short",
  "duplicate",
)
# What else is said of clips that are built.
REMARKS = {
  "silent": "built without sound",
  "blind": "built without pictures",
  "damaged": "built though damaged",
}
LISTED = 5  # ids of an outcome that are printed; report.json has all
ROWS = 256  # of a part: about 500 MB of ten-second clips


@dataclasses.dataclass
class Tally:
  """What became of the rows of a split.

  Attributes:
    lists: outcome or remark -> ids, or [id, reason].
    index: (id, labels, seconds, has_audio, has_video, digest) of the built
      clips; digest is `stored.digest` of the row.
    work: seconds of one core that the rows took.
  """

  lists: dict[str, list[Any]] = dataclasses.field(
    default_factory=lambda: {name: [] for name in (*OUTCOMES, *REMARKS)}
  )
  index: list[Sequence[Any]] = dataclasses.field(default_factory=list)
  work: float = 0.0

  def add(self, other: "Tally") -> None:
    """Appends another tally's rows."""
    for name, entries in other.lists.items():
      self.lists[name] += entries
    self.index += other.index
    self.work += other.work

  def settled(self) -> set[str]:
    """Ids of all rows, whatever became of them."""
    return {identity(e) for name in OUTCOMES for e in self.lists[name]}

  def counts(self) -> dict[str, int]:
    """Rows by outcome."""
    return {name: len(self.lists[name]) for name in OUTCOMES}

  def forget_missing(self, ids: Iterable[str]) -> None:
    """These rows are tried again."""
    ids = set(ids)
    missing = self.lists["missing file"]
    self.lists["missing file"] = [e for e in missing if identity(e) not in ids]

  def write_index(self, path: pathlib.Path) -> None:
    """What is asked of all clips without reading them."""
    columns = zip(*self.index, strict=True)
    ids, labels, seconds, sound, pictures, digests = columns
    np.savez_compressed(
      path,
      id=np.array(ids),
      label=np.array([k for row in labels for k in row], np.int32),
      label_ends=np.cumsum([len(row) for row in labels], dtype=np.int64),
      seconds=np.array(seconds, np.float32),
      has_audio=np.array(sound),
      has_video=np.array(pictures),
      digest=np.array(digests, np.uint32),
    )

  def read_index(self, path: pathlib.Path) -> None:
    """The inverse of `write_index`."""
    with np.load(path) as stored:
      labels = np.split(stored["label"], stored["label_ends"][:-1])
      count = len(stored["id"])
      self.index = list(
        zip(
          stored["id"].tolist(),
          [row.tolist() for row in labels],
          stored["seconds"].tolist(),
          stored["has_audio"].tolist(),
          stored["has_video"].tolist(),
          # An earlier version had none.
          stored["digest"].tolist() if "digest" in stored else [None] * count,
          strict=True,
        )
      )
    self.lists["built"] = [entry[0] for entry in self.index]


def identity(entry: Any) -> str:
  """The id of an entry of `Tally.lists`."""
  return entry if isinstance(entry, str) else entry[0]


@dataclasses.dataclass(frozen=True)
class Part:
  """Consecutive rows of a split and where their records go.

  Attributes:
    second: the rows were in another part, which did not find their files.
  """

  split: str
  rows: Sequence[Any]
  path: pathlib.Path
  second: bool = False

  @property
  def note(self) -> pathlib.Path:
    """The JSON file; it is there when the part is complete."""
    return self.path.with_suffix(".json")

  @property
  def records(self) -> pathlib.Path:
    """The array_record file of a finished part."""
    return self.path.with_name(self._body()["records"])

  @property
  def finished(self) -> bool:
    """The part need not be made again: it is of these rows in these files."""
    if not self.note.exists():
      return False
    body = self._body()
    missing = set(map(identity, body["tally"]["lists"]["missing file"]))
    return all(
      row.id in missing or place == _place(row)
      for row, place in zip(self.rows, body["places"], strict=True)
    )

  def write(
    self, results: Iterable[tuple[bytes | None, Tally]], cores: int = 1
  ) -> None:
    """Writes the records, then the note.

    Args:
      results: of each row the record, or None, and a tally of that row alone.
      cores: that are at work meanwhile.
    """
    tally, began = Tally(), time.perf_counter()
    own = f"{self.path.stem}-{uuid.uuid4().hex}"
    records = self.path.with_name(f"{own}.array_record")
    try:
      # Records are not compressed, JPEG and sound do not shrink: they are read
      # in half the time and written in a seventh of it.
      writer = array_record_module.ArrayRecordWriter(
        os.fspath(records), "group_size:1,uncompressed"
      )
      try:
        for record, row in results:
          tally.add(row)
          if record is not None:
            with _telling(records):
              writer.write(record)
      finally:
        with _telling(records):
          writer.close()
    except BaseException:
      records.unlink(missing_ok=True)
      raise
    tally.work = cores * (time.perf_counter() - began)
    body = {
      "tally": dataclasses.asdict(tally),
      "records": records.name,
      "places": [_place(row) for row in self.rows],
    }
    note = self.path.with_name(f"{own}.tmp")
    note.write_text(json.dumps(body))
    self._publish(note, records)

  def _publish(self, note: pathlib.Path, records: pathlib.Path) -> None:
    """Gives the note its name, unless another process was faster."""
    try:
      os.link(note, self.note)
    except FileExistsError:
      if self.finished:
        records.unlink()
      else:  # of files that lie elsewhere now
        note.replace(self.note)
    except OSError:  # a file system without links
      note.replace(self.note)
    note.unlink(missing_ok=True)

  def tally(self) -> Tally:
    """What became of the rows of a finished part."""
    return Tally(**self._body()["tally"])

  def _body(self) -> dict[str, Any]:
    return json.loads(self.note.read_text())

  def write_rows(self) -> pathlib.Path:
    """Writes the rows to a file; `read_rows` makes the part of it again."""
    path = self.path.with_suffix(".rows")
    rows = [dataclasses.asdict(row) for row in self.rows]
    path.write_text(json.dumps({"split": self.split, "rows": rows}))
    return path


@contextlib.contextmanager
def _telling(path: pathlib.Path) -> Iterator[None]:
  """Has the writer's errors say which file, and what room there is."""
  try:
    yield
  except RuntimeError as error:
    free = shutil.disk_usage(path.parent).free
    raise InputError(
      f"{path} cannot be written, {free:,} bytes are free: {error}"
    ) from error


def _place(row: Any) -> list[Any]:
  return [row.file, row.start, row.end]


def read_rows(path: pathlib.Path) -> Part:
  """The part that wrote this file."""
  stored_part = json.loads(path.read_text())
  rows = [stored.row(values) for values in stored_part["rows"]]
  return Part(stored_part["split"], rows, path.with_suffix(".array_record"))


def plan(
  rows: Mapping[str, Sequence[Any]],
  folder: pathlib.Path,
  fingerprint: str,
  *,
  second: bool = False,
) -> list[Part]:
  """Parts in the order of the rows.

  Args:
    rows: by split.
    folder: where the parts lie.
    fingerprint: of all else that a record depends on.
    second: see `Part`.
  """
  parts = []
  for split, whole in rows.items():
    for first in range(0, len(whole), ROWS):
      some = whole[first : first + ROWS]
      whats = [(row.id, stored.digest(row)) for row in some]
      facts = repr((fingerprint, whats, second))
      key = hashlib.sha256(facts.encode()).hexdigest()
      path = folder / f"{split}-{key[:16]}.array_record"
      parts.append(Part(split, some, path, second))
  return parts


def link(source: pathlib.Path, target: pathlib.Path) -> None:
  """The same file under a second name; a copy where that is impossible."""
  try:
    os.link(source, target)
  except OSError:
    shutil.copy2(source, target)


@dataclasses.dataclass
class Former:
  """A built data set that is to grow.

  Attributes:
    shards: split -> files in order, and the number of clips in each.
    tallies: by split.
    options: what it was built with.
  """

  shards: dict[str, list[tuple[pathlib.Path, int]]]
  tallies: dict[str, Tally]
  options: dict[str, Any]


def read(folder: pathlib.Path, splits: Mapping[str, Any]) -> Former:
  """The data set in a folder.

  Args:
    folder: with report.json.
    splits: TFDS's SplitInfos.
  """
  report = json.loads((folder / "report.json").read_text())
  former = Former({}, {}, report["options"])
  for split, entry in report["splits"].items():
    tally = former.tallies[split] = Tally()
    for name in OUTCOMES[1:]:
      tally.lists[name] = entry[name]
    for name, words in REMARKS.items():
      tally.lists[name] = entry[words]
    former.shards[split] = []
    if split in splits:
      tally.read_index(folder / f"index_{split}.npz")
      paths = [pathlib.Path(path) for path in splits[split].filepaths]
      lengths = splits[split].shard_lengths
      former.shards[split] = list(zip(paths, lengths, strict=True))
  return former


def report(tallies: Mapping[str, Tally]) -> dict[str, Any]:
  """What became of every row by split; built ids are in the index."""
  return {
    split: {
      "rows": sum(tally.counts().values()),
      "counts": tally.counts(),
      **{words: tally.lists[name] for name, words in REMARKS.items()},
      **{name: tally.lists[name] for name in OUTCOMES[1:]},
    }
    for split, tally in tallies.items()
  }


def table(tallies: Mapping[str, Tally]) -> str:
  """Counts by split and outcome, and the first few of what is not built."""
  head = ("split", "rows", *OUTCOMES)
  lines = [
    (split, sum(tally.counts().values()), *tally.counts().values())
    for split, tally in tallies.items()
  ]
  widths = [max(len(str(line[k])) for line in (head, *lines))
            for k in range(len(head))]  # fmt: skip
  rows = [
    "  ".join(
      f"{cell!s:>{width}}" for cell, width in zip(line, widths, strict=True)
    )
    for line in (head, *lines)
  ]
  for split, tally in tallies.items():
    for name in OUTCOMES[1:]:
      entries = tally.lists[name]
      if entries:
        some = ", ".join(repr(identity(e)) for e in entries[:LISTED])
        more = ", …" if len(entries) > LISTED else ""
        rows.append(f"{split}, {name}: {some}{more}")
  return "\n".join(rows)


def taken(results: Iterator[Any], count: int) -> Iterator[Any]:
  """The next `count` items."""
  for _ in range(count):
    yield next(results)
