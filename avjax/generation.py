"""Text from a model of the next token: greedily, or by beam search.

The model is a function of one step, which reads a token and returns the logits
of the one after it, and a state with what it has read:

  step(state, token [b], position []) -> (logits [b V], state)

Leaves of the state begin with the batch dimension, rows of a beam follow each
other there: [(b k) …]. A search moves the state with its rows, so what stays
the same for an example belongs into the function. Position 0 reads `start`.
Both searches are bounded by `length` steps and run within jit.
"""

import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int

from avjax.errors import InputError

State = Any  # pytree of arrays [b …]
Step = Callable[[State, Array, Array], tuple[Array, State]]


def captions(
  method: Any,
  params: Any,
  media: Mapping[str, Array],
  tokenizer: Any,
  *,
  length: int,
  beams: int = 1,
  length_penalty: float = 1.0,
) -> tuple[Int[Array, "b l"], Float[Array, "b"]]:
  """What a method writes about clips.

  Args:
    method: with `caption_start(params, tokens [b s w], length)` -> what stays
      as it is, and a state, [b …]; and `caption_step(params, fixed, state,
      token [b], position)` -> logits and the state.
    params: of the method.
    media: of its `encode_media`.
    tokenizer: of `avjax.data.text`; special tokens are not written.
    length: tokens at most.
    beams: of the beam search; 1 = greedily.
    length_penalty: see `score`.

  Returns:
    Tokens, and the score of each row.

  Raises:
    InputError: the model has no tokens to ask, or there are no beams.
  """
  if beams < 1:
    raise InputError(f"beams={beams}: at least 1")
  if "tokens" not in media:
    raise InputError(
      f"method {type(method).__name__} has no tokens to be captioned"
    )
  fixed, state = method.caption_start(params, media["tokens"], length)
  # Once, not in every step: all rows of an example see the same of it.
  fixed = jax.tree.map(lambda x: jnp.repeat(x, beams, axis=0), fixed)
  step = functools.partial(method.caption_step, params, fixed)
  own = tokenizer
  options = {
    "start": own.dec,
    "end": own.sep,
    "pad": own.pad,
    "length": length,
    "banned": (own.pad, own.unk, own.cls, own.dec),
    "length_penalty": length_penalty,
  }
  if beams == 1:
    return greedy(step, state, **options)
  return beam(step, state, beams=beams, **options)


def greedy(
  step: Step,
  state: State,
  *,
  start: int,
  end: int,
  pad: int,
  length: int,
  banned: Sequence[int] = (),
  length_penalty: float = 1.0,
) -> tuple[Int[Array, "b l"], Float[Array, "b"]]:
  """The most probable token at each place.

  Args:
    step: of the model.
    state: with which it begins.
    start: token read first; it is not part of the result.
    end: token after which a row stops.
    pad: what stands behind it.
    length: tokens of a text at most, the end among them.
    banned: tokens that are never written; the others share their probability.
    length_penalty: see `score`.

  Returns:
    Tokens, and the score of each row.
  """
  first = jax.tree.leaves(state)[0]
  b = first.shape[0]

  def going(carry: tuple) -> Bool[Array, ""]:
    place, _, done, *_ = carry
    return (place < length) & ~done.all()

  def body(carry: tuple) -> tuple:
    place, token, done, ids, logprob, count, state = carry
    logits, state = step(state, token, place)
    found = _logprobs(logits, banned)
    best = found.argmax(axis=-1).astype(jnp.int32)
    token = jnp.where(done, pad, best)
    logprob += jnp.where(done, 0.0, found.max(axis=-1))
    count += ~done
    ids = ids.at[:, place].set(token)
    return place + 1, token, done | (token == end), ids, logprob, count, state

  ids = jnp.full((b, length), pad, jnp.int32)
  begin = jnp.full(b, start, jnp.int32)
  zeros, none = jnp.zeros(b), jnp.zeros(b, bool)
  counts = jnp.zeros(b, jnp.int32)
  carry = (jnp.int32(0), begin, none, ids, zeros, counts, state)
  *_, ids, logprob, count, _ = jax.lax.while_loop(going, body, carry)
  return ids, score(logprob, count, length_penalty)


def score(
  logprob: Float[Array, "*b"], length: Int[Array, "*#b"], penalty: float
) -> Float[Array, "*b"]:
  """log p / length^penalty: 0 = the sum over the tokens, 1 = their mean.

  Without a penalty short texts win, since every token costs probability.
  """
  return logprob / length.astype(jnp.float32) ** penalty


class _Beams(NamedTuple):
  """Rows of each example: those that go on, and those that have ended.

  Attributes:
    place: number of tokens written.
    ids: of the rows that go on, [b k l].
    logprob: of these; -inf = no row. The first is the best.
    ended: rows with their end, [b k l].
    scores: of these; -inf = no row.
    done: whether the search is over.
    state: of the model, [(b k) …].
  """

  place: Int[Array, ""]
  ids: Int[Array, "b k l"]
  logprob: Float[Array, "b k"]
  ended: Int[Array, "b k l"]
  scores: Float[Array, "b k"]
  done: Bool[Array, "b"]
  state: State


def beam(
  step: Step,
  state: State,
  *,
  start: int,
  end: int,
  pad: int,
  length: int,
  beams: int,
  banned: Sequence[int] = (),
  length_penalty: float = 1.0,
) -> tuple[Int[Array, "b l"], Float[Array, "b"]]:
  """The best text of a search that keeps the `beams` most probable beginnings.

  An end counts where it is among the `beams` most probable continuations. A
  row's search is over when as many texts have ended as there are beams and the
  best of those that go on scores no better than any of these; the best of them
  wins. Only where none has ended within `length` is it a text without an end.
  One beam is the greedy search.

  Args:
    beams: k, at least 1.
    step, state, start, end, pad, length, banned, length_penalty: see `greedy`.

  Returns:
    Tokens, and the score of each row.
  """
  b = jax.tree.leaves(state)[0].shape[0]
  none = jnp.full((b, beams), -jnp.inf)
  ids = jnp.full((b, beams, length), pad, jnp.int32)
  carry = _Beams(
    place=jnp.int32(0),
    ids=ids,
    logprob=none.at[:, 0].set(0.0),
    ended=ids,
    scores=none,
    done=jnp.zeros(b, bool),
    state=jax.tree.map(lambda x: jnp.repeat(x, beams, axis=0), state),
  )
  body = functools.partial(
    _widen, step, start=start, end=end, banned=banned, penalty=length_penalty
  )
  found = jax.lax.while_loop(
    lambda at: (at.place < length) & ~at.done.all(), body, carry
  )
  best = found.scores.argmax(axis=1)
  ended = _rows(found.ended, best[:, None])[:, 0]
  scores = found.scores.max(axis=1)
  some = jnp.isfinite(scores)
  rest = score(found.logprob[:, 0], jnp.int32(length), length_penalty)
  ids = jnp.where(some[:, None], ended, found.ids[:, 0])
  return ids, jnp.where(some, scores, rest)


def _widen(
  step: Step,
  at: _Beams,
  *,
  start: int,
  end: int,
  banned: Sequence[int],
  penalty: float,
) -> _Beams:
  """Every row by one token."""
  b, k, _ = at.ids.shape
  last = at.ids[:, :, jnp.maximum(at.place - 1, 0)]
  token = jnp.where(at.place == 0, start, last)
  logits, state = step(at.state, token.reshape(-1), at.place)
  more = rearrange(_logprobs(logits, banned), "(b k) v -> b k v", b=b)
  # At most one in k continuations is an end, so k others are among 2k.
  size = more.shape[-1]
  logprob, place = jax.lax.top_k(
    (at.logprob[:, :, None] + more).reshape(b, -1), min(2 * k, k * size)
  )
  parent, token = place // size, place % size
  ids = _rows(at.ids, parent).at[:, :, at.place].set(token)
  over = token == end
  # Ends join those that have ended, unless these are complete.
  counts = over & (jnp.arange(over.shape[1]) < k) & ~at.done[:, None]
  new = jnp.where(counts, score(logprob, at.place + 1, penalty), -jnp.inf)
  scores, kept = jax.lax.top_k(jnp.concatenate([at.scores, new], axis=1), k)
  ended = _rows(jnp.concatenate([at.ended, ids], axis=1), kept)
  # The others go on, with the state of the row that they come from.
  logprob, kept = jax.lax.top_k(jnp.where(over, -jnp.inf, logprob), k)
  source = jnp.take_along_axis(parent, kept, axis=1)
  flat = (source + k * jnp.arange(b)[:, None]).reshape(-1)
  state = jax.tree.map(operator.itemgetter(flat), state)
  hope = score(logprob[:, 0], at.place + 1, penalty)
  done = at.done | (hope <= scores.min(axis=1))
  ids = _rows(ids, kept)
  return _Beams(at.place + 1, ids, logprob, ended, scores, done, state)


def _rows(
  x: Int[Array, "b n l"], rows: Int[Array, "b k"]
) -> Int[Array, "b k l"]:
  return jnp.take_along_axis(x, rows[:, :, None], axis=1)


def _logprobs(
  logits: Float[Array, "b v"], banned: Sequence[int]
) -> Float[Array, "b v"]:
  logits = logits.astype(jnp.float32)
  if banned:
    logits = logits.at[:, jnp.array(list(banned))].set(-jnp.inf)
  return jax.nn.log_softmax(logits)
