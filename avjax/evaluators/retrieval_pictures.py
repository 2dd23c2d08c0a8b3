"""The best and the worst queries of a retrieval, with what they found."""

from typing import Any

import cv2
import numpy as np
from jaxtyping import Float, Int

from avjax import plots
from avjax.data import audio, example, records

FOUND = 5
SIDE = 160  # pixels of a picture
LETTERS = 24  # of a name in a line

WORDS = {
  "a2v": ("sound asks, pictures answer", "the sound"),
  "v2a": ("picture asks, sounds answer (their pictures below)", "the picture"),
}


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
    ends = self._split.column("label_ends")
    start = int(ends[number - 1]) if number else 0
    labels = self._split.column("label")[start : ends[number]]
    if len(labels) and labels[0] >= 0 and len(self._classes):
      text = str(self._classes[labels[0]])
    else:
      text = str(self._split.column("id")[number])
    return text if len(text) <= LETTERS else text[: LETTERS - 1] + "…"

  def show(self, number: int) -> tuple[plots.Picture, plots.Picture]:
    """(spectrogram, frame) as evaluation sees the clip; grey = not there."""
    data = self._cutter.data
    shapes = example.shapes(data, 1)
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
    similar = gallery @ queries[query]
    similar = np.where(np.isnan(similar), np.inf, similar)
    # Stable, and of equal ones the true item first, as ranks count.
    true = np.arange(len(similar)) != query
    first = np.lexsort((true, -similar))[:FOUND]
    label = f"{end}\nrank {rank[query]:g}\nof {len(gallery)}"
    cells = [_query(way, clips, int(numbers[query]))]
    for item in first:
      text = f"{clips.name(int(numbers[item]))}\n{similar[item]:.3f}"
      image = _answer(way, clips, int(numbers[item]))
      cells.append(plots.Cell(image, text, framed=bool(item == query)))
    if query not in first:
      text = f"{clips.name(int(numbers[query]))}\n{similar[query]:.3f}"
      image = _answer(way, clips, int(numbers[query]))
      cells.append(plots.Cell(image, text, framed=True))
    rows.append((label, cells))
  words, asking = WORDS[way]
  columns = [asking, *(f"{k + 1}." for k in range(min(FOUND, len(gallery))))]
  if any(len(cells) > len(columns) for _, cells in rows):
    columns.append("its own")
  return plots.cell_grid(rows, columns=columns, title=f"{title}: {words}")


def _query(way: str, clips: Clips, number: int) -> plots.Cell:
  sound, frame = clips.show(number)
  text = f"{clips.name(number)}\n"
  if way == "a2v":
    return plots.Cell(_resize(sound, SIDE), text)
  return plots.Cell(np.concatenate([np.full_like(sound, 255), frame]), text)


def _answer(way: str, clips: Clips, number: int) -> plots.Picture:
  sound, frame = clips.show(number)
  return frame if way == "a2v" else np.concatenate([sound, frame])


def _resize(picture: np.ndarray, height: int) -> np.ndarray:
  size = (SIDE, height)
  return cv2.resize(picture, size, interpolation=cv2.INTER_AREA)
