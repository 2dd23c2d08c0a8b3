"""Lists of clips by id, such as those that must never be trained on.

A clip of a video is named VIDEO or VIDEO_START, with any number of digits in
the start, a whole second. A list may name a clip in either way, or a whole
video: AudioCaps' clips are part of AudioSet, whose ids are videos.
"""

import csv
import pathlib
import re
from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Bool

from avjax.errors import InputError

# Names of columns with ids, and with the start of a clip in seconds.
IDS = ("id", "video_id", "youtube_id", "ytid")
STARTS = ("start", "start_time", "start_seconds")
_TIMED = re.compile(r"(.+)_(\d+)(?:\.\d+)?")


def read(path: str | pathlib.Path) -> list[str]:
  """The ids of a list, in its order.

  Args:
    path: one id a line; or a CSV whose first row names the column of the ids
      (`id`, `video_id`, `youtube_id` or `ytid`) and perhaps that of the start
      (`start`, `start_time` or `start_seconds`); or one without such a row,
      whose first column are the ids and the second, where it is a whole
      number, the starts. Lines that begin with '#' are passed over.

  Raises:
    InputError: the file cannot be read or holds no id.
  """
  path = pathlib.Path(path).expanduser()
  try:
    lines = path.read_text(encoding="utf-8-sig").splitlines()
  except (OSError, UnicodeDecodeError) as error:
    raise InputError(f"{path} cannot be read: {error}") from error
  table = rows(lines)
  of_id, of_start = 0, 1
  names = [field.casefold() for field in table[0]] if table else []
  known = [name for name in IDS if name in names]
  if known:
    of_id = names.index(known[0])
    of_start = next((names.index(n) for n in STARTS if n in names), len(names))
    del table[0]
  ids = [clip_id(row, of_id, of_start) for row in table]
  if not any(ids):
    raise InputError(f"{path} holds no id")
  return [name for name in ids if name]


def rows(lines: Iterable[str]) -> list[list[str]]:
  """Fields of a table without its empty lines and those that begin with '#'.

  No id begins with '#'; AudioSet's tables have such lines for a header.
  """
  kept = [line for line in lines if not line.lstrip().startswith("#")]
  return [
    [field.strip() for field in row]
    for row in csv.reader(kept, skipinitialspace=True)
    if row
  ]


def clip_id(row: Sequence[str], of_id: int = 0, of_start: int = 1) -> str:
  """VIDEO_START where the row has a whole number for its start, else its id.

  Args:
    row: fields; may be short, '' is returned for an id that is not there.
    of_id: column of the id.
    of_start: column of the start.
  """
  name = row[of_id] if of_id < len(row) else ""
  start = row[of_start] if of_start < len(row) else ""
  return f"{name}_{start}" if name and start.isdecimal() else name


def key(name: str) -> tuple[str, int]:
  """(video, start in seconds) of a clip's name; a start of -1 = none."""
  match = _TIMED.fullmatch(name)
  return (match[1], int(match[2])) if match else (name, -1)


def named(
  ids: Iterable[str], listed: Sequence[str]
) -> tuple[Bool[np.ndarray, "n"], int]:
  """Which clips a list names.

  Args:
    ids: of n clips.
    listed: ids of the list. One without a start names every clip of the video;
      one with a start also the clip that is named after the video alone.

  Returns:
    Whether each clip is named, and how many ids of the list name none.
  """
  known = {name: (name, *key(name)) for name in listed}
  exact = set(known)
  timed = {(video, start) for _, video, start in known.values() if start >= 0}
  videos = {video for video, _ in timed}
  found, hits = [], set()
  for name in ids:
    video, start = key(name)
    if name in exact or name in videos:
      hit = name
    elif (video, start) in timed:
      hit = (video, start)
    else:
      hit = video if start >= 0 and video in exact else None
    found.append(hit is not None)
    hits.add(hit)
  unknown = sum(
    not (name in hits or video in hits or (video, start) in hits)
    for name, video, start in known.values()
  )
  return np.array(found, bool), unknown
