"""Audio-visual retrieval: does a sound find its picture, and the reverse.

Every clip with both modalities asks for its own other half among all of them,
by cosine of `Method.embed`'s 'audio' and 'video', each made of inputs without
the other modality. Scores, those with a2v (sound asks, pictures answer) also
for v2a:

| score | meaning |
|---|---|
| `a2v_R1`, `a2v_R5`, `a2v_R10` | fraction of queries within the first |
| `a2v_median_rank` | counted from 1 |
| `a2v_tied` | fraction of queries with another item exactly as similar |
| `sum_R` | R1, R5 and R10 of both directions added up, 0 to 6 |
| `within_a2v_R1`, … | all these among the clips of the query's group alone |
| `gallery` | clips that ask and are asked for |
| `left_out` | clips that lack a modality |

How ties and broken embeddings count: `avjax.ranking.ranks`.
"""

import csv
import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from absl import logging
from jaxtyping import Bool, Float, Int

from avjax import ranking
from avjax.data import demo, records
from avjax.errors import InputError, lookup, unknown
from avjax.evaluators import retrieval_pictures
from avjax.evaluators.base import Context
from avjax.evaluators.embeddings import Embedder, class_numbers
from avjax.evaluators.shown import Shown
from avjax.methods.base import Params

# Coarse groups of classes that belong to a data set.
GROUPS: dict[str, Mapping[str, str]] = {"av_demo": demo.GROUPS}
DIRECTIONS = ("a2v", "v2a")


@dataclasses.dataclass(frozen=True)
class Pairs:
  """Embeddings, of length 1, of the clips that have both modalities.

  Attributes:
    audio: from the sound alone.
    video: from the frames alone.
    number: of the clip in the split.
    left_out: how many clips lack a modality.
  """

  audio: Float[np.ndarray, "b d"]
  video: Float[np.ndarray, "b d"]
  number: Int[np.ndarray, "b"]
  left_out: int


class Retrieval(Shown):
  """Recall of a split in both directions.

  Options of the section:
    views: embeddings of the views of a clip, each of length 1, are averaged.
    subset: file of the ids that count, one a line, or a CSV whose first column
      they are; '' = the whole split.
    within: '' (no within_ scores), 'label' (clips with the same main class),
      'group' (the data set's own coarse groups, av_demo has them), or a CSV
      file of class,group. Clips without a class form a group.
    pictures: how many of the best and of the worst queries are drawn for each
      direction, with the five clips found first (0 = none).
  """

  def __init__(self, context: Context, section: Any):
    super().__init__(context, section)
    self.pictures = section.get("pictures", 0)
    self.subset = section.get("subset", "")
    self.within = section.get("within", "")
    if context.config.data.modality != "av":
      raise InputError(
        f"evals of type {section.type!r} need data.modality='av'; it is "
        f"{context.config.data.modality!r}"
      )
    self._embedder = Embedder(context, normalise=True, alone=True)

  def run(self, params: Params, step: int) -> Mapping[str, float]:
    """Scores by name; draws pictures through the context.

    Raises:
      InputError: see `embed`; or the file of `within` does not fit the split.
    """
    pairs = self.embed(params)
    audio, video, number = pairs.audio, pairs.video, pairs.number
    ranks = ranking.ranks(audio, video)
    values = {
      **ranking.both_ways(ranks, DIRECTIONS),
      "gallery": float(len(number)),
      "left_out": float(pairs.left_out),
    }
    if self.within:
      groups = self._groups()[number]
      within = ranking.ranks(audio, video, groups=groups)
      values |= ranking.both_ways(within, DIRECTIONS, prefix="within_")
    if self.pictures and jax.process_index() == 0:
      pair = {"a2v": (audio, video), "v2a": (video, audio)}
      places = {"a2v": ranks.forward, "v2a": ranks.backward}
      for way in DIRECTIONS:
        picture = retrieval_pictures.draw(
          way, *pair[way], places[way], number, self.clips, self.title(step),
          count=self.pictures,
        )  # fmt: skip
        name = f"{self.section.split}_retrieval_{way}"
        self.context.picture(name, picture, step)
    return values

  def embed(self, params: Params) -> Pairs:
    """Both sides of every clip that counts.

    Raises:
      InputError: no clip has both modalities, the method has no 'audio' and
        'video' embeddings, or the subset does not fit the split.
    """
    chosen = chosen_ids(self.subset, self.built) if self.subset else None
    found = self._embedder.split(params, self.section, chosen)
    both = found.has["audio"] & found.has["video"]
    if not both.any():
      raise InputError(
        f"none of the {len(both)} clips of split {self.section.split!r} has "
        "both modalities"
      )
    return Pairs(
      found.values["audio"][both],
      found.values["video"][both],
      found.number[both],
      int((~both).sum()),
    )

  def _groups(self) -> np.ndarray:
    """The group of each clip of the split; '' = none."""
    classes = self.built.metadata.get("classes", {}).get("label", ())
    numbers = class_numbers(self.built)
    names = [str(classes[row[0]]) if len(row) else "" for row in numbers]
    if self.within == "label":
      return np.array(names)
    if self.within == "group":
      name = self.context.config.data.name
      table = lookup(GROUPS, name, "data set with groups of its own")
    else:
      path = pathlib.Path(self.within).expanduser()
      table = {row[0]: row[1] for row in _rows(path) if len(row) > 1}
    for name in sorted(set(names) - {""} - set(table)):
      raise unknown(f"class in {self.within}", name, table)
    return np.array([table[name] if name else "" for name in names])


def chosen_ids(subset: str, built: records.Split) -> Bool[np.ndarray, "n"]:
  """Which clips of a split a file of ids names.

  Args:
    subset: path; one id a line, or a CSV whose first column they are.
    built: the split.

  Raises:
    InputError: the file cannot be read, or names none of the clips.
  """
  path = pathlib.Path(subset).expanduser()
  wanted = {row[0] for row in _rows(path)}
  ids = built.column("id")[: len(built)]
  chosen = np.isin(ids, list(wanted))
  missing = len(wanted) - int(chosen.sum())
  if not chosen.any():
    raise InputError(
      f"{path}: none of its {len(wanted)} ids is in split {built.name!r} of "
      f"{built.folder}, whose first is {ids[0]!r}"
    )
  if missing:
    logging.warning(
      "%s: %d of its %d ids are not in split %s",
      path, missing, len(wanted), built.name,
    )  # fmt: skip
  return chosen


def _rows(path: pathlib.Path) -> list[list[str]]:
  """Rows of a CSV file, or lines; empty ones left out."""
  try:
    with path.open(newline="", encoding="utf-8-sig") as lines:
      return [row for row in csv.reader(lines) if row and row[0]]
  except (OSError, UnicodeDecodeError, csv.Error) as error:
    raise InputError(f"{path}: {error}") from error
