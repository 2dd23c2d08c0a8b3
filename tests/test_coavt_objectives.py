"""CoAVT's objectives against BLIP-2's numbers and by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avjax.methods import coavt_objectives as objectives
from avjax.methods.coavt_config import EQUAL_TEXTS
from tests import qformer_golden as made

# Losses of float32, relative: what the file's description allows.
LOSS = {"rtol": 2e-5}
COSINES = {"rtol": 0, "atol": 5e-6}
TAU = 0.07

layouts = pytest.mark.parametrize("layout", made.LAYOUTS)


def array(layout, name):
  return jnp.asarray(made.file()[f"{layout}/{name}"], jnp.float32)


def similarity(layout):
  return objectives.similarity(array(layout, "itc_q"), array(layout, "itc_t"))


def alone(b):
  """No two texts are equal, and every example counts."""
  return jnp.eye(b, dtype=bool), jnp.ones(b, bool)


# --- Contrast ----------------------------------------------------------------


@layouts
def test_similarity_is_blip2s(layout):
  expected = array(layout, "itc_sim_x2t")
  np.testing.assert_allclose(similarity(layout), expected, **COSINES)


@layouts
@pytest.mark.parametrize("smoothing", [0, 0.1])
@pytest.mark.parametrize("equals", EQUAL_TEXTS)
def test_contrast_is_blip2s_where_texts_differ(layout, smoothing, equals):
  loss, _ = objectives.contrast(
    similarity(layout) / TAU, *alone(4), smoothing=float(smoothing),
    equals=equals,
  )  # fmt: skip
  expected = array(layout, f"itc_loss_smooth{smoothing}")
  np.testing.assert_allclose(loss, expected, **LOSS)


LOGITS = jnp.array([[2.0, 1.0, 0.5], [0.0, 3.0, 1.0], [1.0, -1.0, 0.5]])
EQUAL = jnp.array([[1, 1, 0], [1, 1, 0], [0, 0, 1]], bool)


def by_hand(logits, keep, label):
  """Mean cross-entropy of rows of which some columns are kept."""
  rows = []
  for i, row in enumerate(np.asarray(logits, np.float64)):
    log = row - np.log(np.exp(row[keep[i]]).sum())
    rows.append(-(label[i] * np.where(keep[i], log, 0)).sum())
  return np.mean(rows)


@pytest.mark.parametrize("equals", EQUAL_TEXTS)
def test_equal_texts(equals):
  equal, eye = np.asarray(EQUAL), np.eye(3, dtype=bool)
  keep = ~equal | eye if equals == "excluded" else np.ones((3, 3), bool)
  label = equal / equal.sum(1, keepdims=True) if equals == "positive" else eye
  loss, right = objectives.contrast(
    LOGITS, EQUAL, jnp.ones(3, bool), equals=equals
  )
  expected = np.mean([by_hand(x, keep, label) for x in (LOGITS, LOGITS.T)])
  np.testing.assert_allclose(loss, expected, rtol=1e-6)
  # Clip 2 finds text 0; of the texts all find their clip or one like it.
  np.testing.assert_allclose(right, (2 / 3 + 2 / 3) / 2)


def test_smoothing_is_over_the_candidates():
  """Of three, one is out: its share goes to the other two."""
  loss, _ = objectives.contrast(LOGITS, EQUAL, jnp.ones(3, bool), smoothing=0.3)
  keep = ~np.asarray(EQUAL) | np.eye(3, dtype=bool)
  label = 0.7 * np.eye(3) + 0.3 * keep / keep.sum(1, keepdims=True)
  expected = np.mean([by_hand(x, keep, label) for x in (LOGITS, LOGITS.T)])
  np.testing.assert_allclose(loss, expected, rtol=1e-6)


def test_what_does_not_count_neither_asks_nor_answers():
  logits = jax.random.normal(jax.random.key(0), (4, 4))
  counted = jnp.arange(4) != 2
  few = np.ix_([0, 1, 3], [0, 1, 3])
  run = functools.partial(objectives.contrast, smoothing=0.1)
  expected = run(logits[few], *alone(3))
  bad = logits.at[2].set(1e4).at[:, 2].set(-1e4)
  found = run(bad, jnp.eye(4, dtype=bool), counted)
  np.testing.assert_allclose(found, expected, rtol=1e-6)
  slope = jax.grad(lambda x: run(x, jnp.eye(4, dtype=bool), counted)[0])(bad)
  assert np.isfinite(slope).all()
  assert not slope[2].any() and not slope[:, 2].any()


@pytest.mark.parametrize("counted", [True, False])
def test_contrast_of_one(counted):
  found = jax.value_and_grad(
    lambda x: objectives.contrast(
      x, jnp.ones((1, 1), bool), jnp.array([counted])
    )[0]
  )(jnp.ones((1, 1)))
  assert not np.any(found[0]) and not np.any(found[1])


def test_texts_are_compared_without_their_padding():
  ids = jnp.array([[2, 5, 3, 0], [2, 5, 3, 9], [2, 5, 6, 3], [2, 5, 3, 0]])
  mask = jnp.array([[1, 1, 1, 0], [1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 1, 1]])
  equal = objectives.equal_texts(ids, mask.astype(bool))
  expected = np.eye(4, dtype=bool)
  expected[0, 1] = expected[1, 0] = True
  assert np.array_equal(equal, expected)


def test_temperature_stays_within_its_bounds_and_comes_back():
  low, high = objectives.TEMPERATURES
  for value, sign, expected, slope in [
    (0.07, 1.0, 0.07, 1.0),
    (-0.2, 1.0, low, 0.0),  # a step would go further down
    (-0.2, -1.0, low, -1.0),
    (0.9, 1.0, high, 1.0),
    (0.9, -1.0, high, 0.0),
  ]:
    found = jax.value_and_grad(
      lambda x, sign=sign: sign * objectives.bounded(x)
    )(jnp.float32(value))
    np.testing.assert_allclose(found, (sign * expected, slope), rtol=1e-6)


# --- Matching ----------------------------------------------------------------


@layouts
def test_hard_negatives_are_drawn_as_blip2_draws_them(layout):
  logits = similarity(layout) / TAU
  draws = 4_000
  keys = jax.random.split(jax.random.key(0), (draws, 4))
  allowed = ~jnp.eye(4, dtype=bool)
  for x, name in ((logits, "text_for_x"), (logits.T, "x_for_text")):
    found, some = jax.vmap(
      lambda k, x=x: objectives.hard_negatives(x, allowed, k)
    )(keys)
    assert some.all()
    shares = (np.asarray(found)[..., None] == np.arange(4)).mean(0)
    expected = array(layout, f"neg_prob_{name}")
    np.testing.assert_allclose(shares, expected, atol=5 / draws**0.5 / 2)


def test_a_text_like_ones_own_is_no_negative():
  logits = jnp.where(EQUAL, 50.0, LOGITS)
  keys = jax.random.split(jax.random.key(1), (50, 3))
  found, some = jax.vmap(
    lambda k: objectives.hard_negatives(logits, ~EQUAL, k)
  )(keys)
  assert some.all() and (found[:, :2] == 2).all()
  assert set(np.ravel(found[:, 2])) == {0, 1}


def test_without_a_negative_there_is_none():
  """All texts are equal; or there is one example."""
  for b in (3, 1):
    keys = jax.random.split(jax.random.key(0), b)
    none = jnp.zeros((b, b), bool)
    found, some = objectives.hard_negatives(jnp.ones((b, b)), none, keys)
    assert not some.any() and (found < b).all()


def test_draws_are_those_of_the_example():
  logits, keys = LOGITS, jax.random.split(jax.random.key(3), 3)
  allowed, order = ~jnp.eye(3, dtype=bool), jnp.array([2, 0, 1])
  found, _ = objectives.hard_negatives(logits, allowed, keys)
  again, _ = objectives.hard_negatives(
    logits[order], allowed[order], keys[order]
  )
  assert np.array_equal(found[order], again)


READINGS = {
  "mean_logits": "itm_loss",
  "each_query": "itm_loss_each_query",
  "mean_probability": "itm_loss_mean_probability",
}


@layouts
@pytest.mark.parametrize("reading", READINGS)
def test_readings_of_equation_4(layout, reading):
  logits = array(layout, "itm_logits_per_query")
  matched = jnp.arange(12) < 4
  loss = objectives.matching(logits, matched, reading).mean()
  np.testing.assert_allclose(loss, array(layout, READINGS[reading]), **LOSS)


def test_equation_4_with_its_other_half():
  """-mean(y log p + (1 - y) log(1 - p)), p of each query's match."""
  logits = jax.random.normal(jax.random.key(0), (2, 5, 2))
  p = np.asarray(jax.nn.softmax(logits))[..., 1]
  for y in (True, False):
    loss = objectives.matching(logits, jnp.array([y, y]), "each_query")
    expected = -np.log(p if y else 1 - p).mean(1)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


# --- Language ----------------------------------------------------------------


@layouts
@pytest.mark.parametrize("smoothing", [0, 0.1])
def test_language_is_blip2s(layout, smoothing):
  _, ids, mask = made.inputs(jnp.float32)
  loss = objectives.language(
    array(layout, "lm_logits"), ids, mask, float(smoothing)
  )
  expected = array(layout, f"lm_loss_smooth{smoothing}")
  np.testing.assert_allclose(loss, expected, **LOSS)


def test_language_of_no_text_is_nothing():
  _, ids, mask = made.inputs(jnp.float32)
  logits = array("coavt", "lm_logits")
  assert objectives.language(logits, ids, jnp.zeros_like(mask)) == 0
