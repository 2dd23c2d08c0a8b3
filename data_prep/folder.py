"""`folder`: any directory of media, with or without a table of labels."""

import functools
import pathlib
import posixpath
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import tensorflow_datasets as tfds

from avjax.data import media_folder
from avjax.data.datasets import DATASETS
from avjax.errors import InputError, lookup, unknown
from data_prep import builder, media_files, tables, youtube

TABLE = "annotations.csv"
COLUMNS = ("path", "start", "end", "labels", "caption", "split")
SPLITS = DATASETS["folder"].splits


class Folder(builder.ClipBuilder):
  """The media files of a folder."""

  name = "folder"
  VERSION = tfds.core.Version("1.0.0")

  def classes(self) -> dict[str, Sequence[str]]:
    """The names in the column `labels`, sorted; no head if there are none."""
    return {"label": self._names} if self._names else {}

  def rows(self) -> dict[str, Iterable[builder.Row]]:
    """The clips of the table, or all media files, sorted, as `train`.

    The table is the annotations file or, without one, `annotations.csv` in the
    folder, if it is there. It has a header; columns but `path` may be missing:
    - path: relative to the folder; without extension, or without its folders,
      if only one file fits best (see `data_prep.media_files.find`);
    - start, end: seconds; empty = of the file;
    - labels: names separated by '|' or ';', the main one first;
    - caption: several rows of a clip give it several;
    - split: train (also if empty) or test.

    Without a table an id is the path. With one it is the path that the table
    has, without extension unless its paths differ in it alone; where a row has
    a start or end, `@<start>-<end>` follows. So an id does not depend on which
    files there are.

    Raises:
      InputError: a column or split is unknown, or a row is malformed.
    """
    return self._rows

  @functools.cached_property
  def _names(self) -> list[str]:
    rows = [row for rows in self._rows.values() for row in rows]
    return sorted({label for row in rows for label in row.labels})

  @functools.cached_property
  def _rows(self) -> dict[str, list[builder.Row]]:
    files = media_files.index(self.options.media)
    table = self._table()
    if table is None:
      paths = sorted(path for paths in files.values() for path in paths)
      return {
        "train": [
          builder.Row(media_folder.readable(path), path) for path in paths
        ]
      }
    return _clips(table, self.options.media, files)

  def _table(self) -> pathlib.Path | None:
    place = self.options.annotations
    if place is not None and pathlib.Path(place).is_file():
      return pathlib.Path(place)
    table = pathlib.Path(place or self.options.media) / TABLE
    if place is not None and not table.is_file():
      raise InputError(f"{place} holds no {TABLE}")
    return table if table.is_file() else None


def _ids(paths: Iterable[str]) -> dict[str, str]:
  """Path in the table -> id of the whole file."""
  stem = {path: posixpath.splitext(path)[0] for path in paths}
  counts = Counter(stem.values())
  return {path: s if counts[s] == 1 else path for path, s in stem.items()}


def _clips(
  table: pathlib.Path,
  media: pathlib.Path,
  files: Mapping[str, Sequence[str]],
) -> dict[str, list[builder.Row]]:
  """Rows of one clip are one, in the place of the first."""
  clips: dict[tuple, tuple[dict[str, None], list[str]]] = {}
  names: dict[str, str] = {}  # file -> path in the table
  for line in tables.read_csv(table, ("path",)):
    fields = _fields(line)
    path = file = posixpath.normpath(line.text("path"))
    if not (media / file).is_file():
      file = media_files.find(files, (file,))
    names.setdefault(file, path)
    split = fields["split"] or "train"
    lookup(SPLITS, split, f"split in {table} line {line.number}")
    start = line.real("start") if fields["start"] else 0.0
    end = line.real("end") if fields["end"] else None
    if end is not None and end <= start:
      found = f"start {start:g} and end {end:g}"
      raise line.error("an end after the start", found)
    key = (split, file, start, end)
    labels, captions = clips.setdefault(key, ({}, []))
    given = fields["labels"].replace(";", "|").split("|")
    labels.update(dict.fromkeys(n.strip() for n in given if n.strip()))
    if fields["caption"]:
      captions.append(fields["caption"])
  ids = _ids(names.values())
  splits: dict[str, list[builder.Row]] = {}
  for (split, file, start, end), (labels, captions) in clips.items():
    row_id = media_folder.readable(ids[names[file]]) + _cut(start, end)
    splits.setdefault(split, []).append(
      builder.Row(row_id, file, start, end, tuple(labels), captions=captions)
    )
  return splits


def _fields(line: tables.Line) -> dict[str, str]:
  """All columns, '' for those that the table has not."""
  for name in line.fields:
    if name not in COLUMNS:
      raise unknown(f"column of {line.path}", name, COLUMNS)
  return {name: line.fields.get(name, "") for name in COLUMNS}


def _cut(start: float, end: float | None) -> str:
  if not start and end is None:
    return ""
  stop = "" if end is None else youtube.seconds_text(end)
  return f"@{youtube.seconds_text(start)}-{stop}"
