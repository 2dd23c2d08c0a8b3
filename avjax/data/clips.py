"""From one stored clip to the arrays of one example: cut, crop, label.

Everything random comes from the generator that is passed in; everything else
is plain numpy, so that the same code serves threads, worker processes,
evaluation and media files.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import cv2
import numpy as np
import simplejpeg
from jaxtyping import UInt8

from avjax.errors import InputError

# Threads of the pipeline are over clips, not inside a picture.
cv2.setNumThreads(0)

Record = Mapping[str, Any]  # one clip as data_prep/builder.py stores it


@dataclasses.dataclass(frozen=True)
class Cut:
  """Which part of a clip an example takes.

  Attributes:
    frames: indices into the stored frames.
    sample: first sample of the sound, may be past the end.
    wrap: whether the sound goes on at its beginning after its end.
  """

  frames: np.ndarray
  sample: int
  wrap: bool = False


def stride_of(video: Any, stored_rate: float) -> float:
  """Stored frames between two frames of an example.

  `video.stride` counts at `video.rate` frames/s: 4 at 25 is 2 at 12.5.
  """
  return video.stride / video.rate * stored_rate


def random_cut(record: Record, data: Any, rng: np.random.Generator) -> Cut:
  """A uniformly drawn start; the sound as `data.audio.start` says.

  `aligned`: the same time, moved back where the track would end too early.
  `wrap`: the same time, going on at the beginning of the track (the public
  AV-MAE code). `independent`: its own uniform start.
  """
  stored, samples = len(record["frames"]), len(record["waveform"])
  need = round(data.audio.seconds * data.audio.rate)
  stride = stride_of(data.video, float(record["frame_rate"]))
  span = (data.video.num_frames - 1) * stride
  first = int(rng.integers(0, max(1, int(stored - span))))
  free = max(0, samples - need)
  mode = data.audio.start
  if mode not in ("aligned", "wrap", "independent"):
    raise InputError(
      f"data.audio.start={mode!r} is not aligned, wrap or independent"
    )
  if mode == "independent" or not stored:
    sample = int(rng.integers(0, free + 1))
  else:
    seconds = first / float(record["frame_rate"])
    sample = round(seconds * data.audio.rate)
    sample = sample % max(samples, 1) if mode == "wrap" else min(sample, free)
  return Cut(indices(first, stride, data, stored), sample, mode == "wrap")


def view_cuts(record: Record, data: Any, views: int) -> list[Cut]:
  """Evenly spread starts, of each modality by itself; one view = the centre."""
  stored, samples = len(record["frames"]), len(record["waveform"])
  need = round(data.audio.seconds * data.audio.rate)
  stride = stride_of(data.video, float(record["frame_rate"]))
  room = max(0, int(stored - data.video.num_frames * stride))
  free = max(0, samples - need)
  shares = np.linspace(0, 1, views) if views > 1 else [0.5]
  return [
    Cut(indices(int(s * room), stride, data, stored), int(s * free))
    for s in shares
  ]


def indices(first: int, stride: float, data: Any, stored: int) -> np.ndarray:
  """Stored frames of an example; past the end the last one is repeated."""
  steps = np.arange(data.video.num_frames) * stride
  return np.minimum(np.round(first + steps).astype(int), max(stored - 1, 0))


def write_frames(
  record: Record,
  wanted: Sequence[int],
  data: Any,
  rng: np.random.Generator | None,
  out: UInt8[np.ndarray, "t h w 3"],
) -> None:
  """Decodes, crops and scales the wanted frames into `out`.

  Args:
    record: `frames` are JPEG bytes, or arrays [h w 3].
    wanted: indices; equal neighbours are decoded once.
    data: `config.data`.
    rng: draws scale and place of the crop; None = the centre.
    out: filled in place.

  Raises:
    ValueError: a frame is not a JPEG file.
  """
  box = None
  for position, index in enumerate(wanted):
    if position and index == wanted[position - 1]:
      out[position] = out[position - 1]
      continue
    picture = decode(record["frames"][index])
    if box is None:
      box = crop_box(picture.shape[:2], data, rng)
    top, left, height, width = box
    piece = picture[top : top + height, left : left + width]
    if piece.shape == out.shape[1:]:
      out[position] = piece
    else:
      # Averaging where much shrinks, else the cheaper interpolation.
      small = height > 1.5 * out.shape[1]
      mode = cv2.INTER_AREA if small else cv2.INTER_LINEAR
      cv2.resize(
        piece, out.shape[2:0:-1], dst=out[position], interpolation=mode
      )


def decode(picture: Any) -> UInt8[np.ndarray, "h w 3"]:
  """JPEG bytes -> RGB; arrays pass through."""
  if isinstance(picture, np.ndarray) and picture.ndim == 3:
    return picture
  return simplejpeg.decode_jpeg(
    bytes(picture), colorspace="RGB", fastdct=True, fastupsample=True
  )


def crop_box(
  shape: Sequence[int], data: Any, rng: np.random.Generator | None
) -> tuple[int, int, int, int]:
  """top, left, height, width of the crop in the stored picture.

  The short side is thought scaled to `video.resize`, then a square of
  `video.size` is cut; scale jitter multiplies height and width apart.
  """
  low, high = data.augment.scale_jitter
  scale = data.video.resize / min(shape)
  box = []
  for length in shape:
    factor = scale
    if rng is not None and (low, high) != (1.0, 1.0):
      factor *= rng.uniform(low, high)
    size = min(length, max(1, round(data.video.size / factor)))
    start = (length - size) // 2
    if rng is not None and data.augment.random_crop:
      start = int(rng.integers(0, length - size + 1))
    box.append((start, size))
  (top, height), (left, width) = box
  return top, left, height, width


def write_waveform(record: Record, cut: Cut, out: np.ndarray) -> None:
  """Samples from `cut.sample` on into `out` [s]; zeros past the end."""
  waveform = np.asarray(record["waveform"], np.int16)
  out[:] = 0
  if not len(waveform):
    return
  if cut.wrap:
    place = (cut.sample + np.arange(len(out))) % len(waveform)
    out[:] = waveform[place]
    return
  piece = waveform[cut.sample : cut.sample + len(out)]
  out[: len(piece)] = piece


def write_label(record: Record, head: str, name: str, out: np.ndarray) -> None:
  """One-hot or multi-hot labels of a head into `out` [k] or [t k].

  Raises:
    InputError: a class number outside the head.
  """
  out[:] = 0
  numbers = np.atleast_1d(np.asarray(record[head], np.int64))
  if head == "segment":
    numbers = np.resize(numbers, len(out)) if len(numbers) else numbers
    if len(numbers):
      out[np.arange(len(out)), numbers] = 1
    return
  for number in numbers[numbers >= 0]:
    if number >= len(out):
      raise InputError(
        f"{name}: class {number} of head {head!r}, which has {len(out)}"
      )
    out[number] = 1
