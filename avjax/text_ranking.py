"""Ranks between clips and their captions, also after re-ranking.

A caption asks for the one clip that it is of, a clip for any of its captions.
Captions with the same words are one text here, computed once: they tie exactly.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from avjax.ranking import Ranks

_ROWS = 256  # that exist at a time beside the similarities
_TEXTS = 1_024  # of a product


def similarities(
  features: Float[np.ndarray, "n q p"], texts: Float[np.ndarray, "u p"]
) -> Float[np.ndarray, "u n"]:
  """Of each text and clip: the largest dot product with one of the queries.

  On the device, in exact float32.

  Args:
    features: of the clips, by query; of length 1 for cosines.
    texts: embeddings of the texts.
  """
  clips = jnp.asarray(features.transpose(1, 2, 0), jnp.float32)
  rows = min(_TEXTS, len(texts))
  found = np.empty((len(texts), len(features)), np.float32)
  for at in range(0, len(texts), rows):
    part = texts[at : at + rows].astype(np.float32)
    whole = np.pad(part, ((0, rows - len(part)), (0, 0)))
    found[at : at + rows] = _largest(clips, whole)[: len(part)]
  return found


@jax.jit
def _largest(
  clips: Float[Array, "q p n"], texts: Float[Array, "u p"]
) -> Float[Array, "u n"]:
  def one(best: Array, query: Array) -> tuple[Array, None]:
    found = jnp.matmul(texts, query, precision=jax.lax.Precision.HIGHEST)
    return jnp.maximum(best, found), None

  lowest = jnp.full((len(texts), clips.shape[2]), -jnp.inf)
  return jax.lax.scan(one, lowest, clips)[0]


@dataclasses.dataclass(frozen=True)
class Table:
  """Similarities of clips and captions, and what re-ranks them.

  Attributes:
    similar: of each text with each clip.
    text: of each caption, its text.
    clip: of each caption, its clip.
    matched: matching scores where they are known, NaN elsewhere; None = no
      re-ranking.
    top: candidates that are re-ranked: clips of a caption, and different texts
      of a clip.
    add: whether their similarity is added to the matching score.
  """

  similar: Float[np.ndarray, "u n"]
  text: Int[np.ndarray, "c"]
  clip: Int[np.ndarray, "c"]
  matched: Float[np.ndarray, "u n"] | None = None
  top: int = 0
  add: bool = True

  def of_captions(self, rows: Int[np.ndarray, "r"]) -> Float[np.ndarray, "r n"]:
    """Scores of all clips for some captions, see `reranked`."""
    return self._scores(lambda x: x[self.text[rows]])

  def of_clips(self, rows: Int[np.ndarray, "r"]) -> Float[np.ndarray, "r c"]:
    """Scores of all captions for some clips, see `reranked`."""
    return self._scores(lambda x: x[:, rows].T)[:, self.text]

  def _scores(self, take: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    similar = take(self.similar)
    if self.matched is None:
      return similar
    return reranked(similar, take(self.matched), self.top, add=self.add)

  def wanted(self) -> Bool[np.ndarray, "u n"]:
    """Which pairs re-ranking has to match, in either direction."""
    found = np.zeros(self.similar.shape, bool)
    for rows in _blocks(len(self.similar)):
      found[rows] = candidates(self.similar[rows], self.top)
    for rows in _blocks(self.similar.shape[1]):
      found[:, rows] |= candidates(self.similar[:, rows].T, self.top).T
    return found

  @functools.cached_property
  def ranks(self) -> Ranks:
    """Forward: of each caption's clip. Backward: of each clip's best caption.

    The rank is 1 + the number of better candidates + half the number of
    equally good ones, so that equal scores for all are chance, not success
    (unlike `avjax.ranking`). The other captions of a clip are not candidates
    against its best one. A score that is not a number comes before all others,
    and a true one that is none has an infinite rank.
    """
    forward, backward = [], []
    for rows in _blocks(len(self.text)):
      own = np.zeros((len(rows), self.similar.shape[1]), bool)
      own[np.arange(len(rows)), self.clip[rows]] = True
      forward.append(_ranks(self.of_captions(rows), own))
    for rows in _blocks(self.similar.shape[1]):
      own = self.clip == rows[:, None]
      backward.append(_ranks(self.of_clips(rows), own))
    return Ranks(
      *(np.concatenate(part) for part in zip(*forward, strict=True)),
      *(np.concatenate(part) for part in zip(*backward, strict=True)),
    )


def candidates(
  similar: Float[np.ndarray, "r n"], top: int
) -> Bool[np.ndarray, "r n"]:
  """The `top` most similar of each row; all where there are no more."""
  top = min(top, similar.shape[1])
  key = -np.where(np.isnan(similar), np.inf, similar)
  best = np.argpartition(key, top - 1, axis=1)[:, :top]
  found = np.zeros(similar.shape, bool)
  np.put_along_axis(found, best, True, axis=1)
  return found


def reranked(
  similar: Float[np.ndarray, "r n"],
  matched: Float[np.ndarray, "r n"],
  top: int,
  *,
  add: bool,
) -> Float[np.ndarray, "r n"]:
  """Candidates by their matching score, below them the rest by similarity.

  The paper's source, BLIP-2, gives all the rest one low score.

  Args:
    similar: similarities.
    matched: matching scores of the candidates; the others' are not looked at.
    top: number of candidates.
    add: whether a candidate's score is matching + similarity (BLIP-2), not
      matching alone.
  """
  chosen = candidates(similar, top)
  wide = similar.astype(np.float64)
  best = matched + wide if add else matched.astype(np.float64)
  lowest = _end(best, chosen, np.fmin, np.inf)
  highest = _end(wide, ~chosen, np.fmax, -np.inf)
  below = np.nan_to_num(highest - lowest, posinf=0.0, neginf=0.0) + 1.0
  return np.where(chosen, best, wide - below[:, None])


def _end(values, where, function, start) -> np.ndarray:
  """The least or the largest finite value of each row; `start` if none."""
  kept = np.where(where & np.isfinite(values), values, start)
  return function.reduce(kept, axis=1, initial=start)


def _ranks(
  scores: Float[np.ndarray, "r n"], own: Bool[np.ndarray, "r n"]
) -> tuple[np.ndarray, np.ndarray]:
  """Rank of the best of each row's own, and whether another equals it.

  Not a number where a row has none.
  """
  best = np.fmax.reduce(np.where(own, scores, np.nan), axis=1)[:, None]
  better = np.count_nonzero(~(scores <= best) & ~own, axis=1)
  equal = np.count_nonzero((scores == best) & ~own, axis=1)
  rank = np.where(np.isnan(best[:, 0]), np.inf, 1.0 + better + equal / 2)
  return np.where(own.any(axis=1), rank, np.nan), equal > 0


def _blocks(count: int) -> Iterator[Int[np.ndarray, "r"]]:
  for at in range(0, count, _ROWS):
    yield np.arange(at, min(at + _ROWS, count))
