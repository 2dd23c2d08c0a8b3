"""What a build is asked for, and how one row becomes one record.

All of it is plain data, so that another process or another machine can do the
same.
"""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import tensorflow_datasets as tfds
from tensorflow_datasets.core import example_serializer

from avjax.data import media
from avjax.errors import InputError, lookup, unknown
from data_prep import decode, parts, stored
from data_prep.stored import Row

REFUSABLE = ("no audio", "no video", "damaged")


@dataclasses.dataclass(frozen=True)
class Options:
  """How a data set is built.

  Attributes:
    media: folder that the rows' files are relative to.
    annotations: file or folder that the rows come from; None = in `media`.
    workers: decoding processes; 0 = none, -1 = one a core.
    refuse: which of 'no audio', 'no video' and 'damaged' keep a clip out;
      otherwise it is built, and `has_audio`, `has_video` say what it lacks.
    frame_rate: frames/s that are stored, or that `frames10` chooses from.
    short_side: of stored frames; smaller ones stay as they are.
    audio_rate: of stored sound.
    channels: 'mean' or 'first', what becomes of several channels.
    quality: of JPEG frames.
    min_seconds: shorter clips are 'too short'.
    limits: clips that exceed them are 'corrupt'.
    beam: options of an Apache Beam pipeline that makes the parts instead of
      `workers`; None = no Beam.
    settings: saved in the metadata, to tell builds apart.
  """

  media: pathlib.Path
  annotations: pathlib.Path | None = None
  workers: int = -1
  refuse: tuple[str, ...] = ()
  frame_rate: float = media.VIDEO_RATE
  short_side: int = 256
  audio_rate: int = 16_000
  channels: str = "mean"
  quality: int = 85
  min_seconds: float = 0.1
  limits: media.Limits = media.Limits()
  beam: tuple[str, ...] | None = None
  settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  def __post_init__(self):
    for name in self.refuse:
      if name not in REFUSABLE:
        raise unknown("reason to refuse a clip", name, REFUSABLE)
    lookup(dict.fromkeys(media.CHANNELS), self.channels, "channels")
    for name, least, most in (
      ("frame_rate", 0.1, 240), ("short_side", 16, 8_192),
      ("audio_rate", 1_000, 192_000), ("quality", 1, 100),
    ):  # fmt: skip
      value = getattr(self, name)
      if not least <= value <= most:
        raise InputError(f"{name}={value:g} is not in {least:g}..{most:g}")


@dataclasses.dataclass(frozen=True)
class Recorder:
  """Turns annotation rows into records.

  Attributes:
    options: of the build.
    variant: `video` or `frames10`.
    classes: names of the heads' classes, in order.
  """

  options: Options
  variant: str
  classes: Mapping[str, Sequence[str]]

  def task(self, row: Row) -> decode.Task:
    """What to decode.

    Raises:
      InputError: the file lies outside the media folder.
    """
    options = self.options
    return decode.Task(
      path=str(inside(options.media, row.file, f"clip {row.id!r}")),
      start=row.start,
      end=row.end,
      variant=self.variant,
      frame_rate=options.frame_rate,
      short_side=options.short_side,
      audio_rate=options.audio_rate,
      channels=options.channels,
      quality=options.quality,
      limits=options.limits,
    )

  def labels(self, row: Row) -> dict[str, Any]:
    """Class numbers of a row's names.

    Raises:
      InputError: a name is no class; the nearest is named.
    """
    tables = self._numbers

    def number(head: str, name: str) -> int:
      return lookup(tables.get(head, {}), name, f"{head} of clip {row.id!r}")

    return {
      "label": [number("label", name) for name in row.labels],
      "verb": number("verb", row.verb) if row.verb else -1,
      "noun": number("noun", row.noun) if row.noun else -1,
      "segment": [number("segment", name) for name in row.segments],
    }

  def record(
    self, row: Row, result: decode.Encoded
  ) -> tuple[bytes | None, parts.Tally]:
    """The record of a clip, None if it is not stored, and its outcome."""
    tally = parts.Tally()
    if not self._accept(tally, row, result):
      return None, tally
    labels = self.labels(row)
    tally.index.append(
      (row.id, labels["label"], result.seconds, result.has_audio,
       bool(result.frames), stored.digest(row))
    )  # fmt: skip
    example = self._features.encode_example(
      {**stored.clip(row, result), **labels}
    )
    return self._serializer.serialize_example(example), tally

  def make(self, part: parts.Part) -> None:
    """Makes a part by itself, on any machine that sees the same folders."""
    tasks = [self.task(row) for row in part.rows]
    # In a process of its own, so that a file that crashes its decoder costs
    # one clip.
    results = decode.encode_all(tasks, workers=1)
    part.write(map(self.record, part.rows, results))

  def _accept(
    self, tally: parts.Tally, row: Row, result: decode.Encoded
  ) -> bool:
    """Records the outcome; true if the clip is to be stored."""
    lists, refuse = tally.lists, self.options.refuse
    silent, blind = not result.has_audio, not result.frames
    problem, message = result.problem, result.message
    if not problem and message and "damaged" in refuse:
      problem = "corrupt"
    elif not problem and result.seconds < self.options.min_seconds:
      problem = "too short"
      message = f"{result.seconds:.3f} s of {self.options.min_seconds:g} s"
    elif not problem and silent and "no audio" in refuse:
      problem = "no audio"
    elif not problem and blind and "no video" in refuse:
      problem = "no video"
    if problem:
      lists[problem].append([row.id, message] if message else row.id)
      return False
    lists["built"].append(row.id)
    if message:
      lists["damaged"].append([row.id, message])
    if silent:
      lists["silent"].append(row.id)
    if blind:
      lists["blind"].append(row.id)
    return True

  @functools.cached_property
  def _numbers(self) -> dict[str, dict[str, int]]:
    return {
      head: {name: k for k, name in enumerate(names)}
      for head, names in self.classes.items()
    }

  @functools.cached_property
  def _features(self) -> tfds.features.FeaturesDict:
    return tfds.features.FeaturesDict(stored.features())

  @functools.cached_property
  def _serializer(self) -> example_serializer.ExampleSerializer:
    return example_serializer.ExampleSerializer(
      self._features.get_serialized_info()
    )

  def __getstate__(self) -> dict[str, Any]:
    # What is cached is made again where it is needed.
    return {k: getattr(self, k) for k in ("options", "variant", "classes")}


def inside(folder: pathlib.Path, file: str, what: str) -> pathlib.Path:
  """`folder/file`, which must not lie outside the folder.

  Raises:
    InputError: it does; names `what`, the file and the folder.
  """
  root = os.path.abspath(folder)
  path = os.path.abspath(os.path.join(root, file))
  if os.path.commonpath([root, path]) != root:
    raise InputError(f"{what}: {file!r} is not inside {folder}")
  return pathlib.Path(path)
