"""Queries of a retrieval with what they found, in rows of framed pictures."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
from jaxtyping import Float, Int
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from avjax import plots
from avjax.data import audio, example, records

FOUND = 5
SIDE = 160  # pixels of a picture
LETTERS = 24  # of a name in a line
# Frames of the query's own item and of others with the same main class.
OWN, SAME_CLASS = plots.COLOURS[2], plots.COLOURS[1]
LEGEND = "green: its own, orange: another of its class"

WORDS = {
  "a2v": ("sound asks, pictures answer", "the sound"),
  "v2a": ("picture asks, sounds answer (their pictures below)", "the picture"),
}


@dataclasses.dataclass(frozen=True)
class Cell:
  """An image with a line or two below it; `frame` is a colour, '' = none."""

  image: plots.Picture
  text: str = ""
  frame: str = ""


class Clips:
  """Pictures and names of clips of a built split.

  Args:
    split: records of the split.
    data: `config.data`.
  """

  def __init__(self, split: records.Split, data: Any):
    self._split, self._data = split, data
    self._cutter = example.Cutter(data)
    self._cutter.data["heads"] = ()
    self._classes = split.metadata.get("classes", {}).get("label", ())

  def name(self, number: int) -> str:
    """Its main class, else its id; shortened."""
    main = self.main_class(number)
    if main >= 0 and len(self._classes):
      return shortened(str(self._classes[main]))
    return shortened(str(self._split.column("id")[number]))

  def main_class(self, number: int) -> int:
    """The number of its main class; negative = none."""
    ends = self._split.column("label_ends")
    start = int(ends[number - 1]) if number else 0
    labels = self._split.column("label")[start : ends[number]]
    return int(labels[0]) if len(labels) else -1

  def show(self, number: int) -> tuple[plots.Picture, plots.Picture]:
    """(spectrogram, frame) as evaluation sees the clip; grey = not there."""
    data = self._cutter.data
    shapes = example.shapes(data, 1, train=False)
    batch = {
      key: np.zeros(shape, kind) for key, (shape, kind) in shapes.items()
    }
    record = self._split[number]
    clip = example.from_record(record, data["modality"], ())
    self._cutter.cut(clip, batch, 0, None)
    sound = frame = np.full((2, 2, 3), plots.REMOVED, np.uint8)
    if batch["has_video"][0] and "frames" in batch:
      frame = batch["frames"][0, batch["frames"].shape[1] // 2]
    if batch["has_audio"][0] and "waveform" in batch:
      rate = data["audio"]["rate"]
      mel = audio.fbank(batch["waveform"][0], self._data.fbank, rate, np)
      sound = plots.heat(mel)
    return _resize(sound, SIDE // 2), _resize(frame, SIDE)


def draw(
  way: str,
  queries: Float[np.ndarray, "b d"],
  gallery: Float[np.ndarray, "b d"],
  rank: Float[np.ndarray, "b"],
  numbers: Int[np.ndarray, "b"],
  clips: Clips,
  title: str,
  *,
  count: int,
) -> plots.Picture:
  """Rows of queries: the query, the first `FOUND` of the gallery, its own.

  Args:
    way: 'a2v' or 'v2a'.
    queries: embeddings.
    gallery: embeddings; item i belongs to query i.
    rank: of item i for query i, from 1.
    numbers: of the clips in the split.
    clips: where the pictures come from.
    title: above all.
    count: queries at each end, at most.
  """
  own = np.einsum("bd,bd->b", queries, gallery)
  # Of equal ranks the more similar pair comes first.
  order = np.lexsort((-np.nan_to_num(own), rank))
  ends = min(count, len(order))
  chosen = list(dict.fromkeys([*order[:ends], *order[len(order) - ends :]]))
  rows = []
  for place, query in enumerate(chosen):
    end = "best" if place < ends else "worst"
    label = f"{end}\nrank {rank[query]:g}\nof {len(gallery)}"
    similar = gallery @ queries[query]
    cells = [
      asking(way, clips, int(numbers[query])),
      *answers(way, similar, int(query), numbers, clips, top=FOUND, own=True),
    ]
    rows.append((label, cells))
  words, first = WORDS[way]
  columns = [first, *(f"{k + 1}." for k in range(min(FOUND, len(gallery))))]
  if any(len(cells) > len(columns) for _, cells in rows):
    columns.append("its own")
  return cell_grid(rows, columns=columns, title=f"{title}: {words}; {LEGEND}")


def asking(way: str, clips: Clips, number: int) -> Cell:
  """The query: the spectrogram of a2v, the frame of v2a."""
  sound, frame = clips.show(number)
  text = f"{clips.name(number)}\n"
  if way == "a2v":
    return Cell(_resize(sound, SIDE), text)
  return Cell(np.concatenate([np.full_like(sound, 255), frame]), text)


def answers(
  way: str,
  similar: Float[np.ndarray, "b"],
  query: int,
  numbers: Int[np.ndarray, "b"],
  clips: Clips,
  *,
  top: int,
  own: bool,
) -> list[Cell]:
  """What a query finds, with the similarities, framed where right.

  Args:
    way: 'a2v' or 'v2a'.
    similar: each item's similarity to the query.
    query: number of its own item among them.
    numbers: of the items in the split.
    clips: where the pictures come from.
    top: how many.
    own: whether its own item follows where it is not among them.
  """
  similar = np.where(np.isnan(similar), np.inf, similar)
  # Stable, and of equal ones the true item first, as ranks count.
  true = np.arange(len(similar)) != query
  shown = list(np.lexsort((true, -similar))[:top])
  if own and query not in shown:
    shown.append(query)
  wanted = clips.main_class(int(numbers[query]))
  cells = []
  for item in shown:
    number = int(numbers[item])
    same = clips.main_class(number) == wanted >= 0
    frame = OWN if item == query else SAME_CLASS * same
    text = f"{clips.name(number)}\n{similar[item]:.3f}"
    sound, image = clips.show(number)
    if way == "v2a":
      image = np.concatenate([sound, image])
    cells.append(Cell(image, text, frame))
  return cells


def shortened(text: str) -> str:
  """At most `LETTERS` of it."""
  return text if len(text) <= LETTERS else text[: LETTERS - 1] + "…"


def _resize(picture: np.ndarray, height: int) -> np.ndarray:
  size = (SIDE, height)
  return cv2.resize(picture, size, interpolation=cv2.INTER_AREA)


# ---------------------------------------------------------------- cells


def cell_grid(
  rows: Sequence[tuple[str, Sequence[Cell]]],
  *,
  columns: Sequence[str] = (),
  title: str = "",
  breaks: Sequence[int] = (1,),
) -> plots.Picture:
  """Images with captions in rows with a label each.

  Args:
    rows: a label and cells each, all with images of the first one's
      proportions; rows may differ in length.
    columns: headings.
    title: above all.
    breaks: columns that a line sets apart from those before them.
  """
  across = max(len(cells) for _, cells in rows)
  first = rows[0][1][0].image
  cell, gap, text = 1.7, 0.12, 0.42  # inches
  tall = cell * first.shape[0] / first.shape[1]
  longest = max(len(t) for label, _ in rows for t in label.split("\n"))
  margin = max(1.15, 0.16 + 0.08 * longest)
  head = 0.34 * bool(title) + 0.26 * bool(columns) + 0.05
  width = margin + across * (cell + gap) + gap * len(breaks)
  height = head + len(rows) * (tall + text)

  def left(place: int) -> float:
    passed = sum(place >= start for start in breaks)
    return margin + place * (cell + gap) + gap * passed

  figure = Figure((width, height), dpi=plots.DPI)
  for line, (label, cells) in enumerate(rows):
    top = height - head - line * (tall + text)
    figure.text(
      0.08 / width, (top - tall / 2) / height, label, va="center", fontsize=9,
      parse_math=False,
    )  # fmt: skip
    for place, item in enumerate(cells):
      box = (left(place), top - tall, cell, tall)
      inches = (width, height, width, height)
      axis = figure.add_axes([x / y for x, y in zip(box, inches, strict=True)])
      _draw_cell(axis, item)
  above = (height - head + 0.05) / height
  for place, heading in enumerate(columns):
    middle = (left(place) + cell / 2) / width
    figure.text(
      middle, above, heading, ha="center", fontsize=9, parse_math=False
    )
  for start in breaks:
    x = (left(start) - gap) / width
    ends = (0.01, 1 - (head - 0.2) / height)
    figure.add_artist(Line2D((x, x), ends, color="0.7", lw=1))
  y = 1 - 0.08 / height
  figure.text(0.01, y, title, va="top", fontsize=9, parse_math=False)
  return plots.to_array(figure)


def _draw_cell(axis: Any, item: Cell) -> None:
  axis.imshow(item.image, interpolation="bilinear", aspect="auto")
  axis.set_xticks([])
  axis.set_yticks([])
  axis.spines[:].set_visible(bool(item.frame))
  axis.spines[:].set(color=item.frame or "0", linewidth=5)
  axis.text(
    0.5,
    -0.03,
    item.text,
    transform=axis.transAxes,
    ha="center",
    va="top",
    fontsize=8,
    color=OWN if item.frame == OWN else "0",
    fontweight="bold" if item.frame == OWN else "normal",
    parse_math=False,
  )
