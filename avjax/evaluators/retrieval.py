"""Audio-visual retrieval: does a sound find its picture, and the reverse.

Every clip with both modalities asks for its own other half among all of them,
by cosine of `Method.embed`'s 'audio' and 'video', each made of inputs without
the other modality. Scores, each for a2v (sound
asks, pictures answer) and v2a:

| score | meaning |
|---|---|
| `a2v_R1`, `a2v_R5`, `a2v_R10` | fraction of queries within the first |
| `a2v_median_rank` | counted from 1 |
| `a2v_tied` | fraction of queries with another item exactly as similar |
| `within_a2v_R1`, … | the same among the clips of the query's group alone |
| `gallery` | clips that ask and are asked for |
| `left_out` | clips that lack a modality |

How ties and broken embeddings count: `avjax.ranking.ranks`.
"""

import csv
import functools
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from absl import logging

from avjax import ranking
from avjax.data import demo, records
from avjax.errors import InputError, lookup, unknown
from avjax.evaluators import retrieval_pictures
from avjax.evaluators.base import Context, Evaluator
from avjax.evaluators.embeddings import Embedded, Embedder, class_numbers
from avjax.methods.base import Params

# Coarse groups of classes that belong to a data set.
GROUPS: dict[str, Mapping[str, str]] = {"av_demo": demo.GROUPS}
DIRECTIONS = ("a2v", "v2a")


class Retrieval(Evaluator):
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
      InputError: no clip has both modalities, the method has no 'audio' and
        'video' embeddings, or an option's file does not fit the split.
    """
    chosen = self._chosen() if self.subset else None
    found = self._embedder.split(params, self.section, chosen)
    both = found.has["audio"] & found.has["video"]
    if not both.any():
      raise InputError(
        f"none of the {len(both)} clips of split {self.section.split!r} has "
        "both modalities"
      )
    audio, video = found.values["audio"][both], found.values["video"][both]
    number = found.number[both]
    ranks = ranking.ranks(audio, video)
    values = {
      **_scores("", ranks),
      "gallery": float(len(number)),
      "left_out": float(_left_out(found)),
    }
    if self.within:
      groups = self._groups()[number]
      values |= _scores("within_", ranking.ranks(audio, video, groups=groups))
    if self.pictures and jax.process_index() == 0:
      pair = {"a2v": (audio, video), "v2a": (video, audio)}
      places = {"a2v": ranks.forward, "v2a": ranks.backward}
      for way in DIRECTIONS:
        picture = retrieval_pictures.draw(
          way, *pair[way], places[way], number, self._show, self._title(step),
          count=self.pictures,
        )  # fmt: skip
        name = f"{self.section.split}_retrieval_{way}"
        self.context.picture(name, picture, step)
    return values

  def _title(self, step: int) -> str:
    data = self.context.config.data
    return f"{data.name}, split {self.section.split}, step {step}"

  # --- What the built split says of its clips ---

  @functools.cached_property
  def _split(self) -> records.Split:
    data, section = self.context.config.data, self.section
    return records.Split(data, section.split, section.limit)

  @functools.cached_property
  def _show(self) -> retrieval_pictures.Clips:
    return retrieval_pictures.Clips(self._split, self.context.config.data)

  def _chosen(self) -> np.ndarray:
    """Which clips of the split the subset names."""
    path = pathlib.Path(self.subset).expanduser()
    wanted = {row[0] for row in _rows(path)}
    ids = self._split.column("id")[: len(self._split)]
    chosen = np.isin(ids, list(wanted))
    missing = len(wanted) - int(chosen.sum())
    if not chosen.any():
      raise InputError(
        f"{path}: none of its {len(wanted)} ids is in split "
        f"{self._split.name!r} of {self._split.folder}, whose first is "
        f"{ids[0]!r}"
      )
    if missing:
      logging.warning(
        "%s: %d of its %d ids are not in split %s",
        path, missing, len(wanted), self._split.name,
      )  # fmt: skip
    return chosen

  def _groups(self) -> np.ndarray:
    """The group of each clip of the split; '' = none."""
    classes = self._split.metadata.get("classes", {}).get("label", ())
    numbers = class_numbers(self._split)
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


def _left_out(found: Embedded) -> int:
  return int((~(found.has["audio"] & found.has["video"])).sum())


def _scores(prefix: str, ranks: ranking.Ranks) -> dict[str, float]:
  ways = {
    "a2v": ranking.scores(ranks.forward, ranks.forward_tied),
    "v2a": ranking.scores(ranks.backward, ranks.backward_tied),
  }
  return {
    f"{prefix}{way}_{name}": value
    for way, values in ways.items()
    for name, value in values.items()
  }


def _rows(path: pathlib.Path) -> list[list[str]]:
  """Rows of a CSV file, or lines; empty ones left out."""
  try:
    with path.open(newline="", encoding="utf-8-sig") as lines:
      return [row for row in csv.reader(lines) if row and row[0]]
  except (OSError, UnicodeDecodeError, csv.Error) as error:
    raise InputError(f"{path}: {error}") from error
