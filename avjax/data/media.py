"""Media files to frames and samples: any container that FFmpeg reads (PyAV).

Frames are chosen by their time stamps on a constant grid, so a variable frame
rate, a late start or a damaged stretch never shifts picture against sound.
"""

import contextlib
import dataclasses
import math
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import av
import librosa
import numpy as np
from jaxtyping import Float, Int16, UInt8

from avjax.errors import InputError, lookup

# How data sets are stored: frames/s of the variant `video`, and the number of
# frames of `frames10`.
VIDEO_RATE = 12.5
SPREAD = 10

# What becomes of several channels of sound.
CHANNELS = {
  "mean": lambda samples: samples.mean(axis=0, dtype=np.float64),
  "first": lambda samples: samples[0].astype(np.float64),
}

# Sound whose time stamps are off by less than this is taken as continuous:
# containers round them, and decoders count their own priming differently.
_TOLERANCE = 0.05  # seconds
_LATE = 0.1  # seconds after the start that need a second look
_EPSILON = 1e-6  # seconds


class Unreadable(InputError):
  """A media file that gives no clip.

  Attributes:
    reason: 'missing file', 'corrupt' or 'too short', as reports count them.
  """

  def __init__(self, reason: str, message: str):
    super().__init__(message)
    self.reason = reason


@dataclasses.dataclass(frozen=True)
class Limits:
  """What one call may decode; more is refused, never cut silently."""

  seconds: float = 3_600.0  # of the part that is read
  # Of one frame, in the file and stretched to square pixels.
  pixels: int = 8_192 * 8_192
  frames: int = 100_000  # returned
  gigabytes: float = 8.0  # of the frames that are held to be returned


@dataclasses.dataclass(frozen=True)
class Clip:
  """A part of a media file.

  Attributes:
    frames: RGB 0..255 on the grid start + i / frame_rate; None = no pictures.
    waveform: mono PCM at the asked rate; None = no sound.
    seconds: length of what was there, at most end - start.
    height, width: of the pictures in the file, upright; 0 = no pictures.
    frame_rate: average of the file, 0 = unknown or no pictures.
    audio_rate: of the file, 0 = no sound.
    notes: what was wrong with the file but did not stop the reading.
  """

  frames: UInt8[np.ndarray, "t h w 3"] | None
  waveform: Int16[np.ndarray, "s"] | None
  seconds: float
  height: int = 0
  width: int = 0
  frame_rate: float = 0.0
  audio_rate: int = 0
  notes: tuple[str, ...] = ()

  @property
  def damaged(self) -> bool:
    """Some part of the file could not be decoded."""
    return bool(self.notes)


def read_clip(
  path: str | pathlib.Path,
  *,
  start: float = 0.0,
  end: float | None = None,
  frame_rate: float = VIDEO_RATE,
  short_side: int = 256,
  audio_rate: int = 16_000,
  channels: str = "mean",
  tracks: str = "av",
  limits: Limits | None = None,
) -> Clip:
  """Reads seconds [start, end) of a media file, in one thread.

  Frames are the nearest in time to start + i / frame_rate, turned upright
  (display matrix) and stretched to square pixels. Channels become one, which
  soxr resamples. Nothing is padded: a file that ends early gives less.

  Args:
    path: a local file; never taken as a URL.
    start: seconds from the beginning of the file's own clock.
    end: None = to the end.
    frame_rate: frames a second in the result.
    short_side: pictures whose shorter side is longer are reduced to it; 0 =
      never.
    audio_rate: samples a second in the result.
    channels: name in CHANNELS: their mean, or the first one alone.
    tracks: which to decode: 'a', 'v' or 'av'.
    limits: the default ones if None.

  Raises:
    Unreadable: no such file, not a media file, nothing of it decodes, or
      nothing of it lies in the asked part.
    InputError: it exceeds `limits` (both numbers are named), or `channels` is
      unknown.
  """
  path, limits = pathlib.Path(path), limits or Limits()
  if end is not None and end <= start:
    raise InputError(f"{path}: start {start} s is not before end {end} s")
  if not path.is_file():
    raise Unreadable("missing file", f"{path} is not a file")
  part = _Part(path, start, math.inf if end is None else end - start, limits)
  mix = lookup(CHANNELS, channels, "channels")
  options = (frame_rate, short_side, audio_rate, mix, tracks)
  try:
    readers, notes = _read(part, options, seek=start > 0)
    if start > 0 and any(r.first > _LATE for r in readers):
      # A poor index led past the start, or a track begins late: look again.
      readers, notes = _read(part, options, seek=False)
  except (av.error.FFmpegError, UnicodeError) as error:
    raise Unreadable("corrupt", f"{path} cannot be read: {error}") from error
  return _clip(part, readers, notes)


def _read(part, options, *, seek):
  """One pass over the file: filled readers and notes."""
  # The prefix keeps names such as `concat:x` from being protocols.
  with av.open(f"file:{part.path}", metadata_errors="ignore") as container:
    readers = _readers(container, part, *options)
    notes = _decode(container, part, readers, seek)
  return list(readers.values()), notes


@dataclasses.dataclass(frozen=True)
class _Part:
  """Which part of which file; `seconds` may be infinite."""

  path: pathlib.Path
  start: float
  seconds: float
  limits: Limits

  def check(self, what: str, value: float | int) -> None:
    limit = getattr(self.limits, what)
    if value > limit:
      raise InputError(f"{self.path}: {value:g} {what}; the limit is {limit:g}")


def _readers(container, part, frame_rate, short_side, audio_rate, mix, tracks):
  """Readers by stream index, of the first stream of each kind."""
  # Streams that begin at, say, 1.4 s (MPEG-TS) share that origin.
  origin = max(container.start_time or 0, 0) / av.time_base + part.start
  readers: dict[int, Any] = {}
  pictures = [s for s in container.streams.video if not _is_cover(s)]
  if "v" in tracks and pictures:
    stream = pictures[0]
    part.check("pixels", stream.width * stream.height)
    readers[stream.index] = _Frames(
      stream, part, origin, frame_rate, short_side
    )
  if "a" in tracks and container.streams.audio:
    stream = container.streams.audio[0]
    readers[stream.index] = _Samples(stream, part, origin, audio_rate, mix)
  if not readers:
    raise Unreadable(
      "corrupt", f"{part.path} has none of the tracks {tracks!r}"
    )
  for reader in readers.values():
    reader.stream.codec_context.thread_type = "NONE"
    reader.stream.codec_context.thread_count = 1
  return readers


def _is_cover(stream: Any) -> bool:
  """A picture of a sound file's album, no video."""
  return bool(stream.disposition & av.stream.Disposition.attached_pic)


def _decode(container, part, readers, seek) -> tuple[str, ...]:
  """Feeds the readers; returns notes on what failed."""
  failures: dict[str, int] = {}
  if seek:
    # Half a second more: sound decoders need a frame or two to settle.
    target = max(part.start - 0.5, 0.0) * av.time_base
    with contextlib.suppress(av.error.FFmpegError):
      container.seek(int(target + max(container.start_time or 0, 0)))
  streams = [reader.stream for reader in readers.values()]
  for packet in _packets(container, streams, failures):
    reader = readers[packet.stream.index]
    if reader.done:
      if all(r.done for r in readers.values()):
        break
      continue
    try:
      frames = packet.decode()
    except av.error.EOFError:
      continue
    except av.error.FFmpegError:
      kind = packet.stream.type
      failures[kind] = failures.get(kind, 0) + 1
      continue
    for frame in frames:
      reader.add(frame)
  for reader in readers.values():
    reader.finish()
    kind = reader.stream.type
    failures[kind] = failures.get(kind, 0) + reader.failures
  return tuple(f"{n} x {kind} error" for kind, n in failures.items() if n)


def _packets(container, streams, failures) -> Iterator[Any]:
  """Packets until the end or until the container itself is broken."""
  packets = container.demux(*streams)
  while True:
    try:
      yield next(packets)
    except (StopIteration, av.error.EOFError):
      return
    except av.error.FFmpegError:
      failures["container"] = failures.get("container", 0) + 1
      # What the decoders still hold back belongs to the clip.
      for stream in streams:
        packet = av.Packet()
        packet.stream = stream
        yield packet
      return


class _Frames:
  """Chooses and converts the frames nearest to the grid."""

  def __init__(self, stream, part, origin, rate, short_side):
    self.stream, self.failures, self.done = stream, 0, False
    self.first = math.inf  # seconds from the start, of what was decoded first
    self.pictures: list[np.ndarray] = []
    self.height = self.width = 0
    self.seconds = 0.0
    self._part, self._origin, self._rate = part, origin, rate
    self._short_side = short_side
    self._last: Any = None  # the newest frame, not yet chosen for good
    self._time = 0.0
    self._converted: np.ndarray | None = None
    average = stream.average_rate or stream.base_rate
    self.frame_rate = float(average) if average else 0.0

  def add(self, frame: Any) -> None:
    self.failures += frame.is_corrupt
    usual = 1 / (self.frame_rate or 25.0)
    if frame.pts is None:
      time = self._time + usual if self._last else 0.0
    else:
      time = float(frame.pts * frame.time_base) - self._origin
    if self._last is None:
      self.first = time
      self._keep(frame, time)
      return
    if time <= self._time:
      return  # a broken stamp: frames come in the order of display
    self._choose((self._time + time) / 2)
    self._keep(frame, time)

  def finish(self) -> None:
    if self._last is None:
      return
    duration = float((self._last.duration or 0) * self._last.time_base)
    duration = duration or 1 / (self.frame_rate or 25.0)
    stop = self._time + duration
    self._choose(stop - 2 * _EPSILON)
    self.seconds = max(min(stop, self._part.seconds), 0.0)

  def result(self) -> dict[str, Any]:
    return {
      "frames": _stack(self.pictures) if self.pictures else None,
      "height": self.height,
      "width": self.width,
      "frame_rate": self.frame_rate,
    }

  def _keep(self, frame: Any, time: float) -> None:
    self._last, self._time, self._converted = frame, time, None
    self._part.check("seconds", time)
    self.done = self._next() >= self._part.seconds - _EPSILON

  def _next(self) -> float:
    return len(self.pictures) / self._rate

  def _choose(self, until: float) -> None:
    """Takes the newest frame for all grid points up to `until`."""
    while self._next() <= until + _EPSILON:
      if self._next() >= self._part.seconds - _EPSILON:
        return
      if self._converted is None:
        self._converted = self._convert(self._last)
      count = len(self.pictures) + 1
      self._part.check("frames", count)
      self._part.check("gigabytes", count * self._converted.nbytes / 1e9)
      self.pictures.append(self._converted)

  def _convert(self, frame: Any) -> UInt8[np.ndarray, "h w 3"]:
    self._part.check("pixels", frame.width * frame.height)
    turn = _turn(frame)
    if not self.height:
      aspect = float(self.stream.sample_aspect_ratio or 1)
      width = max(round(frame.width * aspect), 1)
      self._part.check("pixels", width * frame.height)
      size = (width, frame.height) if turn[0] else (frame.height, width)
      self.height, self.width = size
    scale = self._short_side / min(self.height, self.width)
    scale = min(scale, 1.0) if self._short_side else 1.0
    size = [max(round(n * scale), 1) for n in (self.height, self.width)]
    height, width = size[::-1] if turn[0] else size
    picture = frame.reformat(
      width=width, height=height, format="rgb24", interpolation="AREA"
    ).to_ndarray()
    return _upright(picture, turn)


def _stack(pictures: list[np.ndarray]) -> UInt8[np.ndarray, "t h w 3"]:
  """np.stack that empties its list, so that no two copies are held."""
  pictures.reverse()
  frames = np.empty((len(pictures), *pictures[0].shape), np.uint8)
  for frame in frames:
    frame[:] = pictures.pop()
  return frames


def _turn(frame: Any) -> tuple[bool, bool, bool]:
  """(swap axes, mirror rows, mirror columns) that set a frame upright.

  The display matrix maps stored to shown coordinates: x' = a x + c y,
  y' = b x + d y with 16.16 fixed point in the order a b u c d v x y w.
  """
  data = frame.side_data.get("DISPLAYMATRIX")
  if data is None:
    return False, False, False
  a, b, _, c, d = np.frombuffer(data, np.int32)[:5].tolist()
  if abs(b) + abs(c) > abs(a) + abs(d):
    return True, b < 0, c < 0
  return False, d < 0, a < 0


def _upright(picture, turn):
  swap, rows, columns = turn
  picture = picture.swapaxes(0, 1) if swap else picture
  picture = picture[::-1] if rows else picture
  picture = picture[:, ::-1] if columns else picture
  return np.ascontiguousarray(picture)


class _Samples:
  """Collects mono samples at the file's rate, gaps filled with silence."""

  def __init__(self, stream, part, origin, rate, mix):
    self.stream, self.failures, self.done = stream, 0, False
    self._mix = mix
    self.first = math.inf  # seconds from the start, of what was decoded first
    self._part, self._origin, self._target = part, origin, rate
    self._chunks: list[np.ndarray] = []
    self._count = 0
    self.rate = 0
    self.seconds = 0.0

  def add(self, frame: Any) -> None:
    self.failures += frame.is_corrupt
    mono = _mono(frame, self._mix)
    self.rate = self.rate or frame.sample_rate
    if frame.sample_rate != self.rate:  # the file changes its mind
      mono = librosa.resample(
        mono, orig_sr=frame.sample_rate, target_sr=self.rate
      )
    if frame.pts is not None:
      time = float(frame.pts * frame.time_base) - self._origin
      self.first = min(self.first, time)
      mono = self._place(mono, time)
    self._chunks.append(mono)
    self._count += len(mono)
    self._part.check("seconds", self._count / self.rate)
    self.done = self._count >= self._part.seconds * self.rate

  def _place(self, mono, time):
    """Cuts what lies before the start, fills what is missing before it."""
    offset = time * self.rate - self._count
    if self._count == 0 and offset < 0:
      return mono[round(-offset) :]
    if offset > (_TOLERANCE * self.rate if self._count else 0.5):
      self._part.check("seconds", time)
      self.failures += self._count > 0  # a gap
      self._chunks.append(np.zeros(round(offset), np.float32))
      self._count += round(offset)
    return mono

  def finish(self) -> None:
    if self.rate:
      self.seconds = min(self._count / self.rate, self._part.seconds)

  def result(self) -> dict[str, Any]:
    return {"waveform": self._waveform(), "audio_rate": self.rate}

  def _waveform(self) -> Int16[np.ndarray, "s"] | None:
    if not self._count:
      return None
    mono = np.concatenate(self._chunks)
    if self.rate != self._target:
      mono = librosa.resample(
        mono, orig_sr=self.rate, target_sr=self._target, res_type="soxr_hq"
      )
    if self._part.seconds < math.inf:
      mono = mono[: round(self._part.seconds * self._target)]
    scaled = np.rint(mono * 32_768.0)
    return np.clip(scaled, -32_768, 32_767).astype(np.int16)


def _mono(frame: Any, mix: Callable) -> Float[np.ndarray, "s"]:
  """One channel, in -1..1."""
  samples = frame.to_ndarray()
  if not frame.format.is_planar:
    samples = samples.reshape(-1, frame.layout.nb_channels).T
  if samples.dtype == np.uint8:
    samples = samples.astype(np.float32) / 128 - 1
  elif samples.dtype.kind == "i":
    samples = samples / float(-np.iinfo(samples.dtype).min)
  mono = mix(samples)
  # A broken stream may hold anything.
  return np.nan_to_num(mono, posinf=0.0, neginf=0.0).astype(np.float32)


def _clip(part: _Part, readers: list[Any], notes: tuple[str, ...]) -> Clip:
  """The readers' results as one clip."""
  values: dict[str, Any] = {}
  for reader in readers:
    values |= reader.result()
  if values.get("frames") is None and values.get("waveform") is None:
    if notes:
      raise Unreadable(
        "corrupt", f"{part.path}: nothing decodes ({', '.join(notes)})"
      )
    end = part.start + part.seconds
    raise Unreadable(
      "too short", f"{part.path} holds nothing in [{part.start:g}, {end:g}) s"
    )
  seconds = max(reader.seconds for reader in readers)
  return Clip(
    **{"frames": None, "waveform": None, **values},
    seconds=seconds,
    notes=notes,
  )


def spread(
  frames: Sequence[Any], variant: str, rate: float = VIDEO_RATE
) -> tuple[list[Any], float]:
  """Frames at `rate` a second -> those that a variant keeps, and their rate.

  `frames10` keeps those at i/10 of the clip, as the public CAV-MAE code does.
  """
  count = len(frames)
  if variant != "frames10" or not count:
    return list(frames), rate
  chosen = [frames[i * count // SPREAD] for i in range(SPREAD)]
  return chosen, rate * SPREAD / count
