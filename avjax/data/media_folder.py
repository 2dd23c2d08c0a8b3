"""Which files of a folder are media."""

import os
import pathlib
from collections.abc import Iterator

from avjax.errors import InputError

# The first of these is preferred where files differ in the extension alone.
EXTENSIONS = (
  ".mp4", ".mkv", ".webm", ".mov", ".avi", ".m4v", ".mpg", ".mpeg", ".flv",
  ".3gp", ".ts", ".wmv", ".wav", ".flac", ".m4a", ".mp3", ".ogg", ".opus",
  ".aac",
)  # fmt: skip


def walk(folder: str | os.PathLike) -> Iterator[str]:
  """Media files of a folder and of all folders in it, in no fixed order.

  Links are followed; names that begin with a dot are passed over.

  Returns:
    Paths relative to `folder`, with '/'.

  Raises:
    InputError: there is no such folder.
  """
  root = pathlib.Path(folder)
  if not root.is_dir():
    raise InputError(f"{folder} is not a folder")
  visited = set()
  for place, folders, files in os.walk(root, followlinks=True):
    status = os.stat(place)
    if (status.st_dev, status.st_ino) in visited:  # a link to a parent
      folders.clear()
      continue
    visited.add((status.st_dev, status.st_ino))
    folders[:] = sorted(name for name in folders if name[0] != ".")
    inside = pathlib.Path(place).relative_to(root).as_posix()
    prefix = "" if inside == "." else f"{inside}/"
    for name in files:
      if name[0] != "." and is_media(name):
        yield prefix + name


def listed(path: str | os.PathLike) -> dict[str, pathlib.Path]:
  """Media files under a folder, or one file, by `readable` name, sorted.

  Raises:
    InputError: there are none.
  """
  path = pathlib.Path(path).expanduser()
  if path.is_file():
    root, names = path.parent, [path.name]
  else:
    root, names = path, sorted(walk(path))
  if not names:
    raise InputError(
      f"no media files in {path}; known are {' '.join(EXTENSIONS)}"
    )
  return {readable(name): root / name for name in names}


def is_media(name: str) -> bool:
  """Whether a file's name ends in one of EXTENSIONS, in any case."""
  return os.path.splitext(name)[1].lower() in EXTENSIONS


def readable(path: str) -> str:
  """A path as text that can be stored, whatever bytes it is made of."""
  return os.fsencode(path).decode("utf-8", "backslashreplace")
