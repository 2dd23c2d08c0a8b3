"""Scaled dot-product attention, by the implementation that is fastest.

All implementations give the same values; the softmax is in float32. Which one
wins depends on the backend and on the number of tokens (`CHOICES`, measured).
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from avjax.errors import lookup

# Backend -> rows of (largest number of keys, implementation), first that fits.
# CPU: below about 300 tokens the probabilities of all heads fit the cache and
# are kept for the backward pass; above, blocks of queries are recomputed.
# GPU: cuDNN's fused kernel has no advantage at a few hundred tokens.
CHOICES = {
  "cpu": ((300, "saved"), (math.inf, "blocked")),
  "gpu": ((256, "plain"), (math.inf, "cudnn")),
  "tpu": ((math.inf, "plain"),),
}


def attention(
  q: Float[Array, "b n h d"],
  k: Float[Array, "b m h d"],
  v: Float[Array, "b m h d"],
  *,
  implementation: str = "auto",
) -> Float[Array, "b n h d"]:
  """softmax(q kᵀ / √d) v per head, without mask.

  Args:
    q: queries.
    k: keys; their number may differ from that of the queries.
    v: values.
    implementation: a name in `IMPLEMENTATIONS`, or 'auto'.

  Raises:
    InputError: no such implementation.
  """
  if implementation == "auto":
    implementation = choose(jax.default_backend(), k.shape[1], q)
  return lookup(IMPLEMENTATIONS, implementation, "attention")(q, k, v)


def choose(backend: str, tokens: int, q: Float[Array, "b n h d"]) -> str:
  """The implementation for this backend, number of keys and dtype."""
  rows = CHOICES.get(backend, CHOICES["tpu"])
  name = next(name for limit, name in rows if tokens <= limit)
  # cuDNN knows half precision and head dimensions in steps of 8 up to 128.
  head = q.shape[-1]
  if name == "cudnn" and (q.dtype.itemsize != 2 or head % 8 or head > 128):
    return "plain"
  return name


def _plain(q, k, v):
  """Einsum and autodiff: XLA fuses the rest."""
  scores = jnp.einsum("bnhd,bmhd->bhnm", q * q.shape[-1] ** -0.5, k)
  probabilities = jax.nn.softmax(scores.astype(jnp.float32)).astype(v.dtype)
  return jnp.einsum("bhnm,bmhd->bnhd", probabilities, v)


def _cudnn(q, k, v):
  return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")


def _heads_first(x):
  return x.transpose(0, 2, 1, 3)


def _scores(q, k):
  return jnp.einsum("bhnd,bhmd->bhnm", q, k).astype(jnp.float32)


# The gradient of softmax(s) with respect to s is p * (dp - rowsum(do * o)):
# a sum over the head dimension in place of one over the keys.
def _score_gradient(p, do, o, v):
  dp = jnp.einsum("bhnd,bhmd->bhnm", do, v).astype(jnp.float32)
  do, o = do.astype(jnp.float32), o.astype(jnp.float32)
  return p * (dp - jnp.sum(do * o, -1, keepdims=True))


@jax.custom_vjp
def _saved(q, k, v):
  """Keeps the probabilities of all heads for the backward pass."""
  return _saved_forward(q, k, v)[0]


def _saved_forward(q, k, v):
  q, k, v = (_heads_first(x) for x in (q * q.shape[-1] ** -0.5, k, v))
  p = jax.nn.softmax(_scores(q, k)).astype(v.dtype)
  o = jnp.einsum("bhnm,bhmd->bhnd", p, v)
  return _heads_first(o), (q, k, v, p, o)


def _saved_backward(saved, do):
  q, k, v, p, o = saved
  do = _heads_first(do)
  ds = _score_gradient(p, do, o, v).astype(q.dtype)
  dq = jnp.einsum("bhnm,bhmd->bhnd", ds, k) * q.shape[-1] ** -0.5
  dk = jnp.einsum("bhnm,bhnd->bhmd", ds, q)
  dv = jnp.einsum("bhnm,bhnd->bhmd", p, do)
  return tuple(_heads_first(x) for x in (dq, dk, dv))


_saved.defvjp(_saved_forward, _saved_backward)


@jax.custom_vjp
def _blocked(q, k, v):
  """One head at a time; the backward pass recomputes the probabilities."""
  return _blocked_forward(q, k, v)[0]


def _per_head(x):
  """[b n h d] -> [h b 1 n d]: a loop over heads keeps b, which is sharded."""
  return x.transpose(2, 0, 1, 3)[:, :, None]


def _from_heads(x):
  return x[:, :, 0].transpose(1, 2, 0, 3)


def _blocked_forward(q, k, v):
  q, k, v = (_per_head(x) for x in (q * q.shape[-1] ** -0.5, k, v))

  def one(head):
    q, k, v = head
    scores = _scores(q, k)
    total = jax.nn.logsumexp(scores, -1, keepdims=True)
    p = jnp.exp(scores - total).astype(v.dtype)
    return jnp.einsum("bhnm,bhmd->bhnd", p, v), total

  o, total = jax.lax.map(one, (q, k, v))
  return _from_heads(o), (q, k, v, o, total)


def _blocked_backward(saved, do):
  q, k, v, o, total = saved

  def one(head):
    q, k, v, o, total, do = head
    p = jnp.exp(_scores(q, k) - total)
    ds = _score_gradient(p, do, o, v).astype(q.dtype)
    dq = jnp.einsum("bhnm,bhmd->bhnd", ds, k) * q.shape[-1] ** -0.5
    dk = jnp.einsum("bhnm,bhnd->bhmd", ds, q)
    return dq, dk, jnp.einsum("bhnm,bhnd->bhmd", p.astype(do.dtype), do)

  grads = jax.lax.map(one, (q, k, v, o, total, _per_head(do)))
  return tuple(_from_heads(x) for x in grads)


_blocked.defvjp(_blocked_forward, _blocked_backward)

IMPLEMENTATIONS = {
  "plain": _plain,
  "saved": _saved,
  "blocked": _blocked,
  "cudnn": _cudnn,
}
