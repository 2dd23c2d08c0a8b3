"""Reads annotation tables as they are found: BOM, CRLF, Latin-1, spaces."""

import csv
import dataclasses
import difflib
import functools
import io
import json
import math
import os
import pathlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import avjax
from avjax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Line:
  """One row of a table; `line["column"]` is the text without outer spaces.

  Attributes:
    path: the table.
    number: of the line on which the row begins, from 1.
    fields: text by column.
  """

  path: str
  number: int
  fields: dict[str, str]

  def __getitem__(self, column: str) -> str:
    return self.fields[column]

  def error(self, expected: str, found: object) -> InputError:
    """The error that names file, line, what was expected and what is there."""
    return _error(self.path, self.number, expected, found)

  def text(self, column: str) -> str:
    """The text of a column that must not be empty."""
    if not self[column]:
      raise self.error(f"a text as {column}", "")
    return self[column]

  def real(self, column: str, minimum: float = 0.0) -> float:
    """The number in a column; it must be finite and at least `minimum`."""
    try:
      value = float(self[column])
    except ValueError:
      value = math.nan
    if not minimum <= value < math.inf:
      words = f"a number >= {minimum:g} as {column}"
      raise self.error(words, self[column])
    return value

  def integer(self, column: str, minimum: int = 0) -> int:
    """The whole number in a column ('7' and '7.0'), at least `minimum`."""
    value = self.real(column, minimum)
    if value != int(value):
      raise self.error(f"a whole number as {column}", self[column])
    return int(value)

  def known(self, column: str, names: Collection[str]) -> str:
    """The text of a column that must be one of `names`."""
    text = self[column]
    if text not in names:
      near = difflib.get_close_matches(text, list(names), n=1)
      words = f"{len(names)} names" if len(names) > 8 else ", ".join(names)
      hint = f", such as {near[0]!r}," if near else ""
      raise self.error(f"one of {words}{hint} as {column}", text)
    return text


def sources(
  place: str | os.PathLike, names: Mapping[str, Sequence[str]]
) -> dict[str, pathlib.Path]:
  """The annotation files that are there.

  Args:
    place: a folder, or one file of it that alone is wanted.
    names: what a file holds -> names that it may have, the best first.

  Raises:
    InputError: none is there.
  """
  path = pathlib.Path(place)
  folder, only = (path, None) if path.is_dir() else (path.parent, path.name)
  found = {}
  for key, some in names.items():
    there = [folder / n for n in some if (folder / n).is_file()]
    if only is not None:
      there = [file for file in there if file.name == only]
    if there:
      found[key] = there[0]
  if not found:
    every = ", ".join(name for some in names.values() for name in some)
    raise InputError(f"{place}: expected a file or folder of {every}")
  return found


@functools.cache
def class_list(name: str) -> dict[str, Any]:
  """A published list of classes: `names`, `source` and other orders or ids."""
  folder = pathlib.Path(avjax.__file__).parent / "data" / "classes"
  return json.loads(read_text(folder / f"{name}.json"))


def read_text(path: str | os.PathLike) -> str:
  """The text of a file: UTF-8 with or without BOM, UTF-16 or else Latin-1.

  Line ends stay as they are.

  Raises:
    InputError: it cannot be read.
  """
  try:
    data = pathlib.Path(path).read_bytes()
  except OSError as error:
    raise InputError(f"{path} cannot be read: {error.strerror}") from error
  if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
    return data.decode("utf-16", errors="replace")
  try:
    return data.decode("utf-8-sig")
  except UnicodeDecodeError:
    return data.decode("latin-1")


def parse_json(text: str, path: str | os.PathLike, first: int = 1) -> Any:
  """Its content; `text` begins in line `first` of the file.

  Raises:
    InputError: it is not JSON; names file, line and column.
  """
  try:
    return json.loads(text)
  except json.JSONDecodeError as error:
    found = f"{error.msg} at column {error.colno}"
    raise _error(path, first + error.lineno - 1, "JSON", found) from error


def read_csv(
  path: str | os.PathLike,
  columns: Sequence[str],
  *,
  header: bool | None = True,
  delimiter: str = ",",
  quotes: bool = True,
  comments: bool = False,
) -> Iterator[Line]:
  """Rows of a table, in its order; empty lines are passed over.

  Args:
    path: the table.
    columns: with a header, those that it must have (it may have more, in any
      order); without one, the names of all columns from the left.
    header: whether the first row names the columns; None = it does if its
      first field is `columns[0]`, and the columns are those given either way.
    delimiter: between fields; spaces around it are dropped.
    quotes: whether "…" keeps delimiters together.
    comments: whether lines that begin with '#' are passed over.

  Raises:
    InputError: the file cannot be read; a column is missing, or there twice;
      a quotation ends nowhere; or a row has another number of fields than the
      table has columns.
  """
  rows = _rows(path, delimiter, quotes, comments)
  names = list(columns)
  if header:
    number, names = next(rows, (1, []))
    missing = [name for name in columns if name not in names]
    if missing:
      expected = f"a header with the columns {', '.join(missing)}"
      raise _error(path, number, expected, delimiter.join(names))
    twice = [n for n in names if n and names.count(n) > 1]
    if twice:
      expected = f"one column {twice[0]}"
      raise _error(path, number, expected, delimiter.join(names))
  for count, (number, fields) in enumerate(rows):
    first = fields[0].casefold()
    if header is None and not count and first == columns[0].casefold():
      continue
    if len(fields) != len(names):
      expected = f"{len(names)} fields ({', '.join(names)})"
      found = f"{len(fields)}: {delimiter.join(fields)}"
      raise _error(path, number, expected, found)
    yield Line(str(path), number, dict(zip(names, fields, strict=True)))


def _rows(path, delimiter, quotes, comments) -> Iterator[tuple[int, list[str]]]:
  """(line number, fields) of the rows that are not empty."""
  lines = list(io.StringIO(read_text(path), newline=""))
  reader = csv.reader(
    lines,
    delimiter=delimiter,
    quoting=csv.QUOTE_MINIMAL if quotes else csv.QUOTE_NONE,
    skipinitialspace=True,
  )
  while True:
    number = reader.line_num + 1
    try:
      fields = [field.strip() for field in next(reader)]
    except StopIteration:
      return
    except csv.Error as error:
      raise InputError(f"{path} line {number}: {error}") from error
    if quotes and number < reader.line_num == len(lines):
      text = "".join(lines[number - 1 :])
      if text.count('"') % 2:
        raise _error(path, number, "a second quotation mark", text)
    if not any(fields) or (comments and fields[0].startswith("#")):
      continue
    yield number, fields


def _error(path, number: int, expected: str, found: object) -> InputError:
  text = str(found)
  short = text if len(text) <= 200 else text[:200] + "…"
  return InputError(
    f"{path} line {number}: expected {expected}, found {short!r}"
  )
