"""Finds the media files of clips, however people name and nest them."""

import dataclasses
import os
import pathlib
import statistics
from collections.abc import Iterable, Mapping, Sequence

import av

from avjax.data.media_folder import EXTENSIONS, walk
from avjax.errors import InputError

# Files that are named after their video alone are taken for whole videos, not
# for excerpts, if most are longer than this many times the excerpts.
WHOLE = 2.0
_SAMPLE = 16  # files that are opened to tell
_RANK = {extension: rank for rank, extension in enumerate(EXTENSIONS)}


def index(folder: str | os.PathLike) -> dict[str, list[str]]:
  """Lists the media files of a folder and of all folders in it.

  Links are followed; names that begin with a dot are passed over.

  Returns:
    File name without extension -> paths relative to `folder`, with '/'; the
    preferred one first: by extension (see EXTENSIONS), then the least nested.

  Raises:
    InputError: there is no such folder.
  """
  found: dict[str, list[str]] = {}
  for path in walk(folder):
    stem, _ = _split(os.path.basename(path))
    found.setdefault(stem, []).append(path)
  for paths in found.values():
    paths.sort(key=_preference)
  return found


def find(files: Mapping[str, Sequence[str]], candidates: Iterable[str]) -> str:
  """The file of the first candidate that exists.

  Args:
    files: what `index` returned.
    candidates: names such as 'a_000010.mp4', the most likely first. Another
      media extension fits, too, unless that very file exists; 'train/a.mp4'
      fits only in a folder `train` at any depth; 'a.mp4' in every folder.

  Returns:
    A path relative to the indexed folder; if there is none, the first
    candidate, which the builder then reports as a missing file.

  Raises:
    InputError: there are no candidates.
  """
  first = None
  for candidate in candidates:
    first = candidate if first is None else first
    path = _match(files, candidate)
    if path:
      return path
  if first is None:
    raise InputError("a clip without a candidate for its file's name")
  return first


@dataclasses.dataclass(frozen=True)
class Excerpt:
  """An annotated part of an online video, seconds in that video.

  Attributes:
    folder: of files with the same name the one in such a folder is taken.
  """

  video: str
  start: float
  end: float
  folder: str = ""


@dataclasses.dataclass(frozen=True)
class Part:
  """Where an excerpt is: a file and seconds in that file."""

  file: str
  start: float
  end: float


def locate(media: str | os.PathLike, excerpts: Sequence[Excerpt]) -> list[Part]:
  """The file and the times in it of each excerpt.

  A file whose name tells the start is the excerpt: VIDEO_START (six digits or
  as many as needed), VIDEO_START_END, both in seconds or milliseconds. A file
  VIDEO (or YVIDEO) is the excerpt, too, or the whole video; which it is of all
  such files, the length of a few of them tells, see WHOLE. If it is an excerpt
  and several of that video are wanted, it is none of them: nobody knows which.

  Args:
    media: the folder to search, with its subfolders.
    excerpts: what is wanted.

  Returns:
    One part each; without a file, the first name that was tried.
  """
  files = index(media)
  found: list[tuple[str, bool]] = []
  for excerpt in excerpts:
    timed = _timed_names(excerpt)
    path = next(filter(None, (_match(files, name) for name in timed)), "")
    plain = [f"{excerpt.video}.mp4", f"Y{excerpt.video}.mp4"]
    if excerpt.folder:
      plain.insert(0, f"{excerpt.folder}/{excerpt.video}.mp4")
    other = next(filter(None, (_match(files, name) for name in plain)), "")
    found.append((path or other or timed[0], not path and bool(other)))
  claims: dict[str, set[tuple[float, float]]] = {}
  for excerpt, (file, plain) in zip(excerpts, found, strict=True):
    if plain:
      claims.setdefault(file, set()).add((excerpt.start, excerpt.end))
  lengths = {k: max(end - start for start, end in v) for k, v in claims.items()}
  whole = _are_whole(pathlib.Path(media), lengths)
  parts = []
  for excerpt, (file, plain) in zip(excerpts, found, strict=True):
    if plain and whole:
      parts.append(Part(file, excerpt.start, excerpt.end))
      continue
    if plain and len(claims[file]) > 1:
      file = _timed_names(excerpt)[0]
    parts.append(Part(file, 0.0, excerpt.end - excerpt.start))
  return parts


def _timed_names(excerpt: Excerpt) -> list[str]:
  video, start, end = excerpt.video, excerpt.start, excerpt.end
  six, short = f"{video}_{int(start):06d}.mp4", f"{video}_{start:g}.mp4"
  # A start within a second is told best by its own digits.
  first, second = (six, short) if start == int(start) else (short, six)
  return [
    first,
    second,
    f"{video}_{int(start):06d}_{int(end):06d}.mp4",
    f"{video}_{start:g}_{end:g}.mp4",
    f"{video}_{round(start * 1000)}_{round(end * 1000)}.mp4",
  ]


def _are_whole(root: pathlib.Path, seconds: Mapping[str, float]) -> bool:
  """Whether most files are whole videos; `seconds` are those wanted of each."""
  names = sorted(seconds)
  ratios = []
  for name in names[:: max(len(names) // _SAMPLE, 1)][:_SAMPLE]:
    try:
      with av.open(f"file:{root / name}") as container:
        ratios.append((container.duration or 0) / 1e6 / seconds[name])
    except (av.FFmpegError, OSError):
      continue  # the builder says so
  return bool(ratios) and statistics.median(ratios) > WHOLE


def _match(files: Mapping[str, Sequence[str]], candidate: str) -> str:
  parent, _, name = candidate.rpartition("/")
  stem, extension = _split(name)
  paths = files.get(stem, ())
  if parent:
    paths = [
      p for p in paths if f"/{p}".rpartition("/")[0].endswith(f"/{parent}")
    ]
  exact = (p for p in paths if extension and p.endswith(extension))
  return next(exact, paths[0] if paths else "")


def _split(name: str) -> tuple[str, str]:
  """Name and media extension, '' if it is none: names may hold dots."""
  stem, extension = os.path.splitext(name)
  return (stem, extension) if extension.lower() in _RANK else (name, "")


def _preference(path: str) -> tuple[int, int, str]:
  extension = os.path.splitext(path)[1].lower()
  return _RANK[extension], path.count("/"), path
