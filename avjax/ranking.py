"""Ranks in retrieval: of each query's true item, in both directions at once.

Similarities are made block by block (one matrix product each) and counted at
once, so the whole matrix never exists.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np
from jaxtyping import Bool, Float, Int, Num, Shaped

BLOCK_BYTES = 64 << 20  # of similarities that exist at a time
TOPS = (1, 5, 10)
# Matrix products are made of whole tiles: BLAS may round the edges otherwise,
# and equal embeddings would not tie.
_TILE = 256


@dataclasses.dataclass(frozen=True)
class Ranks:
  """Where the true items stand; 1 = first.

  Attributes:
    forward: of each query's true item in the gallery; infinite where the
      similarity of the two is not a number.
    forward_tied: another item is exactly as similar.
    backward: of each gallery item's best query among all queries; not a number
      where no query has that item.
    backward_tied: a query that is not the item's is exactly as similar.
  """

  forward: Float[np.ndarray, "q"]
  forward_tied: Bool[np.ndarray, "q"]
  backward: Float[np.ndarray, "n"]
  backward_tied: Bool[np.ndarray, "n"]


def ranks(
  queries: Num[np.ndarray, "q d"],
  gallery: Num[np.ndarray, "n d"],
  *,
  positive: Int[np.ndarray, "q"] | None = None,
  groups: Shaped[np.ndarray, "n"] | None = None,
) -> Ranks:
  """Ranks by dot product, in float32.

  The rank is 1 + the number of candidates whose similarity is strictly
  greater: of equal ones the true item comes first. So a model that gives the
  same embedding for everything is always right: look at the ties too.
  Similarities that are not numbers come before all others, and a true item
  whose own similarity is not a number has an infinite rank.

  Args:
    queries: embeddings, normalised for cosine.
    gallery: embeddings.
    positive: number of each query's true item; several queries may have the
      same (captions of a clip), which then has several positives in the other
      direction, of which the best counts. None: query i has item i.
    groups: of the gallery's items. The candidates are then only the items of
      the true item's group (fine-grained retrieval), in the other direction
      the queries whose true items are of the group; alone in its group, an
      item is always first. None: all are candidates.

  Raises:
    ValueError: without `positive` the two sides differ in number, or a number
      in `positive` is not in the gallery.
  """
  q = np.ascontiguousarray(queries, np.float32)
  g = np.ascontiguousarray(gallery, np.float32)
  if positive is None:
    if len(q) != len(g):
      raise ValueError(f"{len(q)} queries, but {len(g)} items without positive")
    positive = np.arange(len(q))
  if len(positive) and not 0 <= positive.min() <= positive.max() < len(g):
    raise ValueError(
      f"true items {positive.min()} to {positive.max()} of {len(g)} items"
    )
  if groups is None:
    return _ranks(q, g, positive)
  result = Ranks(
    np.full(len(q), np.nan),
    np.zeros(len(q), bool),
    np.full(len(g), np.nan),
    np.zeros(len(g), bool),
  )
  place = np.empty(len(g), np.int64)  # of an item in its group
  for mine in _members(groups):
    theirs = np.flatnonzero(np.isin(positive, mine))
    place[mine] = np.arange(len(mine))
    part = _ranks(q[theirs], g[mine], place[positive[theirs]])
    result.forward[theirs] = part.forward
    result.forward_tied[theirs] = part.forward_tied
    result.backward[mine] = part.backward
    result.backward_tied[mine] = part.backward_tied
  return result


def scores(
  rank: Float[np.ndarray, "q"],
  tied: Bool[np.ndarray, "q"],
  tops: tuple[int, ...] = TOPS,
) -> dict[str, float]:
  """`R1`, `R5`, `R10`, `median_rank` and `tied` of one direction.

  Recalls and `tied` are fractions, as accuracies are; the median rank counts
  from 1 and is infinite where half of the ranks are. With k candidates or
  fewer, recall at k is 1. Items that nothing asks for (rank not a number) do
  not count.
  """
  asked = ~np.isnan(rank)
  rank, tied = rank[asked], tied[asked]
  if not len(rank):
    return {}
  found = {f"R{top}": float((rank <= top).mean()) for top in tops}
  # Not np.median, which warns of infinite values.
  middle = np.sort(rank)[[(len(rank) - 1) // 2, len(rank) // 2]]
  found["median_rank"] = float(middle.mean())
  return {**found, "tied": float(tied.mean())}


def both_ways(
  ranks: Ranks,
  ways: tuple[str, str],
  *,
  prefix: str = "",
  total: str = "sum_R",
) -> dict[str, float]:
  """`scores` of both directions by name, and the sum of their recalls.

  Args:
    ranks: of both.
    ways: names of the directions, forward and backward: `a2v` -> `a2v_R1`, …
    prefix: of all names.
    total: name of the sum, 0 to 2 times the number of `TOPS`.
  """
  forward, backward = ways
  values = {
    forward: scores(ranks.forward, ranks.forward_tied),
    backward: scores(ranks.backward, ranks.backward_tied),
  }
  found = {
    f"{prefix}{way}_{name}": value
    for way, named in values.items()
    for name, value in named.items()
  }
  recalls = [named[f"R{k}"] for named in values.values() for k in TOPS]
  return {**found, f"{prefix}{total}": sum(recalls)}


def _members(groups: np.ndarray) -> Iterator[np.ndarray]:
  """Numbers of the items of each group, ascending."""
  _, group = np.unique(groups, return_inverse=True)
  order = np.argsort(group, kind="stable")
  yield from np.split(order, np.cumsum(np.bincount(group))[:-1])


def _ranks(q: np.ndarray, g: np.ndarray, positive: np.ndarray) -> Ranks:
  """See `ranks`; all items are candidates."""
  size = max(BLOCK_BYTES // (4 * max(len(g), 1)) // _TILE, 1) * _TILE
  blocks = [slice(at, at + size) for at in range(0, len(q), size)]
  own = _own(q, g, positive)
  best = np.full(len(g), np.nan, np.float32)
  np.fmax.at(best, positive, own)
  # Of a true item, which must not tie with itself.
  same = np.bincount(positive, own == best[positive], len(g))
  not_above, equal = np.zeros(len(q), np.int64), np.zeros(len(q), np.int64)
  not_above_back, equal_back = np.zeros((2, len(g)), np.int64)
  whole = _padded(g).T
  for rows in blocks:
    similar = _padded(q[rows]) @ whole
    similar = similar[: len(own[rows]), : len(g)]
    similar[np.arange(len(similar)), positive[rows]] = own[rows]
    mine = own[rows, None]
    not_above[rows] = np.count_nonzero(similar <= mine, axis=1)
    equal[rows] = np.count_nonzero(similar == mine, axis=1)
    not_above_back += np.count_nonzero(similar <= best, axis=0)
    equal_back += np.count_nonzero(similar == best, axis=0)
  asked = np.bincount(positive, minlength=len(g)) > 0
  backward = np.where(np.isnan(best), np.inf, 1.0 + len(q) - not_above_back)
  return Ranks(
    np.where(np.isnan(own), np.inf, 1.0 + len(g) - not_above),
    equal > 1,
    np.where(asked, backward, np.nan),
    asked & (equal_back > same),
  )


def _own(q: np.ndarray, g: np.ndarray, positive: np.ndarray) -> np.ndarray:
  """Similarity of each query with its true item.

  From matrix products too, not from sums of products, which round otherwise:
  equal embeddings then tie, whichever product they are in.
  """
  own = np.empty(len(q), np.float32)
  for at in range(0, len(q), _TILE):
    rows = slice(at, at + _TILE)
    product = _padded(q[rows]) @ _padded(g[positive[rows]]).T
    own[rows] = np.diagonal(product)[: len(own[rows])]
  return own


def _padded(x: np.ndarray) -> np.ndarray:
  """Rows of zeros up to a multiple of the tile."""
  return np.pad(x, ((0, -len(x) % _TILE), (0, 0)))
