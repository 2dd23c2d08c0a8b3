"""Ranks of several models for the same queries: choice, table and files."""

import csv
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from avjax import ranking

SEED = 0  # of the queries at random

# Direction -> ranks from 1, by model.
Ranks = Mapping[str, Float[np.ndarray, "_ _"]]


def choose(
  first: Float[np.ndarray, "b"], last: Float[np.ndarray, "b"], count: int
) -> list[tuple[str, int]]:
  """(sort, query) of at most `count` queries.

  Half of them (rounded down) are drawn at random from all; the others are
  those with the largest factor between the two ranks, if it is above 1.

  Args:
    first: ranks by the first model.
    last: ranks by the last model.
    count: of both sorts together.
  """
  random = np.random.default_rng(SEED).choice(
    len(first), min(count // 2, len(first)), replace=False
  )
  better = first > last
  factor = np.divide(first, last, out=np.zeros_like(first), where=better)
  factor[random] = 0.0
  order = np.argsort(-factor, kind="stable")[: count - len(random)]
  return [
    *(("improved most", int(query)) for query in order if factor[query] > 0),
    *(("at random", int(query)) for query in random),
  ]


def ahead(ranks: Float[np.ndarray, "m q"]) -> Bool[np.ndarray, "m q"]:
  """Where a model alone has the best rank of all."""
  best = ranks == ranks.min(axis=0)
  return best & (best.sum(axis=0) == 1)


def table(
  names: Sequence[str], ranks: Ranks, heading: str, cells: Mapping[str, Any]
) -> str:
  """Markdown by direction and model.

  Recalls, a column of the caller's, and in how many queries the model alone is
  ahead.

  Args:
    names: of the models.
    ranks: of their queries.
    heading: of the caller's column.
    cells: direction -> its text for each model.
  """
  tops = [f"R@{top}" for top in ranking.TOPS]
  lines = [
    f"| direction | model | {' | '.join(tops)} | {heading} | ahead |",
    "|---" * (len(tops) + 4) + "|",
  ]
  for way, of_models in ranks.items():
    rows = zip(names, of_models, cells[way], ahead(of_models), strict=True)
    for name, rank, cell, alone in rows:
      recalls = [f"{(rank <= top).mean():.3f}" for top in ranking.TOPS]
      lines.append(
        f"| {way} | {name} | {' | '.join(recalls)} | {cell} | "
        f"{alone.sum()} of {len(rank)} |"
      )
  return "\n".join([*lines, ""])


def write(
  output: Any,
  names: Sequence[str],
  ids: Mapping[str, Sequence[str]],
  ranks: Ranks,
  text: str,
) -> pathlib.Path:
  """Writes comparison.csv and comparison.md; returns their folder.

  Args:
    output: the folder; it is made.
    names: of the models.
    ids: direction -> the clip of each query.
    ranks: of the queries.
    text: of comparison.md.
  """
  folder = pathlib.Path(output).expanduser()
  folder.mkdir(parents=True, exist_ok=True)
  with (folder / "comparison.csv").open("w", newline="") as file:
    writer = csv.writer(file)
    writer.writerow(["id", "direction", *names])
    for way, of_models in ranks.items():
      for name, row in zip(ids[way], of_models.T, strict=True):
        # Digits for any rank, halves included; a whole one is written whole.
        writer.writerow([name, way, *(f"{rank:.12g}" for rank in row)])
  (folder / "comparison.md").write_text(text)
  return folder
