"""From one clip, stored or in a media file, to a row of a batch."""

import dataclasses
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import cv2
import numpy as np
import simplejpeg
from jaxtyping import UInt8

from avjax.batch import MODALITIES
from avjax.data import media, object_scores, records, sampling
from avjax.data.datasets import DATASETS
from avjax.errors import InputError, lookup


@dataclasses.dataclass(frozen=True)
class Clip:
  """A clip before it is cut.

  Attributes:
    id: of the record, or the file's path.
    frames: JPEG files, or decoded pictures; empty = no pictures.
    frame_rate: of `frames`.
    waveform: int16 [s]; empty = no sound.
    labels: class numbers by head; a negative one means none.
    captions: texts.
  """

  id: str
  frames: Sequence[Any]
  frame_rate: float
  waveform: Any
  labels: Mapping[str, Sequence[int]] = dataclasses.field(default_factory=dict)
  captions: Sequence[str] = ()


def from_record(
  record: records.Record,
  modality: str,
  heads: Sequence[str],
  captions: bool = False,
) -> Clip:
  """Takes the tracks of `modality` (a, v, av), labels of `heads`, captions."""
  texts = record.blobs("captions") if captions else []
  blobs = record.blobs("waveform") if "a" in modality else []
  return Clip(
    id=record.text("id"),
    frames=record.blobs("frames") if "v" in modality else [],
    frame_rate=float(record.floats("frame_rate")[0]),
    waveform=np.frombuffer(blobs[0] if blobs else b"", np.int16),
    labels={head: record.integers(head) for head in heads},
    captions=[str(blob, "utf-8") for blob in texts],
  )


def from_file(path: str | pathlib.Path, data: Any) -> Clip:
  """Reads a media file as data sets are stored.

  Raises:
    InputError: it cannot be read, has none of the tracks, or exceeds the limits
      of `data.files`.
  """
  options = dict(data["files"])
  channels = options.pop("channels")
  clip = media.read_clip(
    path,
    short_side=data["video"]["resize"],
    audio_rate=data["audio"]["rate"],
    channels=channels,
    tracks=data["modality"],
    limits=media.Limits(**options),
  )
  frames = [] if clip.frames is None else list(clip.frames)
  frames, rate = media.spread(frames, data["variant"])
  waveform = np.zeros(0, np.int16) if clip.waveform is None else clip.waveform
  return Clip(str(path), frames, rate, waveform)


def head_key(head: str) -> str:
  """The batch key of a head."""
  return "label" if head == "label" else f"label/{head}"


def num_classes(data: Any, head: str) -> int:
  """Classes of a head, as published; of a `folder`, as built.

  Raises:
    InputError: the data set has no such head.
  """
  if data["name"] == "folder":
    return len(records.class_names(data, head))
  heads = lookup(DATASETS, data["name"], "data set").heads
  return lookup(heads, head, f"head of {data['name']}")


def num_segments(data: Any) -> int:
  """Seconds for which the head `segment` has labels."""
  seconds = DATASETS[data["name"]].seconds or data["audio"]["seconds"]
  return math.ceil(seconds)


def shapes(
  data: Any,
  batch_size: int,
  views: int = 1,
  *,
  train: bool = True,
  captions: int = 0,
) -> dict[str, tuple[tuple[int, ...], Any]]:
  """Shape and dtype of every array of a batch; nothing needs to be built.

  Args:
    data: `config.data`; the folder of `object_scores` has to be there.
    batch_size: b.
    views: windows of a clip.
    train: with what only a training batch holds: object scores and, where
      `data.text.vocabulary` is set, one text of each clip, [b l].
    captions: c of `text` [b c l] in evaluation; 0 = no text.

  Raises:
    InputError: several views of stored features, or c is negative.
  """
  b = (batch_size,)
  found = (_feature_shapes if data["features"] else _media_shapes)(
    data, batch_size, views
  )
  for head in data["heads"]:
    time = (num_segments(data),) if head == "segment" else ()
    size = (*b, *time, num_classes(data, head))
    found[head_key(head)] = (size, np.float32)
  if train and data["object_scores"]:
    for modality, scores in object_scores.read(data["object_scores"]).items():
      size = (batch_size, len(scores.labels))
      found[f"objects/{modality}"] = (size, np.float16)
  if captions < 0:
    raise InputError(f"captions={captions} of an evaluation is negative")
  if captions or (train and data["text"]["vocabulary"]):
    size = (*b, *(() if train else (captions,)), data["text"]["length"])
    found |= {"text": (size, np.int32), "text_mask": (size, np.bool_)}
  for key in ("has_audio", "has_video", "valid"):
    found[key] = (b, np.bool_)
  found["index"] = (b, np.uint32)
  return found


def _media_shapes(data: Any, batch_size: int, views: int) -> dict[str, Any]:
  b, v = (batch_size,), (views,) if views > 1 else ()
  found: dict[str, Any] = {}
  if "v" in data["modality"]:
    video = data["video"]
    picture = (video["num_frames"], video["size"], video["size"], 3)
    found["frames"] = (b + v + picture, np.uint8)
  if "a" in data["modality"]:
    samples = round(data["audio"]["seconds"] * data["audio"]["rate"])
    # Frames spread over a clip are views of the picture: one sound for all.
    sound = () if data["variant"] == "frames10" else v
    found["waveform"] = ((*b, *sound, samples), np.int16)
    found["samples"] = (b, np.int32)
  return found


def _feature_shapes(data: Any, batch_size: int, views: int) -> dict[str, Any]:
  if views > 1:
    raise InputError(
      f"views={views}: stored features of a clip have one view (data.features="
      f"{data['features']!r})"
    )
  size = (batch_size, data["feature_frames"], data["feature_width"])
  read = [m for m in MODALITIES if m[0] in data["modality"]]
  return {f"features/{m}": (size, np.float32) for m in read}


class Cutter:
  """Cuts clips into rows of a batch, as `config.data` says."""

  def __init__(self, data: Any):
    # Plain dicts: every attribute of a ConfigDict costs microseconds.
    self.data = data.to_dict() if hasattr(data, "to_dict") else dict(data)

  def cut(
    self,
    clip: Clip,
    out: Mapping[str, np.ndarray],
    row: int,
    rng: np.random.Generator | None,
    views: int = 1,
  ) -> None:
    """Fills one row but `valid` and `index`.

    Args:
      clip: what to cut from.
      out: arrays of the whole batch.
      row: which example.
      rng: draws windows and crops; None = evaluation.
      views: windows in evaluation; several make a dimension of their own.

    Raises:
      ValueError: a frame is not a JPEG file.
      InputError: frames are asked for more densely than they are stored.
    """
    seconds = None
    out["has_video"][row] = len(clip.frames) > 0
    out["has_audio"][row] = len(clip.waveform) > 0
    if "frames" in out:
      rows = out["frames"][row : row + 1] if views == 1 else out["frames"][row]
      seconds = self._cut_frames(clip, rows, rng)
    if "waveform" in out:
      sound = out["waveform"]
      rows = sound[row : row + 1] if sound.ndim == 2 else sound[row]
      out["samples"][row] = self._cut_sound(clip, rows, seconds, rng)
    for head, numbers in clip.labels.items():
      self._label(head, numbers, out[head_key(head)][row])

  def _cut_frames(self, clip, rows, rng) -> float | None:
    """Returns the second at which the first view starts."""
    video, augment = self.data["video"], self.data["augment"]
    length, count = len(clip.frames), video["num_frames"]
    if not length:
      rows[:] = 0
      return None
    variant = self.data["variant"]
    step = sampling.frame_step(video, variant, clip.frame_rate)
    starts = sampling.video_starts(
      length, count, step, len(rows), rng, late=variant == "frames10"
    )
    height, width = _size(clip.frames[0])
    box = sampling.crop_box(
      height,
      width,
      resize=video["resize"],
      size=video["size"],
      jitter=augment["scale_jitter"],
      random=augment["random_crop"],
      rng=rng,
    )
    for start, row in zip(starts, rows, strict=True):
      numbers = sampling.frame_numbers(start, count, step, length).tolist()
      for k, number in enumerate(numbers):
        if k and number == numbers[k - 1]:
          row[k] = row[k - 1]
        else:
          _crop(_decode(clip.frames[number]), box, row[k])
    return starts[0] / clip.frame_rate

  def _cut_sound(self, clip, rows, seconds, rng) -> int:
    """Returns the samples of the clip in each view; padding follows them."""
    audio = self.data["audio"]
    length, count = len(clip.waveform), rows.shape[-1]
    if not length:
      rows[:] = 0
      return 0
    wrap = rng is not None and audio["start"] == "wrap" and seconds is not None
    if rng is None:
      starts = sampling.starts(length, count, len(rows), None)
    else:
      time = None if seconds is None else round(seconds * audio["rate"])
      starts = [sampling.audio_start(audio["start"], length, count, time, rng)]
    for start, row in zip(starts, rows, strict=True):
      sampling.cut(clip.waveform, start, row, wrap=wrap)
    # Where windows differ, the clip is longer than each.
    return count if wrap else min(length - starts[0], count)

  def _label(self, head, numbers, out) -> None:
    out[:] = 0
    if head == "segment":
      numbers = numbers[: len(out)]
      out[np.arange(len(numbers)), numbers] = 1
      return
    if head == "label" and not self.data["multilabel"]:
      numbers = numbers[:1]  # the main one
    out[[number for number in numbers if number >= 0]] = 1


def _size(frame: Any) -> tuple[int, int]:
  if isinstance(frame, np.ndarray):
    return frame.shape[0], frame.shape[1]
  return simplejpeg.decode_jpeg_header(frame)[:2]


def _decode(frame: Any) -> UInt8[np.ndarray, "h w 3"]:
  if isinstance(frame, np.ndarray):
    return frame
  return simplejpeg.decode_jpeg(frame, "RGB", fastdct=True, fastupsample=True)


def _crop(picture: np.ndarray, box: sampling.Crop, out: np.ndarray) -> None:
  """Writes a part of a picture, scaled to the size of `out`."""
  part = picture[box.top : box.bottom, box.left : box.right]
  if part.shape == out.shape:
    out[:] = part
    return
  # Linear is enough below a factor of two, and six times as fast.
  much = min(part.shape[:2]) >= 2 * len(out)
  method = cv2.INTER_AREA if much else cv2.INTER_LINEAR
  cv2.resize(part, out.shape[1::-1], dst=out, interpolation=method)
