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

# Bytes of scores in one block of queries: small enough for the outer cache.
BLOCK_BYTES = 7 << 19


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
  # float64 stays: tests at that precision go this way.
  dtype = jnp.promote_types(scores.dtype, jnp.float32)
  probabilities = jax.nn.softmax(scores.astype(dtype)).astype(v.dtype)
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
  """Blocks of queries of one head; the backward pass starts from scratch.

  The loops are over heads and queries, never over examples, which may be on
  different devices.
  """
  return _blocked_forward(q, k, v)[0]


def _per_head(x):
  return x.transpose(2, 0, 1, 3)


def _from_heads(x):
  return x.transpose(1, 2, 0, 3)


def _block_size(q, k):
  """The largest divisor of the queries whose scores fit BLOCK_BYTES.

  Of one device: the batch is that of all, which share it in any large run.
  """
  b, n = -(-q.shape[1] // jax.device_count()), q.shape[2]
  most = max(1, BLOCK_BYTES // (4 * b * k.shape[2]))
  return max(size for size in range(1, n + 1) if n % size == 0 and size <= most)


def _cut(x, size):
  """[h b n d] -> [h n/size b size d]."""
  h, b, n, d = x.shape
  return x.reshape(h, b, n // size, size, d).transpose(0, 2, 1, 3, 4)


def _join(x):
  h, blocks, b, size, d = x.shape
  return x.transpose(0, 2, 1, 3, 4).reshape(h, b, blocks * size, d)


def _blocked_forward(q, k, v):
  q, k, v = (_per_head(x) for x in (q * q.shape[-1] ** -0.5, k, v))

  def head(args):
    q, k, v = args

    def block(q):
      scores = jnp.einsum("bnd,bmd->bnm", q, k).astype(jnp.float32)
      top = jnp.max(scores, -1, keepdims=True)
      weights = jnp.exp(scores - top)
      total = jnp.sum(weights, -1, keepdims=True)
      # Dividing n d numbers, not n m.
      o = jnp.einsum("bnm,bmd->bnd", weights.astype(v.dtype), v) / total
      return o.astype(v.dtype), top + jnp.log(total)

    return jax.lax.map(block, q)

  o, total = jax.lax.map(head, (_cut(q, _block_size(q, k)), k, v))
  o, total = _join(o), _join(total)
  return _from_heads(o), (q, k, v, o, total)


def _blocked_backward(saved, do):
  q, k, v, o, total = saved
  do = _per_head(do)
  shift = jnp.sum(do.astype(jnp.float32) * o, -1, keepdims=True)

  def head(args):
    q, k, v, do, total, shift = args

    def block(sums, args):
      q, do, total, shift = args
      p = jnp.exp(jnp.einsum("bnd,bmd->bnm", q, k) - total)
      ds = p * (jnp.einsum("bnd,bmd->bnm", do, v) - shift)
      p, ds = p.astype(q.dtype), ds.astype(q.dtype)
      # [b d m]: wide rows, of which XLA makes 50 GFLOP/s where it makes 31 of
      # [b m d].
      dk = sums[0] + jnp.einsum("bnm,bnd->bdm", ds, q)
      dv = sums[1] + jnp.einsum("bnm,bnd->bdm", p, do)
      return (dk, dv), jnp.einsum("bnm,bmd->bnd", ds, k) * q.shape[-1] ** -0.5

    zeros = jnp.zeros(k.swapaxes(1, 2).shape, jnp.float32)
    rows = (q, do, total, shift)
    (dk, dv), dq = jax.lax.scan(block, (zeros, zeros), rows)
    dk, dv = dk.swapaxes(1, 2), dv.swapaxes(1, 2)
    return dq, dk.astype(k.dtype), dv.astype(v.dtype)

  size = _block_size(q, k)
  cut = [_cut(x, size) for x in (q, do, total, shift)]
  dq, dk, dv = jax.lax.map(head, (cut[0], k, v, *cut[1:]))
  return tuple(_from_heads(x) for x in (_join(dq), dk, dv))


_blocked.defvjp(_blocked_forward, _blocked_backward)

IMPLEMENTATIONS = {
  "plain": _plain,
  "saved": _saved,
  "blocked": _blocked,
  "cudnn": _cudnn,
}
