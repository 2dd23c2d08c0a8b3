"""The objectives of CoAVT as pure functions (arXiv:2401.12264, §III-B).

Equations 1 to 5; what the paper leaves open is as in BLIP-2 (arXiv:2301.12597),
see `avjax/methods/coavt.py`. Everything is over the global batch.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from avjax import losses, losses_pairs
from avjax.nn.masking import Keys

TEMPERATURES = (1e-3, 0.5)
BLOCKED = -1e9  # finite, so that rows without candidates have gradients

Pairs = Bool[Array, "b b"]
Scalar = Float[Array, ""]


# --- Equations 1 to 3: contrast ----------------------------------------------


def similarity(
  queries: Float[Array, "b q p"], texts: Float[Array, "c p"]
) -> Float[Array, "b c"]:
  """s(X, T), equation 1: the most similar query of each clip and text.

  Args:
    queries: projected, of length 1.
    texts: [CLS], projected, of length 1.
  """
  exact = losses_pairs.EXACT
  return jnp.einsum("bqp,cp->bcq", queries, texts, precision=exact).max(-1)


def equal_texts(ids: Int[Array, "b l"], mask: Bool[Array, "b l"]) -> Pairs:
  """Whether two texts have the same words; of itself always."""
  ids = jnp.where(mask, ids, -1)
  return (ids[:, None] == ids[None]).all(-1)


def contrast(
  logits: Float[Array, "b b"],
  equal: Pairs,
  counted: Bool[Array, "b"],
  *,
  smoothing: float = 0.0,
  equals: str = "excluded",
) -> tuple[Scalar, Scalar]:
  """(L_X2T + L_T2X) / 2, equations 2 and 3, over the global batch.

  Args:
    logits: similarity / temperature, clips by texts.
    equal: pairs of clips with equal texts.
    counted: which examples ask and are asked for.
    smoothing: share of the label that is spread over all candidates.
    equals: what a text is to another clip with an equal one, see
      `coavt_config.EQUAL_TEXTS`.

  Returns:
    The mean over the examples, and the share of right answers (an equal text
    is right) of both directions.
  """
  own = jnp.eye(len(logits), dtype=bool)
  right = equal if equals == "positive" else own
  seen = ~equal | own if equals == "excluded" else jnp.ones_like(equal)
  seen, right = seen & counted[None], right & counted[None]
  shares = [x / jnp.maximum(x.sum(1, keepdims=True), 1) for x in (right, seen)]
  label = (1 - smoothing) * shares[0] + smoothing * shares[1]

  def one_way(logits):
    total = jax.nn.logsumexp(jnp.where(seen, logits, BLOCKED), axis=1)
    loss = total - jnp.where(seen, label * logits, 0.0).sum(1)
    best = jnp.where(counted[None], logits, BLOCKED).argmax(1)
    hit = jnp.take_along_axis(equal, best[:, None], axis=1)[:, 0]
    return losses.weighted_mean(loss, counted), losses.weighted_mean(
      hit.astype(jnp.float32), counted
    )

  ways = [one_way(logits), one_way(logits.T)]
  loss, hits = (sum(x) / 2 for x in zip(*ways, strict=True))
  return loss, hits


@jax.custom_vjp
def bounded(temperature: Scalar) -> Scalar:
  """Within TEMPERATURES; outside, gradients lead back alone."""
  return jnp.clip(temperature, *TEMPERATURES)


def _bounded_backward(temperature, gradient):
  low, high = TEMPERATURES
  outward = jnp.where(
    temperature < low, gradient > 0, (temperature > high) & (gradient < 0)
  )
  return (jnp.where(outward, 0.0, gradient),)


bounded.defvjp(lambda x: (bounded(x), x), _bounded_backward)


# --- Equation 4: matching ----------------------------------------------------


def hard_negatives(
  logits: Float[Array, "b b"], allowed: Pairs, keys: Keys
) -> tuple[Int[Array, "b"], Bool[Array, "b"]]:
  """For each row one column that does not belong to it.

  Columns are drawn with their softmax, every row with its own key, so draws do
  not depend on the devices.

  Args:
    logits: similarity / temperature.
    allowed: which columns may be drawn.
    keys: one per row.

  Returns:
    The columns, and whether the row had any to draw from.
  """
  columns = logits.shape[1]
  noise = jax.vmap(lambda key: jax.random.gumbel(key, (columns,)))(keys)
  drawn = jnp.where(allowed, logits + noise, -jnp.inf)
  return jax.lax.stop_gradient(drawn).argmax(1), allowed.any(1)


def matching(
  logits: Float[Array, "*b q 2"], matched: Bool[Array, "*b"], reading: str
) -> Float[Array, "*b"]:
  """L_XTM of every pair in three readings of equation 4.

  Args:
    logits: of (no match, match) per query.
    matched: y.
    reading: `mean_logits` takes the cross-entropy of the mean logits (BLIP-2);
      `mean_probability` -log of the mean probability, as the text has it;
      `each_query` the mean of the queries' cross-entropies: the formula with
      its minus sign and its other half, -mean(y log p + (1-y) log(1-p)).
  """
  if reading == "mean_logits":
    logits = logits.mean(-2, keepdims=True)
  log = jax.nn.log_softmax(logits)
  log = jnp.where(matched[..., None], log[..., 1], log[..., 0])
  if reading == "mean_probability":
    return jnp.log(log.shape[-1]) - jax.nn.logsumexp(log, axis=-1)
  return -log.mean(-1)


# --- Equation 5: language modelling ------------------------------------------


def language(
  logits: Float[Array, "b l k"],
  ids: Int[Array, "b l"],
  mask: Bool[Array, "b l"],
  smoothing: float = 0.0,
) -> Scalar:
  """L_XLM: each word from those before it, the mean over the words.

  Args:
    logits: of the word that follows.
    ids: words; the first, [CLS] or [DEC], is given.
    mask: which words count.
    smoothing: share of the label that is spread over the vocabulary.
  """
  logits, targets = logits[:, :-1], ids[:, 1:]
  right = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
  label = (1 - smoothing) * right + smoothing * logits.mean(-1)
  loss = jax.nn.logsumexp(logits, axis=-1) - label
  return losses.weighted_mean(loss, mask[:, 1:])
