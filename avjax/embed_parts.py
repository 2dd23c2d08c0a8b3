"""The files of `avjax.embed`: parts of unfinished work, and the result."""

import json
import pathlib
import shutil
import time
import zipfile
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from absl import logging

from avjax import config as config_lib
from avjax import trees
from avjax.checkpoint import RunLock
from avjax.errors import InputError
from avjax.workdir import replacing, write_text

# A part is written once it holds so many clips or is so old.
CLIPS = 512
SECONDS = 30.0

Rows = Mapping[str, np.ndarray]


class Parts:
  """What a run has embedded so far, in <output>.parts.

  Every part is complete or absent: it gets its name when it is whole.

  Args:
    output: the file that will be written.
    job: JSON values that all parts of it share.
  """

  def __init__(self, output: pathlib.Path, job: Mapping[str, Any]):
    self.folder = output.with_name(output.name + ".parts")
    self._job, self._lock = job, RunLock(self.folder / "lock")
    self._buffer: list[tuple[list[str], list[str], Rows]] = []
    self._since = time.monotonic()

  def __enter__(self) -> "Parts":
    """Takes hold of the folder.

    Raises:
      InputError: another process works there, or another job has begun.
    """
    try:
      self._lock.__enter__()
    except InputError as error:
      raise InputError(
        f"another run writes to {self.folder}; wait for it, or choose another "
        "--output"
      ) from error
    try:
      self._begin()
    except BaseException:
      self._lock.__exit__()
      raise
    return self

  def __exit__(self, *_: Any) -> None:
    try:
      if self.folder.exists():
        self.flush()
    finally:
      self._lock.__exit__()

  def _begin(self) -> None:
    path = self.folder / "job.json"
    known = json.loads(path.read_text()) if path.exists() else self._job
    changes = config_lib.differences(known, self._job)
    if changes:
      raise InputError(
        f"{self.folder} holds unfinished work of another kind "
        f"({'; '.join(changes)}); remove it, or choose another --output"
      )
    for stray in self.folder.glob("*.tmp"):
      stray.unlink()
    write_text(path, json.dumps(self._job, indent=2) + "\n")

  def _paths(self) -> list[pathlib.Path]:
    return sorted(self.folder.glob("part_*.npz"))

  def done(self, signatures: Mapping[str, str]) -> set[str]:
    """Ids that are embedded and have not changed; removes damaged parts."""
    found = set()
    for path in self._paths():
      try:
        part = _read(path)  # verifies checksums
        pairs = zip(
          part["id"].tolist(), part["signature"].tolist(), strict=True
        )
        found |= {i for i, known in pairs if signatures.get(i) == known}
      except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        logging.warning("%s is damaged; its clips are embedded again", path)
        path.unlink()
    return found

  def add(self, ids: list[str], signatures: list[str], rows: Rows) -> None:
    """Takes embedded clips; writes a part now and then."""
    self._buffer.append((ids, signatures, rows))
    many = sum(len(part) for part, _, _ in self._buffer) >= CLIPS
    if many or time.monotonic() - self._since > SECONDS:
      self.flush()

  def flush(self) -> None:
    """Writes what is not yet written."""
    self._since = time.monotonic()
    if not self._buffer:
      return
    names = self._buffer[0][2]
    arrays = {
      f"value/{name}": np.concatenate(
        [rows[name] for _, _, rows in self._buffer]
      )
      for name in names
    }
    arrays["id"] = np.array([i for ids, _, _ in self._buffer for i in ids])
    arrays["signature"] = np.array(
      [s for _, all_, _ in self._buffer for s in all_]
    )
    last = max((int(p.stem.split("_")[1]) for p in self._paths()), default=-1)
    path = self.folder / f"part_{last + 1:06d}.npz"
    with replacing(path) as temporary, temporary.open("wb") as file:
      np.savez(file, **arrays)
    self._buffer = []

  def collect(self, signatures: Mapping[str, str]) -> dict[str, np.ndarray]:
    """All rows whose clips are there and have not changed, sorted by id."""
    parts: list[Rows] = []
    for path in self._paths():
      part = _read(path)
      known = [signatures.get(str(i)) for i in part["id"]]
      kept = np.array(known, object) == part.pop("signature").astype(object)
      parts.append({name: rows[kept] for name, rows in part.items()})
    joined = {
      name.removeprefix("value/"): np.concatenate(
        [part[name] for part in parts]
      )
      for name in (parts[0] if parts else {})
    }
    if joined:
      _, order = np.unique(joined["id"], return_index=True)
      joined = {name: rows[order] for name, rows in joined.items()}
    return joined

  def remove(self) -> None:
    """Removes the folder: the output holds all of it."""
    shutil.rmtree(self.folder)


def _read(path: pathlib.Path) -> dict[str, np.ndarray]:
  with path.open("rb") as file, np.load(file) as arrays:
    return {name: arrays[name] for name in arrays.files}


def fingerprint(params: Any) -> str:
  """A checksum of all parameters and their names."""
  total = 0
  for name, leaf in trees.flatten(params).items():
    total = zlib.crc32(name.encode(), total)
    total = zlib.crc32(np.ascontiguousarray(leaf), total)
  return f"{total:08x}"


# ------------------------------------------------------------------ outputs


def check(output: pathlib.Path) -> None:
  """Refuses what could not be written, before hours of work.

  Raises:
    InputError: there is no such folder, or Parquet is not installed.
  """
  if not output.parent.is_dir():
    raise InputError(f"--output={output}: {output.parent} is not a folder")
  if output.is_dir():
    raise InputError(f"--output={output} is a folder")
  if output.suffix == ".parquet":
    _arrow()


def write_npz(
  output: pathlib.Path, values: Rows, classes: Mapping[str, Any]
) -> None:
  """Writes all arrays under their names."""
  names = {f"classes/{head}": np.array(list(c)) for head, c in classes.items()}
  with replacing(output) as temporary, temporary.open("wb") as file:
    np.savez(file, **values, **names)


def write_parquet(
  output: pathlib.Path, values: Rows, classes: Mapping[str, Any]
) -> None:
  """Writes a column for each array; rows of numbers are fixed-size lists."""
  arrow, parquet = _arrow()
  columns = {"id": arrow.array(values["id"].tolist(), arrow.string())}
  for name, rows in values.items():
    if name != "id":
      flat = arrow.array(np.ascontiguousarray(rows).reshape(-1))
      size = int(np.prod(rows.shape[1:]))
      columns[name] = (
        arrow.FixedSizeListArray.from_arrays(flat, size)
        if rows.ndim > 1
        else flat
      )
  kept = {
    "shapes": {k: list(v.shape[1:]) for k, v in values.items()},
    "classes": {head: list(names) for head, names in classes.items()},
  }
  metadata = {key: json.dumps(value) for key, value in kept.items()}
  table = arrow.table(columns).replace_schema_metadata(metadata)
  with replacing(output) as temporary:
    parquet.write_table(table, temporary)


def _arrow() -> tuple[Any, Any]:
  try:
    import pyarrow
    import pyarrow.parquet
  except ImportError as error:
    raise InputError(
      "Parquet files need pyarrow: pip install 'avjax[parquet]', or give the "
      "output a name ending in .npz"
    ) from error
  return pyarrow, pyarrow.parquet


def write_report(output: pathlib.Path, report: Mapping[str, Any]) -> None:
  """Writes <output>.report.json."""
  path = output.with_name(output.name + ".report.json")
  write_text(path, json.dumps(report, indent=2) + "\n")


WRITERS = {".npz": write_npz, ".parquet": write_parquet}
