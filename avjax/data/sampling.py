"""Which part of a clip an example is: frames, samples and the crop.

Training draws, evaluation takes the centre or evenly spread views. Pure
functions of numbers; the pipeline applies them to bytes.
"""

import dataclasses
import math
from typing import Any

import numpy as np
from jaxtyping import Int, Int16

from avjax.errors import InputError, lookup


@dataclasses.dataclass(frozen=True)
class Crop:
  """A rectangle of the picture, whole pixels: it becomes the whole input."""

  top: int
  bottom: int
  left: int
  right: int


def frame_step(video: Any, variant: str, stored_rate: float) -> float:
  """Stored frames from one chosen frame to the next.

  `stride` counts frames at `rate`; in the variant `frames10`, whose frames are
  spread over the clip, it counts stored frames.

  Raises:
    InputError: frames are asked for more densely than they are stored.
  """
  if variant == "frames10":
    return float(video["stride"])
  step = video["stride"] * stored_rate / video["rate"]
  if step < 1 - 1e-3 and video["num_frames"] > 1:
    raise InputError(
      f"data.video.rate {video['rate']} with stride {video['stride']} asks for "
      f"{video['rate'] / video['stride']:g} frames/s; the stored clips have "
      f"{stored_rate:g}"
    )
  return step


def starts(
  length: int,
  span: int,
  views: int,
  rng: np.random.Generator | None,
  late: bool = False,
) -> list[int]:
  """Where windows of `span` begin in `length`, frames or samples alike.

  Args:
    length: of the clip.
    span: of a window, at least 1.
    views: windows; spread from the beginning to the last that fits.
    rng: draws a start uniformly (training, one view); None = the centre for
      one view.
    late: of two centres the later one: frame 5 of 10, as the public CAV-MAE
      code has it, not 4.
  """
  spare = max(length - span, 0)
  if rng is not None:
    return [int(rng.integers(0, spare + 1))]
  if views == 1:
    return [(spare + late) // 2]
  return np.linspace(0, spare, views).astype(int).tolist()


def frame_numbers(
  start: int, count: int, step: float, length: int
) -> Int[np.ndarray, "t"]:
  """Stored frames of a window; a clip that is too short starts again."""
  numbers = np.rint(start + step * np.arange(count)).astype(int)
  return numbers % length


def video_starts(
  length: int,
  count: int,
  step: float,
  views: int,
  rng: np.random.Generator | None,
  late: bool = False,
) -> list[int]:
  """Starts of `count` frames at a distance of `step` among `length`.

  In training the last possible start is the one whose last frame is the
  clip's; in evaluation a window is count * step long, as in DMVR, the reader
  of the public AV-MAE code. `late`: see `starts`.
  """
  if rng is not None:
    return starts(length, math.floor((count - 1) * step) + 1, views, rng)
  return starts(length, max(round(count * step), 1), views, None, late)


def _aligned(length, count, video_time, rng):
  del rng
  return min(video_time, max(length - count, 0))


def _wrap(length, count, video_time, rng):
  del length, count, rng
  return video_time


def _independent(length, count, video_time, rng):
  del video_time
  return starts(length, count, 1, rng)[0]


AUDIO_STARTS = {
  "aligned": _aligned,
  "wrap": _wrap,
  "independent": _independent,
}


def audio_start(
  mode: str,
  length: int,
  count: int,
  video_time: int | None,
  rng: np.random.Generator,
) -> int:
  """First sample of the sound in training.

  Args:
    mode: see `data.audio.start` in avjax/config.py.
    length: samples in the clip.
    count: samples wanted.
    video_time: sample at which the frames start; None = there are none, the
      start is drawn (so does the public code for sound alone).
    rng: draws the start where it is drawn.
  """
  draw = lookup(AUDIO_STARTS, mode, "value of data.audio.start")
  if video_time is None:
    draw = _independent
  return draw(length, count, video_time, rng)


def cut(
  waveform: Int16[np.ndarray, "s"], start: int, out: Int16[np.ndarray, "s2"],
  wrap: bool = False,
) -> None:  # fmt: skip
  """Copies samples from `start` into `out`; zeros, or a new turn, follow."""
  if wrap:
    out[:] = np.take(waveform, np.arange(start, start + len(out)), mode="wrap")
    return
  part = waveform[start : start + len(out)]
  out[: len(part)] = part
  out[len(part) :] = 0


def crop_box(
  height: int,
  width: int,
  *,
  resize: int,
  size: int,
  jitter: tuple[float, float] = (1.0, 1.0),
  random: bool = False,
  rng: np.random.Generator | None = None,
) -> Crop:
  """The part of a picture that becomes `size` x `size`.

  The picture is thought of as scaled so that its short side is `resize` (0 =
  as it is), height and width further by factors drawn apart from `jitter`,
  neither side below `size`; then a square is cut from it.

  Args:
    height: of the picture.
    width: of the picture.
    resize: short side before the crop.
    size: of the crop.
    jitter: lowest and highest factor.
    random: draw the place of the crop, else it is the centre.
    rng: None = neither factors nor place are drawn.
  """
  scale = resize / min(height, width) if resize else 1.0
  factors = (1.0, 1.0)
  if rng is not None and tuple(jitter) != (1.0, 1.0):
    factors = rng.uniform(jitter[0], jitter[1], 2)
  edges = []
  for side, factor in zip((height, width), factors, strict=True):
    scaled = max(round(side * scale * factor), size)
    spare = scaled - size
    place = spare // 2
    if rng is not None and random:
      place = int(rng.integers(0, spare + 1))
    edges += [
      round(place * side / scaled),
      max(round((place + size) * side / scaled), 1),
    ]
  return Crop(*edges)
