"""The eighteen objects of `av_demo`, drawn with OpenCV.

An object is drawn in its own coordinates, about -1..1 with y downwards, through
a `Pen` that holds an affine map to pixels; so every motion is a sequence of
maps. `beat` is 1 at an onset of the sound and falls to 0 until the next one: it
opens mouths, presses keys and lights lamps.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import cv2
import numpy as np

COLOURS: dict[str, tuple[int, int, int]] = {
  "red": (206, 44, 44),
  "orange": (238, 138, 30),
  "yellow": (240, 208, 60),
  "green": (52, 158, 66),
  "blue": (48, 98, 208),
  "purple": (142, 66, 178),
  "brown": (138, 88, 46),
  "white": (236, 236, 232),
}

INK = (26, 24, 30)
CREAM = (250, 244, 222)
STEEL = (164, 172, 182)

_SHIFT = 4  # fractional bits of OpenCV's coordinates
_ANGLES = np.linspace(0, 2 * np.pi, 25)[:-1]
_CIRCLE = np.stack([np.cos(_ANGLES), np.sin(_ANGLES)], 1)


class Pen:
  """Anti-aliased shapes, in an object's coordinates, on an RGB picture."""

  def __init__(self, image: np.ndarray, to_pixels: np.ndarray):
    """`to_pixels` [2, 3] maps an object's (x, y, 1) to pixels."""
    self.image = image
    self.matrix = to_pixels[:, :2].T * (1 << _SHIFT)
    self.offset = to_pixels[:, 2] * (1 << _SHIFT)
    self.scale = math.sqrt(abs(np.linalg.det(to_pixels[:, :2])))

  def _map(self, points) -> np.ndarray:
    where = np.asarray(points, float) @ self.matrix + self.offset
    return np.rint(where).astype(np.int32)

  def shape(self, points, colour, edge: bool = True) -> None:
    """A filled polygon, outlined in ink if `edge`."""
    where = self._map(points)
    cv2.fillPoly(self.image, [where], colour, cv2.LINE_AA, _SHIFT)
    if edge:
      width = 2 if self.scale > 30 else 1
      cv2.polylines(self.image, [where], True, INK, width, cv2.LINE_AA, _SHIFT)

  def oval(self, x, y, rx, ry, colour, edge: bool = True) -> None:
    """A filled ellipse about (x, y)."""
    self.shape(_CIRCLE * (rx, ry) + (x, y), colour, edge)

  def box(self, x0, y0, x1, y1, colour, edge: bool = True) -> None:
    """A filled rectangle."""
    self.shape(((x0, y0), (x1, y0), (x1, y1), (x0, y1)), colour, edge)

  def line(self, points, colour, width: float) -> None:
    """An open line, `width` in the object's units, at least a pixel."""
    pixels = max(int(round(width * self.scale)), 1)
    where = self._map(points)
    cv2.polylines(
      self.image, [where], False, colour, pixels, cv2.LINE_AA, _SHIFT
    )


@dataclasses.dataclass(frozen=True)
class Paint:
  """Main colour of an object and two shades of it."""

  base: tuple[int, int, int]
  dark: tuple[int, int, int]
  light: tuple[int, int, int]


def paint(rgb: tuple[int, int, int]) -> Paint:
  """Shades of a colour."""
  return Paint(
    rgb,
    tuple(int(0.6 * c) for c in rgb),
    tuple(int(0.55 * c + 0.45 * 255) for c in rgb),
  )


# --- Objects: (pen, paint, beat) -> None.


def viol(pen, p, beat):
  """Waisted body, neck and a bow or hand that moves across the strings."""
  pen.box(-0.07, -1.0, 0.07, -0.1, INK, False)
  pen.oval(0, -1.0, 0.13, 0.12, p.dark)
  pen.oval(0, 0.02, 0.36, 0.3, p.base)
  pen.oval(0, 0.58, 0.47, 0.4, p.base)
  pen.oval(0, 0.04, 0.31, 0.25, p.base, False)
  pen.box(-0.24, 0.05, 0.24, 0.45, p.base, False)
  pen.oval(0, 0.36, 0.13, 0.13, INK, False)
  for x in (-0.035, 0.035):
    pen.line(((x, -0.95), (x, 0.75)), CREAM, 0.02)
  pen.box(-0.16, 0.7, 0.16, 0.8, INK, False)
  x = 0.45 - 0.6 * beat
  pen.line(((x - 0.55, 0.62), (x + 0.5, 0.2)), CREAM, 0.08)


def flute(pen, p, beat):
  """A slanted tube with holes that open and close."""
  pen.shape(((-1, 0.3), (0.95, -0.42), (1, -0.24), (-0.95, 0.5)), p.base)
  pen.shape(((-1.0, 0.3), (-0.72, 0.2), (-0.66, 0.4), (-0.95, 0.5)), p.light)
  for k in range(6):
    u = 0.25 + 0.125 * k
    closed = (k + int(beat * 5)) % 2 == 0
    pen.oval(
      -0.97 + 1.95 * u, 0.4 - 0.73 * u, 0.06, 0.06,
      INK if closed else CREAM, False,
    )  # fmt: skip
  reach = 0.1 + 0.25 * beat
  pen.line(((-1.0, 0.1), (-1.0 - reach, -0.1 - reach)), CREAM, 0.06)


def organ(pen, p, beat):
  """A row of pipes over a keyboard."""
  for k, height in enumerate((0.55, 0.8, 1.0, 0.8, 0.55)):
    x = -0.72 + 0.36 * k
    pen.box(x - 0.14, -height, x + 0.14, 0.3, p.light if k % 2 else p.base)
    pen.oval(x, 0.12, 0.07, 0.05, INK, False)
  pen.box(-0.98, 0.3, 0.98, 0.9, p.dark)
  for k in range(7):
    x = -0.84 + 0.24 * k
    down = 0.14 * beat if k % 3 == 0 else 0.0
    pen.box(x, 0.4 + down, x + 0.2, 0.72 + down, CREAM, False)


def drum(pen, p, beat):
  """A cylinder with lacing, and two sticks that come down."""
  pen.oval(0, 0.6, 0.85, 0.28, p.dark)
  pen.box(-0.85, -0.15, 0.85, 0.6, p.base, False)
  pen.line(((-0.85, -0.15), (-0.85, 0.6)), INK, 0.03)
  pen.line(((0.85, -0.15), (0.85, 0.6)), INK, 0.03)
  zigzag = [(-0.84 + 0.28 * k, 0.12 if k % 2 else 0.72) for k in range(7)]
  pen.line(zigzag, CREAM, 0.05)
  pen.oval(0, -0.15, 0.85, 0.28, CREAM)
  for side in (-1, 1):
    lift = (1 - beat) * 0.55
    tip = (side * 0.2, -0.2 - lift)
    pen.line((tip, (side * 0.85, -0.75 - 0.4 * lift)), p.dark, 0.09)
    pen.oval(*tip, 0.09, 0.09, INK, False)


def bell(pen, p, beat):
  """A church bell with its clapper."""
  pen.oval(0, -0.86, 0.15, 0.14, p.dark)
  pen.oval(0.45 * (beat - 0.5), 0.72, 0.17, 0.17, INK, False)
  pen.shape(
    (
      (-0.22, -0.75), (0.22, -0.75), (0.42, -0.5), (0.5, 0.1), (0.66, 0.4),
      (0.85, 0.6), (-0.85, 0.6), (-0.66, 0.4), (-0.5, 0.1), (-0.42, -0.5),
    ),
    p.base,
  )  # fmt: skip
  pen.shape(
    ((-0.2, -0.6), (-0.08, -0.6), (-0.2, 0.3), (-0.4, 0.3)), p.light, False
  )
  pen.line(((-0.68, 0.38), (0.68, 0.38)), p.dark, 0.08)


BARS = ("red", "orange", "yellow", "green", "blue", "purple")


def glockenspiel(pen, p, beat):
  """A rack of bars, longest first, and a mallet."""
  pen.shape(((-1, -0.55), (1, -0.3), (1, 0.3), (-1, 0.7)), p.dark)
  for k in range(6):
    x, half = -0.82 + 0.33 * k, 0.62 - 0.07 * k
    pressed = 0.1 * beat if k == 2 else 0.0
    colour = p.light if k % 2 else p.base
    pen.box(x - 0.12, 0.05 - half + pressed, x + 0.12, 0.05 + half, colour)
  lift = 0.5 * (1 - beat)
  pen.line(((-0.14, -0.1 - lift), (0.75, -0.85 - 0.3 * lift)), CREAM, 0.07)
  pen.oval(-0.14, -0.1 - lift, 0.14, 0.14, INK, False)


def canine(pen, p, beat):
  """Head and body of a dog or wolf; the jaw drops and the tail wags."""
  pen.line(((-0.75, 0.1), (-1.0, -0.25 - 0.35 * beat)), p.dark, 0.16)
  pen.oval(-0.3, 0.25, 0.6, 0.3, p.base)
  for x in (-0.75, -0.45, 0.0, 0.2):
    pen.box(x, 0.35, x + 0.14, 0.95, p.base, False)
  pen.oval(0.45, -0.3, 0.36, 0.33, p.base)
  pen.shape(((0.2, -0.45), (0.16, -0.98), (0.48, -0.6)), p.dark)
  pen.shape(((0.48, -0.58), (0.68, -0.95), (0.75, -0.45)), p.dark)
  drop = 0.3 * beat
  pen.shape(
    ((0.6, -0.1), (1.0, -0.05 + drop), (0.62, 0.06 + drop * 0.4)), p.light
  )
  pen.shape(((0.6, -0.35), (1.06, -0.22), (1.04, -0.06), (0.6, -0.05)), p.base)
  pen.oval(1.02, -0.2, 0.09, 0.08, INK, False)
  pen.oval(0.5, -0.38, 0.07, 0.07, INK, False)


def bird(pen, p, beat):
  """A round bird in profile; wing and beak open."""
  pen.shape(((-0.6, 0.1), (-1.05, -0.1), (-1.0, 0.3)), p.dark)
  pen.line(((-0.1, 0.5), (-0.15, 0.95)), COLOURS["orange"], 0.07)
  pen.line(((0.12, 0.5), (0.12, 0.95)), COLOURS["orange"], 0.07)
  pen.oval(-0.1, 0.15, 0.62, 0.48, p.base)
  pen.oval(0.38, -0.38, 0.36, 0.34, p.base)
  gape = 0.22 * beat
  beak = COLOURS["orange"]
  pen.shape(((0.66, -0.48), (1.08, -0.42 - gape), (0.7, -0.34)), beak)
  pen.shape(((0.66, -0.36), (1.04, -0.3 + gape), (0.64, -0.22)), beak)
  pen.oval(0.48, -0.46, 0.08, 0.08, INK, False)
  up = 0.75 * beat
  pen.shape(
    ((0.15, 0.0), (-0.2, 0.3), (-0.8, 0.2 - up), (-0.4, -0.1 - up)), p.dark
  )


def cricket(pen, p, beat):
  """A long insect with jointed hind legs, feelers and moving wings."""
  for x in (-0.35, 0.1, 0.45):
    pen.line(((x, 0.2), (x - 0.1, 0.6), (x + 0.05, 0.75)), INK, 0.05)
  pen.shape(
    ((-1, 0.05), (-0.6, -0.12), (0.4, -0.15), (0.4, 0.3), (-0.5, 0.28)), p.base
  )
  pen.oval(0.6, 0.02, 0.27, 0.26, p.dark)
  pen.oval(0.68, -0.05, 0.07, 0.07, CREAM, False)
  pen.line(((0.72, -0.2), (0.85, -0.65), (1.05, -0.9)), INK, 0.04)
  pen.line(((0.6, -0.22), (0.5, -0.7), (0.62, -0.98)), INK, 0.04)
  lift = 0.45 * beat
  pen.shape(
    ((0.35, -0.12), (-0.85, -0.2 - lift), (-0.75, 0.02 - lift)), p.light
  )
  pen.line(((0.1, 0.15), (-0.42, -0.62), (-0.75, 0.7)), p.dark, 0.13)


def car(pen, p, beat):
  """A saloon with a roof lamp that lights up."""
  lamp = (255, 250, 190) if beat > 0.4 else (90, 96, 120)
  pen.box(-0.14, -0.72, 0.16, -0.5, lamp)
  pen.shape(
    ((-0.6, -0.05), (-0.4, -0.52), (0.35, -0.52), (0.62, -0.05)), p.light
  )
  pen.shape(
    ((-0.47, -0.06), (-0.34, -0.4), (-0.04, -0.4), (-0.04, -0.06)), INK, False
  )
  pen.shape(
    ((0.05, -0.06), (0.05, -0.4), (0.3, -0.4), (0.47, -0.06)), INK, False
  )
  pen.shape(
    ((-1, 0.35), (-1, 0.0), (-0.6, -0.08), (0.65, -0.08), (1, 0.08), (1, 0.35)),
    p.base,
  )
  pen.oval(0.93, 0.12, 0.07, 0.07, CREAM, False)
  for x in (-0.55, 0.55):
    pen.oval(x, 0.38, 0.24, 0.24, INK, False)
    pen.oval(x, 0.38, 0.1, 0.1, STEEL, False)


def train(pen, p, beat):
  """A steam engine with a cloud over its chimney."""
  for k, x in enumerate((0.55, 0.35, 0.05)):
    r = (0.06 + 0.07 * k) * (0.4 + beat)
    pen.oval(x, -0.75 - 0.12 * k, 1.3 * r, r, CREAM, False)
  pen.box(0.45, -0.6, 0.68, -0.1, INK, False)
  pen.box(-0.3, -0.15, 0.85, 0.38, p.base)
  pen.box(-0.95, -0.6, -0.25, 0.38, p.dark)
  pen.box(-0.8, -0.42, -0.4, -0.08, CREAM)
  pen.box(-1.02, -0.72, -0.18, -0.58, p.base)
  pen.shape(((0.85, 0.3), (1.1, 0.62), (0.8, 0.62)), STEEL)
  pen.box(-0.98, 0.36, 0.9, 0.48, INK, False)
  for x in (-0.7, -0.2, 0.25, 0.65):
    pen.oval(x, 0.58, 0.2, 0.2, p.light)
    pen.oval(x, 0.58, 0.06, 0.06, INK, False)


def ship(pen, p, beat):
  """A steamer: hull, cabins, funnel with a puff of steam."""
  pen.oval(0.12, -0.85, 0.16 * (0.5 + beat), 0.12 * (0.5 + beat), CREAM, False)
  pen.shape(((-0.1, -0.72), (0.2, -0.72), (0.24, -0.1), (-0.14, -0.1)), p.light)
  pen.box(-0.11, -0.58, 0.21, -0.44, INK, False)
  pen.box(-0.6, -0.22, 0.6, 0.1, CREAM)
  for x in (-0.4, -0.1, 0.2):
    pen.box(x, -0.12, x + 0.15, 0.02, INK, False)
  pen.shape(((-1.05, 0.08), (1.05, 0.05), (0.7, 0.7), (-0.7, 0.7)), p.base)
  pen.shape(
    ((-0.84, 0.45), (0.85, 0.45), (0.7, 0.7), (-0.7, 0.7)), p.dark, False
  )


def clock(pen, p, beat):
  """A round clock with two bells on top and hands that jump."""
  for side in (-1, 1):
    pen.line(((side * 0.4, 0.6), (side * 0.6, 0.98)), INK, 0.12)
    pen.oval(side * 0.5, -0.72, 0.28, 0.2, p.dark)
  pen.line(((0, -0.6), (0.3 * (beat - 0.5), -0.95)), INK, 0.1)
  pen.oval(0, 0.08, 0.8, 0.8, p.base)
  pen.oval(0, 0.08, 0.62, 0.62, CREAM)
  for k in range(4):
    x, y = math.cos(k * math.pi / 2), math.sin(k * math.pi / 2)
    pen.oval(0.52 * x, 0.08 + 0.52 * y, 0.05, 0.05, INK, False)
  turn = 0.5 * beat - 1.0
  end = (0.48 * math.cos(turn), 0.08 + 0.48 * math.sin(turn))
  pen.line(((0, 0.08), end), INK, 0.08)
  pen.line(((0, 0.08), (-0.28, -0.1)), INK, 0.1)


def drill(pen, p, beat):
  """A pistol-shaped power drill with a turning bit."""
  twist = 0.07 * math.sin(9 * beat)
  pen.shape(((0.6, -0.5 + twist), (1.1, -0.4), (0.6, -0.3 - twist)), STEEL)
  pen.box(0.42, -0.58, 0.64, -0.22, INK, False)
  pen.shape(((-0.8, -0.7), (0.44, -0.66), (0.44, -0.14), (-0.8, -0.1)), p.base)
  pen.shape(((-0.7, -0.1), (-0.25, -0.1), (-0.42, 0.7), (-0.85, 0.7)), p.dark)
  pen.box(-0.98, 0.62, -0.25, 0.95, INK, False)
  pen.oval(-0.2, 0.06, 0.1, 0.12, CREAM)
  for x in (-0.6, -0.4, -0.2):
    pen.line(((x, -0.55), (x, -0.25)), p.light, 0.07)


def blender(pen, p, beat):
  """A glass jug with a swirling drink on a motor base."""
  pen.box(-0.3, -1.0, 0.3, -0.82, INK, False)
  pen.shape(
    ((-0.55, -0.82), (0.55, -0.82), (0.36, 0.3), (-0.36, 0.3)), (206, 224, 232)
  )
  left, right = -0.3 - 0.3 * beat, -0.3 + 0.25 * beat
  pen.shape(
    ((-0.46, left), (0, -0.2), (0.46, right), (0.34, 0.28), (-0.34, 0.28)),
    p.base, False,
  )  # fmt: skip
  pen.line(((0.56, -0.65), (0.82, -0.5), (0.78, -0.1), (0.44, 0.0)), INK, 0.1)
  pen.shape(((-0.42, 0.3), (0.42, 0.3), (0.6, 0.95), (-0.6, 0.95)), p.dark)
  pen.oval(0, 0.65, 0.15, 0.15, CREAM)


def ball(pen, p, beat):
  """A striped ball, flattened on the beat."""
  flat = 1 - 0.22 * beat
  pen.oval(0, 0.85 * (1 - flat), 0.85 + 0.1 * beat, 0.85 * flat, p.base)
  bottom = 0.85 * (1 - flat)
  arc = np.stack([0.5 * _CIRCLE[:, 0], 0.84 * flat * _CIRCLE[:, 1] + bottom], 1)
  pen.shape(arc, CREAM, False)
  inner = arc * (0.36, 1.0)
  pen.shape(inner, p.dark, False)
  pen.oval(0, bottom - 0.62 * flat, 0.2, 0.12, p.light, False)


def tree(pen, p, beat):
  """A trunk with three crowns that lean over."""
  lean = 0.3 * beat
  pen.shape(
    (
      (-0.16, 1.0),
      (0.16, 1.0),
      (0.1 + lean * 0.4, 0.0),
      (-0.1 + lean * 0.4, 0),
    ),
    (112, 76, 44),
  )
  pen.oval(-0.4 + lean * 0.7, 0.05, 0.45, 0.38, p.dark)
  pen.oval(0.42 + lean * 0.7, 0.05, 0.45, 0.38, p.dark)
  pen.oval(lean, -0.42, 0.62, 0.55, p.base)
  for k in range(5):
    x, y = 0.4 * math.cos(2.4 * k), 0.35 * math.sin(2.4 * k)
    pen.oval(lean * 1.1 + x, -0.42 + y, 0.09, 0.09, p.light, False)


def sea(pen, p, beat):
  """Three rows of waves with crests."""
  x = np.linspace(-1.15, 1.15, 24)
  for k, colour in enumerate((p.light, p.base, p.dark)):
    height = 0.12 + 0.14 * beat
    y = -0.4 + 0.36 * k - height * np.cos(7.5 * (x + 0.3 * k) + 2.5 * beat)
    top = np.stack([x, y], 1)
    floor = 0.1 + 0.36 * k
    pen.shape([*top, (1.15, floor), (-1.15, floor)], colour, False)
    pen.line(top, CREAM, 0.07)


LOOKS: dict[str, Callable] = {
  look.__name__: look
  for look in (
    viol, flute, organ, drum, bell, glockenspiel, canine, bird, cricket, car,
    train, ship, clock, drill, blender, ball, tree, sea,
  )
}  # fmt: skip


@functools.cache
def hull(look: str) -> np.ndarray:
  """Convex outline [n, 2] of all that an object covers while it sounds."""
  canvas = np.zeros((240, 240, 3), np.uint8)
  grey = paint((255, 255, 255))
  to_pixels = np.array([[80.0, 0, 120], [0, 80.0, 120]])
  for beat in (0.0, 0.5, 1.0):
    LOOKS[look](Pen(canvas, to_pixels), grey, beat)
  points = cv2.findNonZero(canvas.max(2))
  return (cv2.convexHull(points)[:, 0] - 120) / 80
