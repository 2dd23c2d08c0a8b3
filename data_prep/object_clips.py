"""Sound and pictures of clips that are to be scored: built data sets, files."""

import collections
import dataclasses
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent import futures
from typing import Any, Protocol

import numpy as np
import simplejpeg

from avjax.data import media, media_folder, records
from data_prep import stats

# Own files: pictures 16:9 then fill the 640 pixels that YOLO looks at.
SHORT_SIDE = 360
# What a clip that cannot be read may raise; InputError is a ValueError.
UNREADABLE = (*stats.UNREADABLE, MemoryError)
NO_SOUND, NO_PICTURES = "no sound", "no pictures"


@dataclasses.dataclass(frozen=True)
class Clip:
  """What was read of a clip.

  Attributes:
    sound: int16 [s], mono; empty = there is none, or it was not asked for.
    rate: samples a second of it.
    frames: RGB pictures uint8 [h, w, 3], spread evenly; empty likewise.
  """

  sound: np.ndarray
  rate: int
  frames: Sequence[np.ndarray]


class Source(Protocol):
  """Clips that can be read by id."""

  ids: Sequence[str]
  origin: str

  def read(self, name: str, tracks: str) -> Any:
    """A clip's tracks: 'a', 'v' or 'av'; raises one of UNREADABLE."""


class Stored:
  """Splits of a built data set.

  Attributes:
    ids: of the clips.
    origin: what ids are names in: data sets of a variant, or a folder.

  Args:
    name: of the data set; av_demo is made if it is not built.
    splits: of the data set. A clip that several hold is read from the first.
    data_dir: '' = $AVJAX_DATA or ~/avjax_data.
    variant: of the data set.
    limit: first clips of each split only; 0 = all.

  Raises:
    InputError: see `stats.open_split`.
  """

  def __init__(
    self,
    name: str,
    splits: Sequence[str],
    *,
    data_dir: str = "",
    variant: str = "video",
    limit: int = 0,
  ):
    self.origin = f"built data sets, {variant}"
    self._places: dict[str, tuple[Any, int, int]] = {}
    for wanted in splits:
      section, split = stats.open_split(
        name, wanted, data_dir=data_dir, variant=variant, limit=limit
      )
      for number, id_ in enumerate(split.column("id")[: len(split)]):
        place = (split, number, int(section.audio.rate))
        self._places.setdefault(str(id_), place)
    self.ids = list(self._places)

  def read(self, name: str, tracks: str) -> Clip:
    """A clip's tracks: 'a', 'v' or 'av'.

    Raises:
      ValueError: a damaged record.
    """
    split, number, rate = self._places[name]
    record = split[number]
    blobs = record.blobs("waveform") if "a" in tracks else []
    sound = np.frombuffer(blobs[0] if blobs else b"", np.int16)
    pictures = self.pictures(record) if "v" in tracks else []
    return Clip(sound, rate, pictures)

  def pictures(self, record: records.Record) -> list[np.ndarray]:
    """Ten frames of a clip, decoded.

    Raises:
      ValueError: one is not a JPEG file.
    """
    frames, _ = media.spread(record.blobs("frames"), "frames10")
    return [simplejpeg.decode_jpeg(frame, "RGB") for frame in frames]


class Files:
  """Media files of a folder and of all folders in it, or one file.

  The ids are those of `avjax.embed`: paths relative to the folder.

  Args:
    folder: or a file.
    limit: first files only; 0 = all.

  Raises:
    InputError: there are no media files.
  """

  rate = 16_000  # as data sets are stored

  def __init__(self, folder: str | pathlib.Path, limit: int = 0):
    found = media_folder.listed(folder)
    names = [*found][: limit or None]
    self._paths = {name: found[name] for name in names}
    place = pathlib.Path(folder).expanduser().resolve()
    self.origin = str(place.parent if place.is_file() else place)
    self.ids = list(self._paths)

  def read(self, name: str, tracks: str) -> Clip:
    """A file's tracks: 'a', 'v' or 'av'.

    Raises:
      InputError: it cannot be read, or exceeds the default `media.Limits`.
    """
    read = media.read_clip(
      self._paths[name],
      short_side=SHORT_SIDE,
      audio_rate=self.rate,
      tracks=tracks,
    )
    frames = [] if read.frames is None else list(read.frames)
    frames, _ = media.spread(frames, "frames10")
    sound = np.zeros(0, np.int16) if read.waveform is None else read.waveform
    # Copies: the rest of the pictures need not stay in memory.
    return Clip(sound, self.rate, [frame.copy() for frame in frames])


def read_all(
  source: Source,
  wanted: Mapping[str, str],
  prepare: Callable[[Any, str], Any],
  *,
  threads: int,
  ahead: int,
) -> Iterator[tuple[str, Any]]:
  """Reads clips in threads while the caller computes.

  Args:
    source: of the clips.
    wanted: id -> tracks, in the order of the results.
    prepare: what the threads do with a clip and its tracks.
    threads: that read.
    ahead: clips that may wait for the caller.

  Returns:
    Ids with what `prepare` returned, or with the exception of a clip that
    cannot be read.
  """
  waiting: collections.deque = collections.deque()

  def work(name: str, tracks: str) -> Any:
    try:
      return prepare(source.read(name, tracks), tracks)
    except UNREADABLE as error:
      return error

  pool = futures.ThreadPoolExecutor(threads)
  try:
    for name, tracks in wanted.items():
      waiting.append((name, pool.submit(work, name, tracks)))
      if len(waiting) > ahead:
        name, future = waiting.popleft()
        yield name, future.result()
    while waiting:
      name, future = waiting.popleft()
      yield name, future.result()
  finally:
    pool.shutdown(cancel_futures=True)


def reason(error: Exception) -> str:
  """Why a clip cannot be read, in words."""
  text = str(error) or type(error).__name__
  kind = f"{error.reason}: " if isinstance(error, media.Unreadable) else ""
  return kind + text
