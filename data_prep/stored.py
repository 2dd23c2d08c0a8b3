"""An annotation row, and what is stored of its clip."""

import dataclasses
import json
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from data_prep import decode


@dataclasses.dataclass(frozen=True)
class Thing:
  """An object in a picture.

  Attributes:
    time: seconds from the clip's start.
    name: what it is.
    box: x0, y0, x1, y1 in 0..1 of the picture.
    sounding: whether it is heard at that time.
  """

  time: float
  name: str
  box: tuple[float, float, float, float]
  sounding: bool = False


@dataclasses.dataclass(frozen=True)
class Row:
  """One annotation: a clip and what is known of it.

  Attributes:
    id: unique in its split; any text.
    file: path relative to the media folder.
    start, end: seconds in the file; end None = to its end.
    labels: names of the head `label`, the main one first.
    verb, noun: names of these heads; '' = none.
    segments: names of the head `segment`, one a second.
    captions: texts.
    event: start and end of the main event, seconds from the clip's start.
    things: objects in the pictures.
  """

  id: str
  file: str
  start: float = 0.0
  end: float | None = None
  labels: Sequence[str] = ()
  verb: str = ""
  noun: str = ""
  segments: Sequence[str] = ()
  captions: Sequence[str] = ()
  event: tuple[float, float] | None = None
  things: Sequence[Thing] = ()


def row(values: Mapping[str, Any]) -> Row:
  """The inverse of `dataclasses.asdict`, by way of JSON too."""
  things = [Thing(**thing) for thing in values["things"]]
  return Row(**{**values, "things": things})


def digest(row: Row) -> int:
  """A number that changes with all that is said of a clip but its place."""
  said = dataclasses.replace(row, file="", start=0.0, end=None)
  values = json.dumps(dataclasses.asdict(said), sort_keys=True)
  return zlib.crc32(values.encode())


def features() -> dict[str, Any]:
  """TFDS's description of a record."""
  features = tfds.features
  scalar = features.Tensor(shape=(), dtype=np.object_)
  return {
    "id": features.Text(),
    "frames": features.Sequence(scalar),  # JPEG files
    "frame_rate": np.float32,
    "waveform": features.Tensor(
      shape=(None,), dtype=np.int16, encoding="bytes"
    ),
    "has_audio": np.bool_,
    "has_video": np.bool_,
    "label": features.Sequence(np.int64),  # the main one first
    "verb": np.int64,  # -1 = none
    "noun": np.int64,  # -1 = none
    "segment": features.Sequence(np.int64),  # one a second
    "captions": features.Sequence(features.Text()),
    "start": np.float32,  # seconds in the source file
    "end": np.float32,
    "event": features.Tensor(shape=(2,), dtype=np.float32),  # -1 = none
    "source_height": np.int64,
    "source_width": np.int64,
    "objects": features.Sequence(
      {
        "frame": np.int64,  # number in `frames`
        "name": features.Text(),
        "box": features.Tensor(shape=(4,), dtype=np.float32),
        "sounding": np.bool_,
      }
    ),
  }


def clip(row: Row, result: decode.Encoded) -> dict[str, Any]:
  """What is stored of a clip but its labels."""
  frames = list(result.frames)
  return {
    "id": row.id,
    "frames": frames,
    "frame_rate": result.frame_rate,
    "waveform": result.waveform,
    "has_audio": result.has_audio,
    "has_video": len(frames) > 0,
    "captions": list(row.captions),
    "start": row.start,
    "end": row.start + result.seconds,
    "event": np.asarray(row.event or (-1, -1), np.float32),
    "source_height": result.height,
    "source_width": result.width,
    "objects": objects(row.things, len(frames), result.frame_rate),
  }


def objects(things: Sequence[Thing], count: int, rate: float) -> list[dict]:
  """The objects nearest in time to each stored frame."""
  times = np.array(sorted({thing.time for thing in things}))
  if not len(times):
    return []
  nearest = [times[np.abs(times - k / rate).argmin()] for k in range(count)]
  return [
    {
      "frame": k,
      "name": thing.name,
      "box": np.asarray(thing.box, np.float32),
      "sounding": thing.sounding,
    }
    for k, time in enumerate(nearest)
    for thing in things
    if thing.time == time
  ]
