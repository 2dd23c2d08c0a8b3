"""Losses against literal numbers and the public implementation's."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avjax import losses

DATA = pathlib.Path(__file__).parent / "data"
MBT = np.load(DATA / "avmae_tiny_mbt.npz")
MAE = np.load(DATA / "avmae_tiny.npz")
MODALITIES = ("rgb", "spectrogram")


def close(value, golden):
  np.testing.assert_allclose(float(value), float(golden), rtol=1e-5)


def test_weighted_mean():
  values = jnp.array([1.0, 3.0, jnp.nan])
  assert losses.weighted_mean(values[:2]) == 2
  assert losses.weighted_mean(values, jnp.array([True, True, False])) == 2
  assert losses.weighted_mean(values, jnp.zeros(3)) == 0


def test_smoothing():
  smooth = losses.smooth_labels(jnp.array([0.0, 1.0, 0.0, 0.0]), 0.2)
  np.testing.assert_allclose(smooth, [0.05, 0.85, 0.05, 0.05], rtol=1e-6)


def test_mix_labels_uses_the_neighbour():
  mixed = losses.mix_labels(jnp.eye(4), jnp.array([0.75, 0.75, 1.0, 0.5]))
  np.testing.assert_allclose(
    mixed,
    [[0.75, 0.25, 0, 0], [0.25, 0.75, 0, 0], [0, 0, 1, 0], [0, 0, 0.5, 0.5]],
  )


def test_softmax_literal():
  value = losses.softmax_cross_entropy(
    jnp.array([[0.0, np.log(3.0)]]), jnp.array([[0, 1]])
  )
  close(value[0], np.log(4 / 3))


def test_sigmoid_literal_sum_and_mean():
  logits = jnp.array([[0.0, np.log(3.0), -200.0]])
  labels = jnp.array([[1.0, 1.0, 0.0]])
  total = np.log(2) + np.log(4 / 3)
  close(losses.sigmoid_cross_entropy(logits, labels)[0], total)
  close(losses.sigmoid_cross_entropy(logits, labels, mean=True)[0], total / 3)


def test_bfloat16_logits_give_a_float32_loss():
  logits = jnp.array([[1.0, 2.0]], jnp.bfloat16)
  labels = jnp.array([[0.0, 1.0]])
  for loss in (losses.softmax_cross_entropy, losses.sigmoid_cross_entropy):
    assert loss(logits, labels).dtype == jnp.float32


def labels_of(kind, modality):
  if kind.startswith("sigmoid"):
    labels = jnp.asarray(MBT["inputs/multi"])
  else:
    labels = jax.nn.one_hot(MBT["inputs/cls"], 7)
  if kind.endswith("mixed"):
    # In a batch of two the neighbour is the reversed batch.
    weight = {"rgb": 0.8, "spectrogram": 0.35}[modality]
    labels = losses.mix_labels(labels, jnp.full(2, weight))
  return labels


@pytest.mark.parametrize("smoothing", [0, 0.3])
@pytest.mark.parametrize(
  "kind", ["softmax", "softmax_mixed", "sigmoid", "sigmoid_mixed"]
)
def test_golden_mbt_losses(kind, smoothing):
  values = [
    losses.multi_head(
      {"label": jnp.asarray(MBT[f"mbt/bottleneck/train_logits_{modality}"])},
      {"label": labels_of(kind, modality)},
      float(smoothing),
      multilabel=kind.startswith("sigmoid"),
    ).mean()
    for modality in MODALITIES
  ]
  close(np.mean(values), MBT[f"mbt/bottleneck/loss_{kind}_s{smoothing}"])


def test_golden_mbt_weights_and_evaluation():
  labels = jax.nn.one_hot(MBT["inputs/cls"], 7)
  weights = jnp.array([1.0, 0.0])
  values = []
  for modality in MODALITIES:
    logits = jnp.asarray(MBT[f"mbt/bottleneck/train_logits_{modality}"])
    each = losses.softmax_cross_entropy(logits, labels)
    close(each.mean(), MBT[f"mbt/bottleneck/loss_softmax_s0_only_{modality}"])
    values.append(losses.weighted_mean(each, weights))
  close(np.mean(values), MBT["mbt/bottleneck/loss_softmax_s0_batch_mask_last0"])
  logits = jnp.asarray(MBT["mbt/bottleneck/eval_logits"])
  evaluated = losses.softmax_cross_entropy(logits, labels).mean()
  close(evaluated, MBT["mbt/bottleneck/loss_softmax_s0_eval"])


@pytest.mark.parametrize("smoothing", [0, 0.2])
def test_golden_multi_head(smoothing):
  labels = {
    "noun": jax.nn.one_hot(MBT["inputs/head_a"], 7),
    "verb": jax.nn.one_hot(MBT["inputs/head_b"], 5),
  }
  values = []
  for modality in MODALITIES:
    logits = jnp.asarray(MBT[f"mbt/multihead/train_logits_{modality}"])
    heads = {"noun": logits[:, :7], "verb": logits[:, 7:]}
    values.append(losses.multi_head(heads, labels, float(smoothing)).mean())
    golden = MBT[f"mbt/multihead/loss_s{smoothing}_only_{modality}"]
    close(values[-1], golden)
  close(np.mean(values), MBT[f"mbt/multihead/loss_s{smoothing}"])


def test_segments_are_averaged():
  logits = {"segment": jnp.array([[[0.0, 0.0], [0.0, np.log(3.0)]]])}
  labels = {"segment": jnp.array([[[1.0, 0.0], [0.0, 1.0]]])}
  value = losses.multi_head(logits, labels)
  close(value[0], (np.log(2) + np.log(4 / 3)) / 2)


def test_masked_mse_literal():
  prediction = jnp.array([[[1.0, 1.0], [9.0, 9.0]], [[2.0, 0.0], [0.0, 3.0]]])
  mask = jnp.array([[True, False], [True, True]])
  # (2 + 4 + 9) / 3 tokens / 2 features
  value = losses.masked_mse(prediction, jnp.zeros((2, 2, 2)), mask)
  close(value, 2.5)
  only_first = losses.masked_mse(
    prediction, jnp.zeros((2, 2, 2)), mask, jnp.array([True, False])
  )
  close(only_first, 1.0)
  nothing = losses.masked_mse(
    prediction, jnp.zeros((2, 2, 2)), jnp.zeros((2, 2), bool)
  )
  assert nothing == 0


def targets():
  """Raw patches of the goldens' inputs: (t h w) and (pt ph pw c)."""
  rng = np.random.default_rng(77)
  rgb = rng.uniform(-1, 1, (2, 4, 32, 32, 3)).astype(np.float32)
  mel = rng.standard_normal((2, 80, 32)).astype(np.float32)
  rgb = rgb.reshape(2, 2, 2, 2, 16, 2, 16, 3).transpose(0, 1, 3, 5, 2, 4, 6, 7)
  mel = mel.reshape(2, 5, 16, 2, 16).transpose(0, 1, 3, 2, 4)
  return {
    "rgb": jnp.asarray(rgb.reshape(2, 8, -1)),
    "spectrogram": jnp.asarray(mel.reshape(2, 10, -1)),
  }


@pytest.mark.parametrize(
  "name, everything, weights",
  [
    ("loss_raw", False, None),
    ("loss_unmasked_too", True, None),
    ("loss_batch_mask_last0", False, jnp.array([1.0, 0.0])),
  ],
)
def test_golden_reconstruction_losses(name, everything, weights):
  values = []
  for modality, target in targets().items():
    mask = jnp.asarray(MAE[f"masks/binary_{modality}"]) > 0
    values.append(
      losses.masked_mse(
        jnp.asarray(MAE[f"mae/mid_dshared/pred_{modality}"]),
        target,
        jnp.ones_like(mask) if everything else mask,
        weights,
      )
    )
  values.append((values[0] + values[1]) / 2)
  golden = MAE[f"mae/mid_dshared/{name}"]
  np.testing.assert_allclose(np.stack(values), golden, rtol=1e-5)
