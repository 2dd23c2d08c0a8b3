"""Searches against full passes and against trying every text."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avjax import generation

START, END, PAD = 0, 1, 9


def model(rng, batch, vocabulary, length):
  """Logits that depend on all tokens before: a cached step and a full pass."""
  table = 3 * rng.standard_normal((batch, length, length, 10, vocabulary))
  table = jnp.asarray(table, jnp.float32)

  def full(ids):
    """[n l] ids behind the start -> logits of each, [b n l v]."""
    read = np.concatenate([np.full_like(ids[:, :1], START), ids[:, :-1]], 1)
    seen = np.tril(np.ones((length, length)))
    place = np.arange(length)
    # Position t sums what each earlier position s says of it.
    said = table[:, place[:, None], place[None], read[:, None, :]]
    return jnp.einsum("bntsv,ts->bntv", said, seen)

  def step(state, token, position):
    tables, past = state["table"], state["past"].at[:, position].set(token)
    rows = jnp.arange(len(past))[:, None]
    said = tables[rows, position, jnp.arange(length)[None], past]
    seen = jnp.arange(length) <= position
    logits = (said * seen[None, :, None]).sum(axis=1)
    return logits, {"table": tables, "past": past}

  past = jnp.zeros((batch, length), jnp.int32)
  return full, step, {"table": table, "past": past}


OPTIONS = {"start": START, "end": END, "pad": PAD}


def run(search, step, state, **options):
  made = jax.jit(lambda s: search(step, s, **OPTIONS, **options))
  ids, scores = made(state)
  return np.asarray(ids), np.asarray(scores)


def whole(full, ids, row):
  """log p of each token of each text by the full pass, [n l]."""
  logprob = jax.nn.log_softmax(full(ids)[row])
  return np.take_along_axis(np.asarray(logprob), ids[:, :, None], 2)[..., 0]


def test_greedy_is_the_argmax_of_the_full_pass():
  full, step, state = model(np.random.default_rng(0), 16, 5, 6)
  ids, scores = run(generation.greedy, step, state, length=6)
  ends = []
  for row, found in enumerate(ids):
    logits = np.asarray(full(np.minimum(found, 4)[None])[row, 0])
    count = list(found).index(END) + 1 if END in found else 6
    ends.append(count)
    assert (logits.argmax(-1)[:count] == found[:count]).all()
    assert (found[count:] == PAD).all()
    each = whole(full, np.minimum(found, 4)[None], row)[0, :count]
    assert scores[row] == pytest.approx(each.mean(), abs=1e-5)
  assert len(set(ends)) > 3  # some end early, some never


@pytest.mark.parametrize("penalty", [0.0, 1.0])
@pytest.mark.parametrize("banned", [(), (2, 3)])
def test_one_beam_is_greedy(penalty, banned):
  _, step, state = model(np.random.default_rng(1), 16, 5, 6)
  options = {"length": 6, "banned": banned, "length_penalty": penalty}
  ids, scores = run(generation.greedy, step, state, **options)
  other, theirs = run(generation.beam, step, state, beams=1, **options)
  assert (ids == other).all() and not np.isin(ids, banned).any()
  np.testing.assert_allclose(scores, theirs, rtol=1e-5)


@pytest.mark.parametrize("penalty", [0.0, 1.0])
def test_wide_beams_find_the_best_of_all_texts(penalty):
  length, size = 4, 3
  full, step, state = model(np.random.default_rng(2), 8, size, length)
  texts = np.array(list(itertools.product(range(size), repeat=length)))
  counts = np.array([[*row, END].index(END) + 1 for row in texts])
  ended = (texts == END).any(axis=1)
  options = {"length": length, "length_penalty": penalty}
  wide = run(generation.beam, step, state, beams=size**length, **options)
  narrow = run(generation.beam, step, state, beams=1, **options)
  for row in range(8):
    each = whole(full, texts, row)
    inside = np.arange(length) < counts[:, None]
    score = (each * inside).sum(axis=1) / counts**penalty
    best = np.where(ended, score, -np.inf).argmax()
    expected = np.where(inside[best], texts[best], PAD)
    assert (wide[0][row] == expected).all()
    assert wide[1][row] == pytest.approx(score[best], abs=1e-5)
    if END in narrow[0][row]:
      assert narrow[1][row] <= wide[1][row] + 1e-6
  assert (narrow[0] != wide[0]).any()


def test_without_an_end_it_is_the_best_text_of_full_length():
  length, size = 3, 3
  full, step, state = model(np.random.default_rng(3), 4, size, length)
  options = {"length": length, "banned": (END,)}
  ids, scores = run(generation.beam, step, state, beams=8, **options)
  texts = np.array(list(itertools.product((0, 2), repeat=length)))
  for row in range(4):
    logits = np.asarray(full(texts)[row]).copy()
    logits[..., END] = -np.inf
    logprob = np.asarray(jax.nn.log_softmax(logits))
    score = np.take_along_axis(logprob, texts[:, :, None], 2)[..., 0].mean(1)
    assert (ids[row] == texts[score.argmax()]).all()
    assert scores[row] == pytest.approx(score.max(), abs=1e-5)


def test_rows_do_not_touch_each_other():
  _, step, state = model(np.random.default_rng(4), 6, 5, 5)
  together, _ = run(generation.beam, step, state, beams=3, length=5)
  for row in range(0, 6, 2):
    part = jax.tree.map(lambda x, row=row: x[row : row + 1], state)
    alone, _ = run(generation.beam, step, part, beams=3, length=5)
    assert (alone[0] == together[row]).all()


def test_it_stops_when_all_have_ended():
  calls = []

  def step(state, token, position):
    jax.debug.callback(lambda p: calls.append(int(p)), position)
    return jnp.zeros((len(token), 4)).at[:, END].set(5.0), state

  state = jnp.zeros((2, 1))
  ids, _ = run(generation.greedy, step, state, length=30)
  jax.effects_barrier()
  assert ids[:, 0].tolist() == [END, END] and (ids[:, 1:] == PAD).all()
  assert calls == [0]
  calls.clear()
  run(generation.beam, step, state, length=30, beams=2)
  jax.effects_barrier()
  # The second text ends after another token.
  assert sorted(calls) == [0, 1]


def test_texts_that_end_badly_do_not_stop_a_better_one():
  wanted = jnp.array([2, 3, 2, END])

  def step(state, token, position):
    logits = 9.0 * jax.nn.one_hot(wanted[position], 40)
    # An end is always the second best.
    return logits.at[END].max(4.0) * jnp.ones((len(token), 1)), state

  ids, _ = run(generation.beam, step, jnp.zeros((2, 1)), length=6, beams=2)
  assert ids.tolist() == [[2, 3, 2, END, PAD, PAD]] * 2
