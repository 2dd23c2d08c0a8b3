"""Pictures as uint8 arrays, drawn with matplotlib and no global state.

Every function makes its own `Figure`, so it may run in any thread and without
a display.
"""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import matplotlib.image
import numpy as np
from jaxtyping import Float, Int, UInt8
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

Picture = UInt8[np.ndarray, "_ _ 3"]
Number = float | int
Numbers = Any  # a sequence or array of numbers

DPI = 100
# Okabe and Ito's colours: told apart by colour-blind readers too.
COLOURS = (
  "#0072B2",
  "#E69F00",
  "#009E73",
  "#CC79A7",
  "#56B4E9",
  "#D55E00",
  "#000000",
)
POINTS = ("+", "o", "^", "s")  # of sorts of points
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
REMOVED = 160  # grey level of what is masked
LOG_SPAN = 20  # places that span more have a logarithmic axis


def to_array(figure: Figure) -> Picture:
  """Renders a figure."""
  canvas = FigureCanvasAgg(figure)
  canvas.draw()
  return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def save(path: str | pathlib.Path, picture: Picture) -> None:
  """Writes a PNG file."""
  matplotlib.image.imsave(str(path), picture, format="png")


def stack(pictures: Sequence[Picture]) -> Picture:
  """Pictures below each other, the narrower ones filled up with white."""
  width = max(picture.shape[1] for picture in pictures)
  filled = [
    np.pad(
      picture,
      ((0, 0), (0, width - picture.shape[1]), (0, 0)),
      constant_values=255,
    )
    for picture in pictures
  ]
  return np.concatenate(filled)


# ---------------------------------------------------------------- grids


def image_grid(
  rows: Mapping[str, Sequence[Picture]],
  *,
  columns: Sequence[str] = (),
  title: str = "",
  width: Number = 10.0,
) -> Picture:
  """Images in rows with a label each.

  Args:
    rows: label -> images of one size; rows may differ in length.
    columns: headings.
    title: above all.
    width: of the picture in inches; the height follows.
  """
  across = max(len(images) for images in rows.values())
  height, breadth = next(iter(rows.values()))[0].shape[:2]
  margin = 1.6  # inches, for the labels
  cell = min(1.4, (width - margin) / across)
  head = 0.3 * bool(title) + 0.25 * bool(columns) + 0.05
  size = (width, cell * height / breadth * len(rows) + head)
  figure = Figure(size, dpi=DPI)
  axes = figure.subplots(len(rows), across, squeeze=False)
  figure.subplots_adjust(
    left=margin / width,
    right=(margin + cell * across) / width,
    bottom=0.01,
    top=1 - head / figure.get_figheight(),
    wspace=0.03,
    hspace=0.03,
  )
  for axis in axes.flat:
    axis.set_axis_off()
  for line, (label, images) in zip(axes, rows.items(), strict=True):
    for axis, image in zip(line, images, strict=False):
      axis.imshow(image, interpolation="nearest", aspect="auto")
    _row_label(line[0], label)
  for axis, heading in zip(axes[0], columns, strict=False):
    axis.set_title(heading, fontsize=8, pad=3)
  _title(figure, title)
  return to_array(figure)


def spectrograms(
  rows: Mapping[str, Float[np.ndarray, "_ _"]],
  *,
  seconds: Number,
  title: str = "",
  width: Number = 10.0,
) -> Picture:
  """Log-mel spectrograms below each other, on the first one's colour scale.

  Args:
    rows: label -> [t f]; not-a-number cells are drawn grey (removed).
    seconds: length of the time axis.
    title: above all.
    width: of the picture in inches.
  """
  first = next(iter(rows.values()))
  low, high = np.nanpercentile(first, (1, 99.5))
  colours = matplotlib.colormaps["magma"].with_extremes(
    bad=(REMOVED / 255,) * 3
  )
  margin, foot = 1.6, 0.5
  head = 0.3 * bool(title) + 0.05
  figure = Figure((width, 1.25 * len(rows) + head + foot), dpi=DPI)
  axes = figure.subplots(len(rows), 1, squeeze=False, sharex=True)[:, 0]
  inches = figure.get_figheight()
  figure.subplots_adjust(
    left=margin / width,
    right=0.98,
    bottom=foot / inches,
    top=1 - head / inches,
    hspace=0.06,
  )
  for axis, (label, values) in zip(axes, rows.items(), strict=True):
    axis.imshow(
      values.T,  # mel upwards, time to the right
      origin="lower",
      aspect="auto",
      interpolation="nearest",
      extent=(0, seconds, 0, values.shape[1]),
      vmin=low,
      vmax=max(high, low + 1e-6),
      cmap=colours,
    )
    axis.set_yticks([])
    _row_label(axis, label)
  axes[-1].set_xlabel("seconds", fontsize=8)
  axes[-1].tick_params(labelsize=8)
  _title(figure, title)
  return to_array(figure)


def heat(values: Float[np.ndarray, "_ _"]) -> Picture:
  """A log-mel [t f] as an image: time to the right, mel upwards."""
  low, high = np.nanpercentile(values, (1, 99.5))
  scaled = (values.T[::-1] - low) / max(high - low, 1e-6)
  return matplotlib.colormaps["magma"](scaled, bytes=True)[..., :3].copy()


def _row_label(axis: Any, label: str) -> None:
  axis.text(
    0,
    0.5,
    f"{label}  ",
    transform=axis.transAxes,
    ha="right",
    va="center",
    fontsize=8,
  )


def _title(figure: Figure, title: str) -> None:
  if title:
    height = figure.get_figheight()
    figure.text(0.01, 1 - 0.08 / height, title, va="top", fontsize=9)


# ---------------------------------------------------------------- points


def scatter_panels(
  panels: Mapping[str, Mapping[str, Float[np.ndarray, "n 2"]]],
  groups: Int[np.ndarray, "n"],
  names: Sequence[str],
  *,
  title: str = "",
) -> Picture:
  """Points without axes, one panel beside the other, with one legend below.

  Args:
    panels: heading -> sort of point -> places. Each sort has its marker; the
      sort '' is always drawn as a disc and has no entry in the legend.
    groups: of each point, of every sort and panel; each has its colour.
    names: of the groups.
    title: above all.
  """
  across = min(3, len(panels))
  down = -(-len(panels) // across)
  entries = len(names) + len(next(iter(panels.values())))
  rows = -(-entries // (2 * across))
  size = (4.2 * across, 4.4 * down + 0.2 * rows + 0.4)
  figure = Figure(size, dpi=DPI, layout="constrained")
  figure.suptitle(title, fontsize=10)
  axes = figure.subplots(down, across, squeeze=False).flatten().tolist()
  colours = matplotlib.colormaps["tab10" if len(names) <= 10 else "tab20"]
  for axis in axes[len(panels) :]:
    axis.set_axis_off()
  for axis, (heading, sorts) in zip(axes, panels.items(), strict=False):
    axis.set_title(heading, fontsize=9)
    axis.set_xticks([])
    axis.set_yticks([])
    for (name, places), marker in zip(sorts.items(), POINTS, strict=False):
      marker = marker if name else "o"
      axis.scatter(
        places[:, 0], places[:, 1], c=colours(groups % colours.N), s=26,
        marker=marker, linewidths=1.1 if marker == "+" else 0.0, alpha=0.85,
      )  # fmt: skip
  entries = [
    Line2D([], [], ls="", marker=marker, color="0.2", label=name)
    for name, marker in zip(next(iter(panels.values())), POINTS, strict=False)
    if name
  ]
  entries += [
    Line2D([], [], ls="", marker="s", color=colours(i % colours.N), label=name)
    for i, name in enumerate(names)
  ]
  figure.legend(
    handles=entries, fontsize=8, frameon=False, ncols=2 * across,
    loc="outside lower center",
  )  # fmt: skip
  return to_array(figure)


# ---------------------------------------------------------------- curves


def line_plot(
  series: Mapping[str, tuple[Numbers, Numbers]],
  *,
  title: str = "",
  x_label: str = "",
  y_label: str = "",
  spread: Mapping[str, Numbers] | None = None,
  log_x: bool = False,
  log_y: bool = False,
  line: Number | None = None,
) -> Picture:
  """Curves with a legend.

  Args:
    series: label -> (x, y).
    title: above the axes.
    x_label: of the horizontal axis, with its unit.
    y_label: of the vertical axis, with its unit.
    spread: label -> half height of a band around that curve.
    log_x: logarithmic horizontal axis.
    log_y: logarithmic vertical axis.
    line: height of a dashed line, which the legend calls chance.
  """
  figure, axis = _axes(6.4, 4.0, title, x_label, y_label)
  for number, (label, (x, y)) in enumerate(series.items()):
    colour = COLOURS[number % len(COLOURS)]
    marker = MARKERS[number % len(MARKERS)] if len(x) <= 30 else None
    axis.plot(
      x, y, color=colour, marker=marker, markersize=4, lw=1.5, label=label
    )
    if spread is not None and label in spread:
      half = np.asarray(spread[label], float)
      middle = np.asarray(y, float)
      axis.fill_between(
        x, middle - half, middle + half, color=colour, alpha=0.2, lw=0
      )
  if log_x:
    axis.set_xscale("log")
  if log_y:
    axis.set_yscale("log")
  _reference(axis, line)
  if len(series) > 1 or line is not None:
    axis.legend(fontsize=8, frameon=False)
  return to_array(figure)


@dataclasses.dataclass(frozen=True)
class Curve:
  """Means and standard deviations by place; x of () draws the one y across."""

  x: Sequence[Number]
  y: Sequence[Number]
  spread: Sequence[Number]


def curve_panels(
  panels: Mapping[str, Mapping[str, Curve]],
  *,
  title: str = "",
  x_label: str = "",
  lines: Sequence[Number] = (),
) -> Picture:
  """Panels of curves side by side, with one legend below.

  A curve has the same colour in all panels. Its band and error bars are the
  standard deviation. Where the places span more than `LOG_SPAN` times, their
  axis is logarithmic.

  Args:
    panels: heading -> label -> curve.
    title: above all.
    x_label: of the horizontal axes, with its unit.
    lines: the score of guessing in each panel, drawn as chance; 0 is not. Far
      from the curves it is written into the heading, so that they stay tall.
  """
  across = {4: 2}.get(len(panels), min(3, len(panels)))
  down = -(-len(panels) // across)
  size = (max(6.4, 4.4 * across), 3.5 * down + 0.7)
  figure = Figure(size, dpi=DPI, layout="constrained")
  figure.suptitle(title, fontsize=10)
  axes = figure.subplots(down, across, squeeze=False).flatten().tolist()
  names = list(dict.fromkeys(n for panel in panels.values() for n in panel))
  for place, (heading, panel) in enumerate(panels.items()):
    axis = axes[place]
    _dress(axis, heading, x_label, "")
    _ticks(axis, sorted({x for curve in panel.values() for x in curve.x}))
    for name, curve in panel.items():
      _curve(axis, name, curve, names.index(name))
    if place < len(lines) and lines[place]:
      _chance(axis, lines[place])
  for axis in axes[len(panels) :]:
    axis.set_axis_off()
  _legend_below(figure, axes, size[0])
  return to_array(figure)


def _curve(axis: Any, label: str, curve: Curve, number: int) -> None:
  colour = COLOURS[number % len(COLOURS)]
  order = np.argsort(np.asarray(curve.x, float), kind="stable")
  y, spread = np.asarray(curve.y, float), np.asarray(curve.spread, float)
  if not len(curve.x):
    axis.axhline(y[0], color=colour, ls="-.", lw=1.5, label=label)
    axis.axhspan(
      y[0] - spread[0], y[0] + spread[0], color=colour, alpha=0.1, lw=0
    )
    return
  x, y, spread = np.asarray(curve.x, float)[order], y[order], spread[order]
  axis.errorbar(
    x, y, np.where(spread > 0, spread, np.nan), color=colour, lw=1.5,
    marker=MARKERS[number % len(MARKERS)], markersize=5, elinewidth=0.8,
    capsize=2, label=label,
  )  # fmt: skip
  axis.fill_between(x, y - spread, y + spread, color=colour, alpha=0.12, lw=0)


def _ticks(axis: Any, places: Sequence[Number]) -> None:
  """The places themselves where they are few."""
  if places and places[0] > 0 and places[-1] > LOG_SPAN * places[0]:
    axis.set_xscale("log")
    axis.minorticks_off()
  if 0 < len(places) <= 10:
    axis.set_xticks(places, [f"{place:g}" for place in places])


def _chance(axis: Any, height: Number) -> None:
  low, high = axis.get_ylim()
  if low - (high - low) <= height <= high + (high - low):
    _reference(axis, height)
  else:
    heading = f"{axis.get_title()} (chance {height:.3g})"
    axis.set_title(heading, fontsize=10)


def bar_plot(
  labels: Sequence[str],
  series: Mapping[str, Sequence[tuple[Number, Number]]],
  *,
  title: str = "",
  y_label: str = "",
  line: Number | Sequence[Number] | None = None,
) -> Picture:
  """Groups of bars, one group per label and one bar per series.

  Args:
    labels: of the groups.
    series: label -> (height, half length of its error bar) per group; a height
      that is not a number leaves a gap.
    title: above the axes.
    y_label: of the vertical axis, with its unit.
    line: height of a dashed line, which the legend calls chance; or one
      height per series, drawn in the series' colour.
  """
  width = max(6.4, 1.5 + 0.35 * len(labels) * (len(series) + 1))
  figure, axis = _axes(width, 4.4, title, "", y_label)
  places = np.arange(len(labels), dtype=float)
  breadth = 0.8 / max(1, len(series))
  for number, (label, values) in enumerate(series.items()):
    heights, errors = np.asarray(values, float).reshape(-1, 2).T
    axis.bar(
      places + (number - (len(series) - 1) / 2) * breadth,
      np.nan_to_num(heights),
      breadth * 0.92,
      yerr=np.where(errors > 0, errors, np.nan),
      color=COLOURS[number % len(COLOURS)],
      error_kw={"lw": 1, "capsize": 2},
      label=label,
    )
  longest = max((len(label) for label in labels), default=0)
  slanted = longest * 0.08 * len(labels) > width - 1.5
  axis.set_xticks(places, labels, rotation=30 if slanted else 0)
  if slanted:
    for text in axis.get_xticklabels():
      text.set_ha("right")
  if isinstance(line, Sequence):
    _references(axis, line)
  else:
    _reference(axis, line)
  if len(series) > 1 or line is not None:
    _legend_below(figure, [axis], width)
  return to_array(figure)


def _axes(
  width: Number, height: float, title: str, x_label: str, y_label: str
) -> tuple[Figure, Any]:
  figure = Figure((width, height), dpi=DPI, layout="constrained")
  axis = figure.subplots()
  _dress(axis, title, x_label, y_label)
  return figure, axis


def _dress(axis: Any, title: str, x_label: str, y_label: str) -> None:
  axis.set_title(title, fontsize=10)
  axis.set_xlabel(x_label, fontsize=9)
  axis.set_ylabel(y_label, fontsize=9)
  axis.tick_params(labelsize=8)
  axis.spines[["top", "right"]].set_visible(False)
  axis.grid(axis="y", alpha=0.3, lw=0.6)
  axis.set_axisbelow(True)


def _reference(axis: Any, line: Number | None) -> None:
  if line is not None:
    axis.axhline(line, color="0.4", ls="--", lw=1, label="chance")


def _legend_below(figure: Figure, axes: Sequence[Any], width: Number) -> None:
  """Under the axes: bars leave no room that is surely free. Chance is last."""
  shown: dict[str, Any] = {}
  for axis in axes:
    shown |= dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
  names = sorted(shown, key=lambda name: name == "chance")
  entry = max(len(name) for name in names) * 0.07 + 0.6  # inches
  figure.legend(
    [shown[name] for name in names],
    names,
    fontsize=8,
    frameon=False,
    loc="outside lower center",
    ncols=min(6, max(1, int(width / entry))),
  )


def _references(axis: Any, heights: Sequence[Number]) -> None:
  """A line per series; lines of one height take turns in their dashes."""
  for number, height in enumerate(heights):
    same = [n for n, other in enumerate(heights) if other == height]
    turn, dash = same.index(number), 4.0
    # Alone, a line leaves gaps too.
    gaps = dash * max(1, len(same) - 1)
    axis.axhline(
      height,
      color=COLOURS[number % len(COLOURS)],
      ls=(-turn * dash, (dash, gaps)),
      lw=1.5,
    )
  # The legend's entry: the colours are those of the bars.
  axis.plot([], [], color="0.4", ls="--", label="chance")
