"""The names of what lies in a run's folder."""

import contextlib
import dataclasses
import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any

from avjax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Workdir:
  """Paths of one stage's run; nothing is created by asking for a path."""

  root: pathlib.Path

  @property
  def config(self) -> pathlib.Path:
    """The resolved config as JSON."""
    return self.root / "config.json"

  @property
  def checkpoints(self) -> pathlib.Path:
    """One folder per saved step."""
    return self.root / "checkpoints"

  @property
  def metrics(self) -> pathlib.Path:
    """One JSON object a line: `step` and the metrics by name."""
    return self.root / "metrics.jsonl"

  @property
  def pictures(self) -> pathlib.Path:
    """PNG files."""
    return self.root / "pictures"

  @property
  def tables(self) -> pathlib.Path:
    """Markdown that is part of the report, and CSV files."""
    return self.root / "tables"

  @property
  def report(self) -> pathlib.Path:
    """Scores, counts of skipped clips, command line."""
    return self.root / "report.md"

  @property
  def classes(self) -> pathlib.Path:
    """Class names by head, in the order of the logits."""
    return self.root / "classes.json"

  @property
  def objects(self) -> pathlib.Path:
    """Labels of objects that were learnt, and what scored them."""
    return self.root / "objects.json"

  @property
  def loading_report(self) -> pathlib.Path:
    """What `init_from` loaded, missed, left unused and reshaped."""
    return self.root / "loading.json"

  @property
  def done(self) -> pathlib.Path:
    """Exists once the stage has finished; holds its final scores."""
    return self.root / "done.json"

  @property
  def lock(self) -> pathlib.Path:
    """Held while a process trains here."""
    return self.root / "lock"

  def stage(self, name: str) -> "Workdir":
    """The run of one stage inside a staged run."""
    return Workdir(self.root / name)

  def read_config(self) -> dict[str, Any]:
    """The saved config.

    Raises:
      InputError: the folder is not a run.
    """
    if not self.config.exists():
      raise InputError(f"{self.root} is not a run: {self.config} is missing")
    return json.loads(self.config.read_text())


def workdir(path: str | pathlib.Path) -> Workdir:
  """A run's folder, `~` expanded."""
  return Workdir(pathlib.Path(path).expanduser())


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[pathlib.Path]:
  """A temporary path beside `path`, put in its place if all goes well."""
  temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
  try:
    yield temporary
    os.replace(temporary, path)
  finally:
    temporary.unlink(missing_ok=True)


def write_text(path: pathlib.Path, text: str) -> None:
  """Writes a file whole: what was there before stays until then."""
  with replacing(path) as temporary:
    temporary.write_text(text, encoding="utf-8")


def make_folder(path: pathlib.Path) -> None:
  """Makes a folder and those above it, where they are not there.

  Raises:
    InputError: it cannot be made; says why.
  """
  try:
    path.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise InputError(f"{path} cannot be made: {error.strerror}") from error
