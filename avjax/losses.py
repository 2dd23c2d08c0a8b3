"""Losses as pure functions, in float32 whatever they are given.

Classification losses return one value per example; `weighted_mean` makes the
scalar, so that padded or missing examples can be left out exactly.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Num, Shaped

from avjax import losses_pairs
from avjax.data.mixing import mixup


def weighted_mean(
  values: Float[Array, "*b"], weights: Shaped[Array, "*b"] | None = None
) -> Float[Array, ""]:
  """Sum of weight * value / sum of weights; 0 where all weights are 0.

  Args:
    values: one per example.
    weights: `valid`, `has_audio` or any weights; None = all one.
  """
  values = values.astype(jnp.float32)
  if weights is None:
    return values.mean()
  weights = weights.astype(jnp.float32)
  # A value without weight may be anything, even not finite.
  total = jnp.where(weights > 0, weights * values, 0.0).sum()
  count = weights.sum()
  return total / jnp.where(count > 0, count, 1.0)


# ---------------------------------------------------------------- labels


def smooth_labels(
  labels: Num[Array, "*b k"], smoothing: float
) -> Float[Array, "*b k"]:
  """y (1 - e) + e / k, also of multi-hot labels; after mixing, as in MBT."""
  labels = labels.astype(jnp.float32)
  return labels * (1 - smoothing) + smoothing / labels.shape[-1]


def mix_labels(
  labels: Float[Array, "b *k"], weight: Float[Array, "b"]
) -> Float[Array, "b *k"]:
  """Labels of a batch that `prepare` mixed.

  Args:
    labels: the unmixed labels of the batch.
    weight: `mix/audio` or `mix/video`: each modality has its own labels when
      the weights differ.
  """
  return mixup(labels, weight)


def assign_labels(
  labels: Float[Array, "b *k"],
  smoothing: float,
  weight: Float[Array, "b"] | None = None,
) -> Float[Array, "b *k"]:
  """Soft labels of CAV-MAE and what derives from it (public code).

  Every class starts at e/k. Unmixed, the labels of the example are *set* to
  1-e. Mixed, w (1-e) is *added* for its labels and (1-w) (1-e) for those of
  its partner, so one label each sums to 1.

  Args:
    labels: of the unmixed batch.
    smoothing: e.
    weight: `mix/audio` or `mix/video`, 1 = not mixed; None mixes nothing.
  """
  labels = labels.astype(jnp.float32)
  base = smoothing / labels.shape[-1]
  alone = jnp.where(labels > 0, labels * (1 - smoothing), base)
  if weight is None:
    return alone
  mixed = base + (1 - smoothing) * mix_labels(labels, weight)
  unmixed = (weight == 1).reshape(-1, *[1] * (labels.ndim - 1))
  return jnp.where(unmixed, alone, mixed)


# ---------------------------------------------------------------- classes


def softmax_cross_entropy(
  logits: Float[Array, "*b k"],
  labels: Num[Array, "*b k"],
  smoothing: float = 0.0,
) -> Float[Array, "*b"]:
  """-sum of smoothed label * log softmax."""
  logs = jax.nn.log_softmax(logits.astype(jnp.float32))
  return -(smooth_labels(labels, smoothing) * logs).sum(axis=-1)


def sigmoid_cross_entropy(
  logits: Float[Array, "*b k"],
  labels: Num[Array, "*b k"],
  smoothing: float = 0.0,
  *,
  mean: bool = False,
) -> Float[Array, "*b"]:
  """Binary cross-entropy summed over classes (AV-MAE, MBT).

  Args:
    logits: before the sigmoid.
    labels: multi-hot.
    smoothing: of both values, as `smooth_labels` has it.
    mean: average over the classes instead (CAV-MAE's family).
  """
  logits = logits.astype(jnp.float32)
  labels = smooth_labels(labels, smoothing)
  positive = labels * jax.nn.log_sigmoid(logits)
  negative = (1 - labels) * jax.nn.log_sigmoid(-logits)
  terms = -(positive + negative)
  return terms.mean(axis=-1) if mean else terms.sum(axis=-1)


def multi_head(
  logits: Mapping[str, Float[Array, "b *_"]],
  labels: Mapping[str, Num[Array, "b *_"]],
  smoothing: float = 0.0,
  *,
  multilabel: bool = False,
) -> Float[Array, "b"]:
  """Mean over the heads of each head's cross-entropy.

  Args:
    logits: by head; [b k], or [b t k] for a head per segment, which is
      averaged over the segments.
    labels: by head, same shapes; heads without logits are left out.
    smoothing: within each head.
    multilabel: sigmoid (summed over classes) instead of softmax.
  """
  loss = sigmoid_cross_entropy if multilabel else softmax_cross_entropy
  heads = []
  for name, values in logits.items():
    terms = loss(values, labels[name], smoothing)
    heads.append(terms.reshape(terms.shape[0], -1).mean(axis=-1))
  return jnp.stack(heads).mean(axis=0)


# ---------------------------------------------------------------- contrast


def at_least_float32(x: Float[Array, "*_"]) -> Float[Array, "*_"]:
  """Half precision as float32; anything finer stays as it is."""
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def unit(x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
  """x / max(|x|, 1e-12), float32 at least; the gradient at zero is finite."""
  x = at_least_float32(x)
  square = (x * x).sum(axis=-1, keepdims=True)
  return x * jax.lax.rsqrt(jnp.maximum(square, 1e-24))


def contrastive(
  anchors: Float[Array, "b d"],
  candidates: Float[Array, "b d"],
  temperature: float | Float[Array, ""],
  *,
  two_way: bool = False,
  group_size: int = 0,
  weights: Shaped[Array, "b"] | None = None,
  implementation: str = "auto",
) -> tuple[Float[Array, ""], Float[Array, ""]]:
  """InfoNCE of pairs: for each anchor, a softmax over the candidates.

  Args:
    anchors: pooled vectors of any length; cosines are compared.
    candidates: the pair of anchor i is candidate i.
    temperature: what cosines are divided by.
    two_way: the mean with the loss of candidates over anchors.
    group_size: negatives come from the same `group_size` consecutive examples
      alone; 0 = from the whole batch.
    weights: an example of weight 0 is neither anchor nor candidate.
    implementation: how devices share it, see `losses_pairs.compare`; the value
      does not depend on it.

  Returns:
    The mean over the anchors, and the share of the anchors whose pair is the
    most similar candidate.

  Raises:
    InputError: the batch is not divisible by the group size, or as
      `losses_pairs.compare`.
  """
  # Scaling the vectors costs b d, scaling the cosines b^2.
  rows, columns = unit(anchors) / temperature, unit(candidates)
  there, back, right = losses_pairs.compare(
    rows,
    columns,
    _counted(rows, weights),
    jnp.zeros((), rows.dtype),
    back=two_way,
    group_size=group_size,
    implementation=implementation,
  )
  own = (rows * columns).sum(axis=1)
  loss = (there + back) / 2 - own if two_way else there - own
  return _means(loss, right, weights)


def sigmoid_contrastive(
  anchors: Float[Array, "b d"],
  candidates: Float[Array, "b d"],
  temperature: float | Float[Array, ""],
  bias: float | Float[Array, ""],
  *,
  group_size: int = 0,
  weights: Shaped[Array, "b"] | None = None,
  implementation: str = "auto",
) -> tuple[Float[Array, ""], Float[Array, ""]]:
  """SigLIP's loss (arXiv:2303.15343): is this anchor's pair that candidate?

  -1/b sum_ij log sigmoid(z_ij (cos_ij / temperature + bias)), z = 1 for pairs
  and -1 for all others. It is the same in both directions. The paper learns
  both numbers, from temperature 1/10 and bias -10.

  Args:
    anchors: pooled vectors of any length; cosines are compared.
    candidates: the pair of anchor i is candidate i.
    temperature: what cosines are divided by.
    bias: added to what results.
    group_size: as in `contrastive`.
    weights: an example of weight 0 is neither anchor nor candidate, nor
      counted in b.
    implementation: as in `contrastive`.

  Returns:
    The loss, and the share of the anchors whose pair is the most similar
    candidate.

  Raises:
    InputError: as `contrastive`.
  """
  rows, columns = unit(anchors) / temperature, unit(candidates)
  bias = jnp.asarray(bias, rows.dtype)
  # All as if no pair, then the pairs put right: log sigmoid(x) = x + log
  # sigmoid(-x).
  there, _, right = losses_pairs.compare(
    rows,
    columns,
    _counted(rows, weights),
    bias,
    total="sigmoid",
    group_size=group_size,
    implementation=implementation,
  )
  own = (rows * columns).sum(axis=1) + bias
  return _means(there - own, right, weights)


def _counted(rows, weights):
  return jnp.ones(len(rows), bool) if weights is None else weights > 0


def _means(loss, right, weights):
  right = right.astype(jnp.float32)
  return weighted_mean(loss, weights), weighted_mean(right, weights)


# ---------------------------------------------------------------- pixels


def masked_mse(
  prediction: Float[Array, "b n d"],
  target: Float[Array, "b n d"],
  mask: Bool[Array, "b n"],
  weights: Shaped[Array, "b"] | None = None,
) -> Float[Array, ""]:
  """The reconstruction loss of one modality (AV-MAE, eq. 1; CAV-MAE).

  Squared error summed over the removed tokens of the batch, over their number
  (+1e-8), over the feature size: every removed token of the batch counts the
  same.

  Args:
    prediction: one row per token.
    target: raw or standardised patches.
    mask: true = removed, counted. All true counts the kept tokens as well.
    weights: per example, `valid` or `has_audio`/`has_video`.
  """
  return mean_error(masked_errors(prediction, target, mask), weights)


def masked_errors(
  prediction: Float[Array, "b n d"],
  target: Float[Array, "b n d"],
  mask: Bool[Array, "b n"],
) -> Float[Array, "b 2"]:
  """What `masked_mse` needs of each example.

  Returns:
    Squared error summed over the counted tokens, over the feature size; how
    many they are.
  """
  error = prediction.astype(jnp.float32) - target.astype(jnp.float32)
  error = jnp.where(mask, (error**2).mean(axis=-1), 0.0)
  return jnp.stack([error.sum(axis=1), mask.sum(axis=1, dtype=jnp.float32)], 1)


def mean_error(
  errors: Float[Array, "b 2"], weights: Shaped[Array, "b"] | None = None
) -> Float[Array, ""]:
  """`masked_mse` of a batch from its `masked_errors`."""
  if weights is not None:
    weights = weights.astype(jnp.float32)[:, None]
    # An error without weight may be anything, even not finite.
    errors = jnp.where(weights > 0, weights * errors, 0.0)
  total, count = errors.sum(axis=0)
  return total / (count + 1e-8)
