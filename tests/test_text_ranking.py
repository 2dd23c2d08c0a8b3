"""Ranks of captions and clips against loops over all pairs."""

import time

import numpy as np
import pytest

from avjax import ranking, text_ranking
from avjax.text_ranking import Table


def test_the_best_query_counts(monkeypatch):
  monkeypatch.setattr(text_ranking, "_TEXTS", 4)
  rng = np.random.default_rng(0)
  clips = rng.standard_normal((7, 3, 5)).astype(np.float32)
  texts = rng.standard_normal((9, 5)).astype(np.float32)
  found = text_ranking.similarities(clips, texts)
  expected = np.einsum("nqp,up->unq", clips, texts).max(axis=-1)
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def naive(score, own):
  """Rank of the best of `own` in a list of scores; ties count half."""
  scores = [np.inf if np.isnan(s) else s for s in score]
  best = np.fmax.reduce(np.array(score)[own])
  if np.isnan(best):
    return np.inf
  rank = 1.0
  for k, value in enumerate(scores):
    if k not in own:
      rank += 1.0 * (value > best) + 0.5 * (value == best)
  return rank


def naive_order(similar, matched, top, add):
  """Scores after re-ranking, as places in an order: more is better."""
  order = sorted(range(len(similar)), key=lambda k: -similar[k])
  top = min(top, len(similar))
  first = {k: matched[k] + add * similar[k] for k in order[:top]}
  return [(1, first[k]) if k in first else (0, similar[k])
          for k in range(len(similar))]  # fmt: skip


def captioned(rng, *, clips=23, captions=57, texts=31):
  """Small integers, so many ties; clip 0 has no caption."""
  similar = rng.integers(-3, 4, (texts, clips)).astype(np.float32)
  text = rng.integers(0, texts, captions)
  return similar, text, 1 + rng.integers(0, clips - 1, captions)


@pytest.mark.parametrize("broken", [False, True])
def test_against_a_loop(monkeypatch, broken):
  monkeypatch.setattr(text_ranking, "_ROWS", 10)
  similar, text, clip = captioned(np.random.default_rng(1))
  if broken:
    similar[::7, ::3] = np.nan
  found = Table(similar, text, clip).ranks
  forward = [naive(similar[t], [c]) for t, c in zip(text, clip, strict=True)]
  backward = [
    naive(similar[text, c], list(np.flatnonzero(clip == c))) for c in range(23)
    if (clip == c).any()
  ]  # fmt: skip
  asked = np.isin(np.arange(23), clip)
  assert found.forward.tolist() == forward
  assert found.backward[asked].tolist() == backward
  assert np.isnan(found.backward[~asked]).all() and not asked[0]


@pytest.mark.parametrize("top", [1, 5, 128])
@pytest.mark.parametrize("add", [False, True])
def test_reranking_against_a_loop(monkeypatch, top, add):
  monkeypatch.setattr(text_ranking, "_ROWS", 10)
  rng = np.random.default_rng(2)
  _, text, clip = captioned(rng, texts=31)
  # No ties at the edge of the candidates, where either may be chosen.
  similar = rng.standard_normal((31, 23)).astype(np.float32)
  matched = rng.integers(-3, 4, similar.shape).astype(np.float32)
  plain = Table(similar, text, clip, None, top)
  known = np.where(plain.wanted(), matched, np.nan).astype(np.float32)
  assert top == 128 or np.isnan(known).any()
  found = Table(similar, text, clip, known, top, add).ranks
  for k in range(57):
    order = naive_order(similar[text[k]], matched[text[k]], top, add)
    own = order[clip[k]]
    better = sum(o > own for o in order)
    equal = sum(o == own for o in order) - 1
    assert found.forward[k] == 1 + better + equal / 2
  # All are candidates: the order is that of matching alone.
  if top == 128:
    whole = matched + add * similar.astype(np.float64)
    again = Table(whole, text, clip).ranks
    np.testing.assert_array_equal(found.backward, again.backward)
    np.testing.assert_array_equal(found.forward, again.forward)


def test_captions_of_other_clips_re_rank_too():
  similar = np.array([[9, 1], [8, 2], [7, 3], [1, 9]], np.float32)
  table = Table(similar, np.arange(4), np.array([1, 0, 0, 1]))
  # Clip 0 finds a caption of clip 1 first, clip 1 its own.
  assert table.ranks.backward.tolist() == [2, 1]
  matched = np.array([[0, 0], [0, 0], [5, 0], [9, 9]], np.float32)
  two = Table(similar, np.arange(4), table.clip, matched, 2, False)
  # Text 2 is not among the first two of clip 0, so it stays below.
  assert two.of_clips(np.array([0]))[0].argsort().tolist()[:2] == [3, 2]
  three = Table(similar, np.arange(4), table.clip, matched, 3, False)
  assert three.ranks.backward.tolist() == [1, 1]
  one = Table(similar, np.arange(4), table.clip, None, 1)
  # In either direction: the first clip of each text, the first text of each.
  assert one.wanted().tolist() == [
    [True, False], [True, False], [True, False], [False, True],
  ]  # fmt: skip


def test_scores_that_are_all_equal_are_chance():
  similar = np.zeros((10, 10), np.float32)
  found = Table(similar, np.arange(10), np.arange(10)).ranks
  values = ranking.scores(found.forward, found.forward_tied)
  assert values == {
    "R1": 0, "R5": 0, "R10": 1, "median_rank": 5.5, "tied": 1,
  }  # fmt: skip


def test_equal_captions_of_two_clips_tie():
  similar = np.array([[3, 3], [1, 2]], np.float32)
  # Text 0 is a caption of both clips, text 1 of clip 1.
  table = Table(similar, np.array([0, 0, 1]), np.array([0, 1, 1]))
  assert table.ranks.backward.tolist() == [1.5, 1.5]
  assert table.ranks.backward_tied.tolist() == [True, True]


def test_thousands_take_seconds():
  rng = np.random.default_rng(0)
  clips = rng.standard_normal((1_500, 16, 64)).astype(np.float32)
  texts = rng.standard_normal((1_500, 64)).astype(np.float32)
  began = time.process_time()
  similar = text_ranking.similarities(clips, texts)
  numbers = np.arange(1_500)
  table = Table(similar, numbers, numbers, similar, 128)
  assert table.ranks.forward.shape == (1_500,) and table.wanted().any()
  # 0.7 s of one core; a loop over queries takes minutes.
  assert time.process_time() - began < 20
