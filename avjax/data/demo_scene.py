"""The scenes of `av_demo`: motions in time with the sound, boxes, frames."""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import cv2
import numpy as np
from jaxtyping import Float, UInt8

from avjax.data import demo_draw

SIZE = 112  # pixels, both sides
FPS = 25


@dataclasses.dataclass(frozen=True)
class Actor:
  """An object in the picture.

  Attributes:
    name: its class.
    look: a key of demo_draw.LOOKS.
    colour: a key of demo_draw.COLOURS.
    x, y: centre of its place, pixels.
    half: half its size, pixels.
    mirrored: faces left.
    verb: a key of MOTIONS, '' = stands still all the time.
    onsets: seconds at which it sounds; empty = silent.
    start, end: of its event, seconds.
  """

  name: str
  look: str
  colour: str
  x: float
  y: float
  half: float
  mirrored: bool
  verb: str = ""
  onsets: tuple[float, ...] = ()
  start: float = 0.0
  end: float = 0.0


# --- Motions: (phase, since) -> shift x and y [of the half size], angle, scale.
# `phase` grows by 1 from onset to onset, `since` is seconds from the latest.


def _swings(phase, since):
  return 0, 0, 0.55 * np.cos(np.pi * phase), 1


def _bounces(phase, since):
  return 0, -2.8 * (phase % 1) * (1 - phase % 1), 0, 1


def _shakes(phase, since):
  wobble = np.exp(-since / 0.25) * np.cos(2 * np.pi * 8 * since)
  return 0.22 * wobble, 0, 0.05 * wobble, 1


def _spins(phase, since):
  return 0, 0, np.pi * phase - 0.4 * np.sin(2 * np.pi * phase), 1


def _slides(phase, since):
  return 0.75 * (2 * np.abs((phase / 2) % 2 - 1) - 1), 0, 0, 1


def _pulses(phase, since):
  return 0, 0, 0, 0.85 + 0.4 * np.exp(-since / 0.15)


def _rocks(phase, since):
  return 0, 0, 0.35 * np.cos(np.pi * phase), 1


def _rises(phase, since):
  return 0, 0.6 * np.cos(np.pi * phase / 1.5), 0, 1


# Motion, and the height that stays in place (-1 = top, 1 = bottom).
MOTIONS: dict[str, tuple[Callable, float]] = {
  "swings": (_swings, -1.0),
  "bounces": (_bounces, 1.0),
  "shakes": (_shakes, 0.0),
  "spins": (_spins, 0.0),
  "slides": (_slides, 0.0),
  "pulses": (_pulses, 0.0),
  "rocks": (_rocks, 1.0),
  "rises": (_rises, 0.0),
}


def _timing(actor: Actor, t: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Phase and seconds since the latest onset at times t.

  Before the event an object waits in its first pose, after it in its last.
  """
  if not actor.onsets:
    return np.zeros_like(t), np.full_like(t, 9.0)
  onsets = np.array([*actor.onsets, actor.end])
  phase = np.interp(t, onsets, np.arange(len(onsets)))
  k = np.searchsorted(onsets[:-1], t + 1e-9, side="right") - 1
  since = np.where(k >= 0, t - onsets[np.maximum(k, 0)], 9.0)
  return phase, np.where(t < actor.end, since, 9.0)


def beats(actor: Actor, t: Float[np.ndarray, "t"]) -> Float[np.ndarray, "t"]:
  """1 at each onset, falling to 0; 0 outside the event."""
  return np.exp(-_timing(actor, t)[1] / 0.14)


def poses(
  actor: Actor, t: Float[np.ndarray, "t"]
) -> Float[np.ndarray, "t 2 3"]:
  """Maps from the object's coordinates to pixels at times t (seconds)."""
  shift_x = shift_y = angle = np.zeros_like(t)
  scale, pivot = np.ones_like(t), 0.0
  if actor.verb:
    motion, pivot = MOTIONS[actor.verb]
    shift_x, shift_y, angle, scale = np.broadcast_arrays(
      *motion(*_timing(actor, t)), t
    )[:4]
  pivot *= np.abs(demo_draw.hull(actor.look)[:, 1]).max()
  sign = -1.0 if actor.mirrored else 1.0
  cos, sin = scale * np.cos(angle), scale * np.sin(angle)
  out = np.empty((len(t), 2, 3))
  out[:, 0, 0], out[:, 0, 1] = sign * cos, -sin
  out[:, 1, 0], out[:, 1, 1] = sign * sin, cos
  out[:, 0, 2] = shift_x + sin * pivot
  out[:, 1, 2] = shift_y + pivot - cos * pivot
  out *= actor.half
  out[:, :, 2] += (actor.x, actor.y)
  return out


def boxes(actor: Actor, t: Float[np.ndarray, "t"]) -> Float[np.ndarray, "t 4"]:
  """x0, y0, x1, y1 in 0..1 of the picture, cut at its edges, at times t."""
  outline = demo_draw.hull(actor.look)
  maps = poses(actor, t)
  where = np.einsum("tij,nj->tni", maps[:, :, :2], outline)
  where = (where + maps[:, None, :, 2]) / SIZE
  return np.clip(np.concatenate([where.min(1), where.max(1)], 1), 0, 1)


# --- Backgrounds: rng -> pattern [SIZE, SIZE] in 0..1.


@functools.cache
def _grid() -> tuple[np.ndarray, np.ndarray]:
  y, x = np.mgrid[:SIZE, :SIZE].astype(np.float32)
  return x, y


def _turned(rng: np.random.Generator) -> np.ndarray:
  """Pixels along a direction drawn at random."""
  x, y = _grid()
  angle = rng.uniform(0, np.pi)
  return np.cos(angle) * x + np.sin(angle) * y


def _smooth(rng, cells_x: int, cells_y: int) -> np.ndarray:
  """Random values on a coarse grid, enlarged."""
  coarse = rng.random((cells_y, cells_x), dtype=np.float32)
  return cv2.resize(coarse, (SIZE, SIZE), interpolation=cv2.INTER_CUBIC)


def _wave(u: np.ndarray) -> np.ndarray:
  """A square wave of period 1 with soft edges, 0..1."""
  return np.clip(0.5 + 2.5 * np.sin(2 * np.pi * u), 0, 1)


def _plain(rng):
  return _turned(rng) / (1.5 * SIZE) + 0.3


def _stripes(rng):
  return _wave(_turned(rng) / rng.uniform(9, 24))


def _checks(rng):
  x, y = _grid()
  period = rng.uniform(18, 40)
  return np.abs(_wave(x / period) - _wave(y / period))


def _bricks(rng):
  x, y = _grid()
  height = rng.uniform(9, 15)
  row = np.floor(y / height)
  across = x / (2.2 * height) + 0.5 * (row % 2)
  mortar = (across % 1 < 0.08) | (y / height % 1 < 0.16)
  tone = np.sin(12.9 * row + 78 * np.floor(across)) % 1
  return np.where(mortar, 1.0, 0.5 * tone)


def _dots(rng):
  x, y = _grid()
  turn = 2 * np.pi / rng.uniform(10, 20)
  return _wave(0.12 + 0.11 * (np.sin(turn * x) + np.sin(turn * y)))


def _clouds(rng):
  return 0.6 * _smooth(rng, 4, 5) + 0.4 * _smooth(rng, 11, 14)


def _grass(rng):
  return 0.7 * _smooth(rng, 56, 14) + 0.3 * _smooth(rng, 4, 4)


def _folds(rng):
  x, y = _grid()
  bend = 6 * np.sin(y / rng.uniform(15, 30))
  return 0.5 + 0.5 * np.sin(2 * np.pi * (x + bend) / rng.uniform(12, 22))


# Kind -> pattern and what a caption calls it.
BACKGROUNDS: dict[str, tuple[Callable, str]] = {
  "plain": (_plain, "a plain wall"),
  "stripes": (_stripes, "a striped wall"),
  "checks": (_checks, "a chequered wall"),
  "bricks": (_bricks, "a brick wall"),
  "dots": (_dots, "dotted wallpaper"),
  "clouds": (_clouds, "a cloudy sky"),
  "grass": (_grass, "tall grass"),
  "folds": (_folds, "a curtain"),
}


def background(
  rng: np.random.Generator, kind: str
) -> UInt8[np.ndarray, "h w 3"]:
  """A muted texture of two close colours, with grain."""
  pattern = BACKGROUNDS[kind][0](rng)[:, :, None]
  first = rng.uniform(75, 190) + rng.uniform(-28, 28, 3)
  second = first + rng.choice([-1, 1]) * rng.uniform(18, 50)
  image = first + (second - first) * pattern
  image += rng.normal(0, 4, (SIZE, SIZE, 1))
  return np.clip(image, 0, 255).astype(np.uint8)


def render_frames(
  rng: np.random.Generator, actors: Sequence[Actor], kind: str, seconds: float
) -> UInt8[np.ndarray, "t h w 3"]:
  """The frames of a clip.

  Args:
    rng: the clip's own generator.
    actors: drawn from the last to the first, so the first is in front.
    kind: a key of BACKGROUNDS.
    seconds: length of the clip.
  """
  t = np.arange(round(seconds * FPS)) / FPS
  frames = np.empty((len(t), SIZE, SIZE, 3), np.uint8)
  frames[:] = background(rng, kind)
  for actor in reversed(actors):
    rgb = np.array(demo_draw.COLOURS[actor.colour]) + rng.integers(-14, 15, 3)
    paint = demo_draw.paint(tuple(np.clip(rgb, 0, 255).tolist()))
    draw = demo_draw.LOOKS[actor.look]
    for frame, to_pixels, beat in zip(
      frames, poses(actor, t), beats(actor, t), strict=True
    ):
      draw(demo_draw.Pen(frame, to_pixels), paint, float(beat))
  return frames
