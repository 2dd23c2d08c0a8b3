"""Scores against literal numbers and the public implementation's."""

import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avjax import metrics
from avjax.errors import InputError

DATA = pathlib.Path(__file__).parent / "data"
GOLDEN = np.load(DATA / "avmae_tiny_mbt.npz")


def test_means_are_exact_over_padded_batches():
  means = metrics.Means()
  weights = jnp.array([1.0, 1.0, 1.0])
  means.add({"loss": metrics.pair(jnp.array([1.0, 2.0, 6.0]), weights)})
  padded = jnp.array([True, False, False])
  values = jnp.array([5.0, 100.0, jnp.nan])
  means.add({"loss": metrics.pair(values, padded)})
  assert means.result() == {"loss": 3.5}


def test_a_mean_of_nothing_is_left_out():
  means = metrics.Means()
  means.add({"loss": metrics.pair(jnp.ones(2), jnp.zeros(2))})
  assert means.result() == {}


@pytest.mark.parametrize(
  "label, expected", [(1, [True, True, True]), (3, [False, False, True])]
)
def test_top_k(label, expected):
  logits = jnp.array([[0.1, 0.9, 0.3, 0.2]])
  labels = jnp.eye(4)[label][None]
  found = [bool(metrics.in_top_k(logits, labels, k)[0]) for k in (1, 2, 3)]
  assert found == expected


def test_of_equal_scores_the_lower_class_comes_first():
  logits = jnp.array([[0.5, 0.5, 0.5]])
  for label, ranks in enumerate([(1, 2, 3), (2, 3), (3,)]):
    labels = jnp.eye(3)[label][None]
    found = [k for k in (1, 2, 3) if metrics.in_top_k(logits, labels, k)[0]]
    assert tuple(found) == ranks
  values, order = jax.lax.top_k(logits[0], 3)
  assert order.tolist() == [0, 1, 2]


def test_not_a_number_is_never_right():
  labels = jnp.eye(2)
  both = jnp.full((2, 2), jnp.nan)
  assert not metrics.in_top_k(both, labels, 1).any()
  other = jnp.array([[1.0, jnp.nan], [jnp.nan, 1.0]])
  assert not metrics.in_top_k(other, labels, 1).any()
  own = jnp.array([[jnp.nan, 1.0], [1.0, jnp.nan]])
  assert not metrics.in_top_k(own, labels, 2).any()


def test_top_5_of_four_classes_is_refused():
  with pytest.raises(InputError, match="top-5 accuracy of 4 classes"):
    metrics.in_top_k(jnp.zeros((1, 4)), jnp.eye(4)[:1], 5)


def heads():
  logits = jnp.asarray(GOLDEN["mbt/multihead/eval_logits"])
  labels = jnp.asarray(GOLDEN["mbt/multihead/metric_labels"])
  split = {"noun": slice(0, 7), "verb": slice(7, 12)}
  return {k: (logits[:, s], labels[:, s]) for k, s in split.items()}


def test_golden_joint_scores():
  noun, verb = heads()["noun"], heads()["verb"]
  scores = jnp.exp(metrics.joint_logits(noun[0], verb[0]))
  np.testing.assert_allclose(
    scores, GOLDEN["mbt/multihead/joint_scores"], atol=1e-5
  )
  labels = metrics.joint_labels(noun[1], verb[1])
  np.testing.assert_array_equal(
    labels.argmax(axis=-1), GOLDEN["mbt/multihead/joint_labels"]
  )


@pytest.mark.parametrize("top, suffix", [(1, ""), (5, "_top_5")])
@pytest.mark.parametrize("head", ["noun", "verb", "noun-verb"])
def test_golden_accuracies(head, top, suffix):
  if head in heads():
    logits, labels = heads()[head]
  else:
    (noun, noun_labels), (verb, verb_labels) = heads().values()
    logits = metrics.joint_logits(noun, verb)
    labels = metrics.joint_labels(noun_labels, verb_labels)
  found = metrics.in_top_k(logits, labels, top)
  golden = GOLDEN[f"mbt/multihead/metric_{head}_accuracy{suffix}"]
  assert metrics.pair(found, jnp.ones(2)) == tuple(golden)


def test_joint_logits_do_not_underflow():
  extreme = jnp.array([[0.0, -80.0, -90.0]])
  scores = metrics.joint_logits(extreme, extreme)
  assert len(set(np.asarray(scores[0]).tolist())) == 6  # symmetric, not tied


def test_segments():
  labels = np.zeros((1, 4, 3), np.float32)
  labels[0, 0, 2] = labels[0, 1, 0] = labels[0, 2, 1] = 1  # the last has none
  logits = np.zeros((1, 4, 3), np.float32)
  logits[0, 0, 2] = logits[0, 1, 1] = logits[0, 2, 1] = 5
  right, known = metrics.segment_correct(jnp.array(logits), jnp.array(labels))
  assert right[0, :3].tolist() == [True, False, True]
  assert known[0].tolist() == [True, True, True, False]
  assert metrics.pair(right, known) == (2, 3)


def test_average_precision_literal():
  scores = np.array([[0.9], [0.8], [0.7], [0.6]])
  labels = np.array([[1], [0], [1], [0]])
  found = metrics.ranking(scores, labels)
  assert found.mean_ap == pytest.approx((1 / 1 + 2 / 3) / 2)
  assert found.mean_auc == pytest.approx(3 / 4)


def test_tied_scores_share_one_threshold():
  scores = np.array([[0.5], [0.5], [0.5], [0.1]])
  for order in ([1, 0, 0, 0], [0, 0, 1, 0]):
    found = metrics.ranking(scores, np.array(order)[:, None])
    assert found.mean_ap == pytest.approx(1 / 3)
    assert found.mean_auc == pytest.approx((1 + 0.5 + 0.5) / 3)


def test_classes_without_positives_are_left_out_and_counted():
  scores = np.array([[0.9, 0.1, 0.3], [0.2, 0.5, 0.4]])
  labels = np.array([[1, 0, 1], [0, 0, 1]])
  found = metrics.ranking(scores, labels)
  assert found.mean_ap == 1.0  # of classes 0 and 2
  assert found.left_out_ap == 1
  assert found.mean_auc == 1.0  # of class 0
  assert found.left_out_auc == 2


def test_d_prime():
  assert metrics.d_prime(0.5) == 0
  assert metrics.d_prime(1.0) == math.inf
  # Phi(1) = .8413447
  assert metrics.d_prime(0.8413447) == pytest.approx(math.sqrt(2), abs=1e-5)


def test_broken_scores_and_empty_labels_are_refused():
  labels = np.eye(2)
  with pytest.raises(InputError, match="1 of 2 examples"):
    metrics.ranking(np.array([[0.0, 1.0], [np.nan, 1.0]]), labels)
  with pytest.raises(InputError, match="none of 2 classes"):
    metrics.ranking(np.eye(2), np.zeros((2, 2)))
