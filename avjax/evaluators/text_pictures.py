"""Captions and clips that find each other, and captions that were generated."""

import textwrap
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from matplotlib.figure import Figure

from avjax import plots
from avjax.evaluators.retrieval_pictures import (
  FOUND,
  LEGEND,
  OWN,
  SAME_CLASS,
  Cell,
  Clips,
  cell_grid,
)
from avjax.text_ranking import Table

LABEL = 30  # letters of a line of a query
LETTERS = 44  # of a line of an answer
LINE = 0.15  # inches
ANSWERS = {"a": "sounds", "v": "pictures", "av": "clips"}


class Line(NamedTuple):
  """A text in a column; right = in the colour of what belongs to the clip."""

  text: str
  right: bool = False


class Row(NamedTuple):
  """A clip and texts of it, one list for each column."""

  label: str
  image: plots.Picture
  texts: Sequence[Sequence[Line]]


# ------------------------------------------------------------ one model


def draw_media(
  mode: str,
  table: Table,
  words: Sequence[str],
  number: Int[np.ndarray, "n"],
  clips: Clips,
  title: str,
  *,
  count: int,
) -> plots.Picture:
  """Captions and the first `FOUND` clips of each, then its own.

  Args:
    mode: of the method.
    table: of scores.
    words: of each text.
    number: of the clips in the split.
    clips: where the pictures come from.
    title: above all.
    count: captions at each end, at most.
  """
  rows = []
  ranks = table.ranks.forward
  for end, query in ends(ranks, table.text, count):
    scores = table.of_captions(np.array([query]))[0]
    own = np.arange(len(number)) == table.clip[query]
    shown = first(scores, own, FOUND).tolist()
    if table.clip[query] not in shown:
      shown.append(int(table.clip[query]))
    cells = [
      _answer(clips, number, item, int(table.clip[query]), float(scores[item]))
      for item in shown
    ]
    rank = f"{end}: rank {ranks[query]:g} of {len(number)}"
    asked = textwrap.wrap(words[table.text[query]], LABEL)
    rows.append(("\n".join([rank, "", *asked]), cells))
  columns = [f"{k + 1}." for k in range(min(FOUND, len(number)))]
  if any(len(cells) > len(columns) for _, cells in rows):
    columns.append("its own")
  title = f"{title}: captions ask, {ANSWERS[mode]} answer; {LEGEND}"
  return cell_grid(rows, columns=columns, title=title, breaks=())


def _answer(
  clips: Clips, number: np.ndarray, item: int, own: int, score: float
) -> Cell:
  """A clip, framed where it is right or of the right class."""
  wanted = clips.main_class(int(number[own]))
  same = clips.main_class(int(number[item])) == wanted >= 0
  frame = OWN if item == own else SAME_CLASS * same
  name = clips.name(int(number[item]))
  return Cell(shown(clips, int(number[item])), f"{name}\n{score:.3f}", frame)


def draw_texts(
  mode: str,
  table: Table,
  words: Sequence[str],
  number: Int[np.ndarray, "n"],
  clips: Clips,
  title: str,
  *,
  count: int,
) -> plots.Picture:
  """Clips and the first `FOUND` captions of each; see `draw_media`."""
  ranks = table.ranks.backward
  rows = []
  for end, clip in ends(ranks, np.arange(len(number)), count):
    image = shown(clips, int(number[clip]))
    name = clips.name(int(number[clip]))
    label = f"{end}: {name}\nrank {ranks[clip]:g}\nof {len(table.text)}"
    rows.append(Row(label, image, [answers(table, words, clip, FOUND)]))
  title = f"{title}: {ANSWERS[mode]} ask, captions answer"
  return text_grid(
    rows, columns=["captions found first; green: its own"], title=title
  )


# Name of a direction, with the mode in its place -> its picture.
WAYS = {"t2{}": draw_media, "{}2t": draw_texts}


# ------------------------------------------------------------ their parts


def ends(
  ranks: Float[np.ndarray, "c"], groups: Int[np.ndarray, "c"], count: int
) -> list[tuple[str, int]]:
  """('best' or 'worst', query), each of another group; `count` of both."""
  asked = np.flatnonzero(~np.isnan(ranks))
  order = asked[np.argsort(ranks[asked], kind="stable")]
  _, place = np.unique(groups[order], return_index=True)
  order = order[np.sort(place)]
  best = order[:count]
  worst = order[max(len(order) - count, len(best)) :]
  return [
    *(("best", int(k)) for k in best),
    *(("worst", int(k)) for k in worst),
  ]


def first(
  scores: Float[np.ndarray, "n"], own: np.ndarray, top: int
) -> Int[np.ndarray, "k"]:
  """The best of scores; of equal ones those that are right come first."""
  scores = np.where(np.isnan(scores), np.inf, scores)
  return np.lexsort((~own, -scores))[:top]


def answers(
  table: Table, words: Sequence[str], clip: int, top: int
) -> list[Line]:
  """The first different texts that a clip finds, then its own.

  Its best own one follows where none is among them. Each has its place among
  the different texts.
  """
  scores = table.of_clips(np.array([clip]))[0]
  order = first(scores, table.clip == clip, len(scores))
  texts, place = np.unique(table.text[order], return_index=True)
  texts = texts[np.argsort(place)]
  right = np.isin(texts, table.text[table.clip == clip])
  shown = list(range(min(top, len(texts))))
  if right.any() and not right[shown].any():
    shown.append(int(right.argmax()))
  return [Line(f"{k + 1}. {words[texts[k]]}", bool(right[k])) for k in shown]


def shown(clips: Clips, number: int) -> plots.Picture:
  """The spectrogram of a clip above its frame."""
  return np.concatenate(clips.show(number))


# ------------------------------------------------------------ texts in columns


def text_grid(
  rows: Sequence[Row], *, columns: Sequence[str], title: str = ""
) -> plots.Picture:
  """Clips with columns of texts beside them.

  Args:
    rows: each with one list of texts for each column.
    columns: headings.
    title: above all.
  """
  picture, gap, wide = 1.3, 0.15, 0.068 * LETTERS + 0.1  # inches
  longest = max(len(t) for row in rows for t in row.label.split("\n"))
  margin = max(1.15, 0.16 + 0.08 * longest)
  tall = picture * rows[0].image.shape[0] / rows[0].image.shape[1]
  blocks = [[_wrapped(lines) for lines in row.texts] for row in rows]
  most = [max(len(block) for block in row) for row in blocks]
  heights = [max(tall, LINE * lines) + gap for lines in most]
  head = 0.34 * bool(title) + 0.3
  width = margin + picture + gap + len(columns) * wide
  width = max(width, 0.08 * len(title))
  height = head + sum(heights)
  figure = Figure((width, height), dpi=plots.DPI)
  left = margin + picture + gap

  def write(x: float, y: float, text: str, **options: object) -> None:
    figure.text(x / width, y / height, text, parse_math=False, **options)

  write(0.1, height - 0.08, title, va="top", fontsize=9)
  for place, heading in enumerate(columns):
    y = height - head + 0.08
    write(left + place * wide, y, heading, fontsize=9, fontweight="bold")
  top = height - head
  for row, block, used in zip(rows, blocks, heights, strict=True):
    write(0.08, top - tall / 2, row.label, va="center", fontsize=9)
    box = (
      margin / width,
      (top - tall) / height,
      picture / width,
      tall / height,
    )
    axis = figure.add_axes(box)
    axis.imshow(row.image, interpolation="bilinear", aspect="auto")
    axis.set_axis_off()
    for place, lines in enumerate(block):
      for line, (text, right) in enumerate(lines):
        y = top - line * LINE
        style = {"color": OWN, "fontweight": "bold"} if right else {}
        write(left + place * wide, y, text, va="top", fontsize=8, **style)
    top -= used
  return plots.to_array(figure)


def _wrapped(lines: Sequence[Line]) -> list[Line]:
  """Lines that fit into a column, the later ones of each indented."""
  return [
    Line(part, right)
    for text, right in lines
    for part in textwrap.wrap(text, LETTERS, subsequent_indent="    ") or [""]
  ]
