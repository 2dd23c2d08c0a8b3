"""Every anchor against every candidate of a batch that devices share.

Contrastive losses need, for each anchor, a total over all candidates: the log
of a sum of exponentials (InfoNCE), or a sum of softplus (SigLIP). Each device
keeps its anchors; what moves are the candidates, once there and their gradient
once back: 2 b d (n - 1) / n numbers for n devices, where gathering both sides
moves twice that and summing the gradient on all devices half as much again.

- `plain`: one matrix of cosines; XLA decides what moves.
- `gather`: candidates are gathered, their gradients sent home summed.
- `ring`: blocks of candidates go round the devices, met by running totals, so
  that a device holds cosines of [b/n b/n], not [b/n b].

Candidates are kept for the backward pass (b d numbers a device), cosines are
computed again.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float

from avjax import parallel
from avjax.errors import InputError, lookup

IMPLEMENTATIONS = ("auto", "plain", "gather", "ring")

# Finite, so that groups without examples have finite gradients.
LOW = -1e9
# Accelerators would round what they multiply to fewer digits than a loss of
# similar pairs has.
EXACT = lax.Precision.HIGHEST
# Bytes of a device's cosines from which on they are never all there at once.
RING_FROM = 2**27


@dataclasses.dataclass(frozen=True)
class Total:
  """What is summed over candidates, and how.

  Attributes:
    reduce: (logits, axis) -> the total over an axis.
    merge: (totals, axis) -> the total of totals.
    slope: (logits, total) -> derivative of the total by each logit.
    empty: the total of nothing.
  """

  reduce: Callable[..., Any]
  merge: Callable[..., Any]
  slope: Callable[..., Any]
  empty: float


TOTALS = {
  "softmax": Total(
    jax.nn.logsumexp,
    jax.nn.logsumexp,
    lambda logits, total: jnp.exp(logits - total),
    -jnp.inf,
  ),
  "sigmoid": Total(
    lambda logits, axis: jax.nn.softplus(logits).sum(axis),
    jnp.sum,
    lambda logits, total: jax.nn.sigmoid(logits),
    0.0,
  ),
}


@dataclasses.dataclass(frozen=True)
class Plan:
  """How pairs are compared on a mesh.

  Attributes:
    total: a key of TOTALS.
    back: also the candidates' totals over the anchors.
    ring: blocks go round instead of being gathered.
    mesh: the devices.
    axes: of the mesh, that split the batch.
  """

  total: str
  back: bool
  ring: bool
  mesh: Any
  axes: tuple[str, ...]

  @property
  def ways(self) -> int:
    """Number of parts of the batch."""
    return parallel.ways(self.mesh, self.axes)

  @property
  def places(self) -> tuple[P, P, P]:
    """How examples lie, what all share, and candidates kept for the way back.

    A ring's blocks differ by device.
    """
    own, all_ = P(self.axes), P()
    return own, all_, own if self.ring else all_


def compare(
  rows: Float[Array, "b d"],
  columns: Float[Array, "b d"],
  here: Bool[Array, "b"],
  bias: Float[Array, ""],
  *,
  total: str = "softmax",
  back: bool = False,
  group_size: int = 0,
  implementation: str = "auto",
) -> tuple[Float[Array, "b"], Float[Array, "b"], Bool[Array, "b"]]:
  """Totals of `rows @ columns.T + bias` over the pairs of a batch.

  Args:
    rows: anchors, ready for the product.
    columns: candidates; anchor i belongs to candidate i.
    here: an example that is not is neither anchor nor candidate.
    bias: added to every product.
    total: a key of TOTALS.
    back: whether candidates' totals over the anchors are asked for.
    group_size: pairs of the same consecutive examples alone; 0 = all.
    implementation: one of IMPLEMENTATIONS. 'auto' is plain for groups, on one
      device and for a batch that the devices do not divide; it gathers unless
      a device's cosines exceed RING_FROM bytes. The mesh is that on which the
      arguments lie, its axes those of `parallel.BATCH_SPEC`.

  Returns:
    Each anchor's total, each candidate's (zeros unless `back`), and whether
    the anchor's own candidate is the first of the most similar ones.

  Raises:
    InputError: an unknown name; a batch that the group size does not divide;
      'gather' or 'ring' where there is no mesh, where its devices do not
      divide the batch, or of groups.
  """
  lookup(dict.fromkeys(IMPLEMENTATIONS), implementation, "implementation")
  lookup(TOTALS, total, "total")
  b = len(rows)
  size = group_size or b
  if b % size:
    raise InputError(
      f"batch size {b} is not divisible by model.group_size {size}"
    )
  mesh, axes = place(rows)
  n = parallel.ways(mesh, axes)
  fits = bool(axes) and not b % n and size == b
  if implementation == "auto":
    implementation = "plain"
    if fits and n > 1:
      large = b * (b // n) * rows.dtype.itemsize > RING_FROM
      implementation = "ring" if large else "gather"
  if implementation == "plain":
    return _plain(rows, columns, here, bias, (total, back, size))
  if not fits:
    raise InputError(
      f"implementation={implementation!r} splits the whole batch over a mesh: "
      f"batch size {b}, group size {size}, {n} devices on axes {axes}"
    )
  plan = Plan(total, back, implementation == "ring", mesh, axes)
  return _spread(plan, rows, columns, here, bias)


def place(x: Float[Array, "b d"]) -> tuple[Any, tuple[str, ...]]:
  """The mesh on which an array lies, and its axes that split batches.

  No axes where there is no mesh, or where the caller has split it already.
  """
  mesh = jax.typeof(x).sharding.mesh
  kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
  if any(kind != AxisType.Auto for kind in kinds.values()):
    return mesh, ()
  return mesh, tuple(a for a in parallel.BATCH_SPEC[0] if a in kinds)


def _plain(rows, columns, here, bias, options):
  total, back, size = options
  total, d = TOTALS[total], rows.shape[1]
  here = here.reshape(-1, size)
  logits = bias + jnp.einsum(
    "gid,gjd->gij",
    rows.reshape(-1, size, d),
    columns.reshape(-1, size, d),
    precision=EXACT,
  )
  seen = jnp.where(here[:, None, :], logits, LOW)
  there = total.reduce(seen, axis=2).reshape(-1)
  right = (seen.argmax(axis=2) == jnp.arange(size)).reshape(-1)
  if not back:
    return there, jnp.zeros_like(there), right
  seen = jnp.where(here[:, :, None], logits, LOW)
  return there, total.reduce(seen, axis=1).reshape(-1), right


# ---------------------------------------------------------------- devices


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _spread(plan, rows, columns, here, bias):
  return _forward(plan, rows, columns, here, bias)[0]


def _on_devices(plan, functions, given, found):
  """The function of gathered candidates or of a ring's, on every device.

  `given` and `found` say how arguments and results lie.
  """
  return jax.shard_map(
    functools.partial(functions[plan.ring], plan),
    mesh=plan.mesh,
    in_specs=given,
    out_specs=found,
    check_vma=False,
  )


def _forward(plan, rows, columns, here, bias):
  own, all_, kept = plan.places
  functions = _gather_totals, _ring_totals
  found = (own, own, own), (kept, all_)
  run = _on_devices(plan, functions, (own, own, own, all_), found)
  out, (others, others_here) = run(rows, columns, here, bias)
  there, back, _ = out
  found = rows, columns, here, bias, others, others_here, there, back
  return out, found


def _backward(plan, found, grads):
  own, all_, kept = plan.places
  functions = _gather_gradients, _ring_gradients
  given = own, own, own, all_, kept, all_, own, own, own, own
  run = _on_devices(plan, functions, given, (own, own, own))
  to_rows, to_columns, to_bias = run(*found, grads[0], grads[1])
  return to_rows, to_columns, None, to_bias.sum()


_spread.defvjp(_forward, _backward)


_product = functools.partial(jnp.matmul, precision=EXACT)


def _block(plan, rows, columns, masks, bias):
  """Of a device's rows and some columns: totals, and the best column."""
  total, (here, seen) = TOTALS[plan.total], masks
  logits = _product(rows, columns.T) + bias
  masked = jnp.where(seen[None], logits, LOW)
  back = jnp.zeros(len(columns), rows.dtype)
  if plan.back:
    back = total.reduce(jnp.where(here[:, None], logits, LOW), axis=0)
  best = masked.max(axis=1), masked.argmax(axis=1)
  return total.reduce(masked, axis=1), back, best


def _slopes(plan, rows, columns, masks, bias, given):
  """Gradients of a block to its rows and columns, and summed by row.

  `given`: totals and their gradients, of the rows and of the columns.
  """
  total, (here, seen) = TOTALS[plan.total], masks
  (there, to_there), (back, to_back) = given
  logits = _product(rows, columns.T) + bias
  masked = jnp.where(seen[None], logits, LOW)
  slopes = to_there[:, None] * total.slope(masked, there[:, None])
  if plan.back:
    masked = jnp.where(here[:, None], logits, LOW)
    slopes += to_back[None] * total.slope(masked, back[None])
  to_rows, to_columns = _product(slopes, columns), _product(slopes.T, rows)
  return to_rows, to_columns, slopes.sum(axis=1)


def _mine(plan, count):
  """Global numbers of a device's examples."""
  return lax.axis_index(plan.axes) * count + jnp.arange(count)


def _gather_totals(plan, rows, columns, here, bias):
  gather = functools.partial(lax.all_gather, axis_name=plan.axes, tiled=True)
  others, others_here = gather(columns), gather(here)
  masks = here, others_here
  there, back, (_, best) = _block(plan, rows, others, masks, bias)
  if plan.back:
    # The owner of a candidate gets the parts of its total.
    parts = back.reshape(plan.ways, -1)
    parts = lax.all_to_all(parts, plan.axes, 0, 0)
    back = TOTALS[plan.total].merge(parts, axis=0)
  else:
    back = jnp.zeros_like(there)
  right = best == _mine(plan, len(rows))
  return (there, back, right), (others, others_here)


def _gather_gradients(plan, rows, columns, here, bias, *rest):
  others, others_here, there, back, to_there, to_back = rest
  pair = back, to_back
  if plan.back:
    pair = lax.all_gather(jnp.stack(pair), plan.axes, axis=1, tiled=True)
  given, masks = ((there, to_there), pair), (here, others_here)
  to_rows, parts, to_bias = _slopes(plan, rows, others, masks, bias, given)
  to_columns = lax.psum_scatter(parts, plan.axes, tiled=True)
  return to_rows, to_columns, to_bias


def _next(plan, x):
  """Every device's value to the next one."""
  n = plan.ways
  ring = [(k, (k + 1) % n) for k in range(n)]
  return jax.tree.map(lambda x: lax.ppermute(x, plan.axes, ring), x)


def _ring_totals(plan, rows, columns, here, bias):
  n, count, total = plan.ways, len(rows), TOTALS[plan.total]
  index = lax.axis_index(plan.axes)
  others_here = lax.all_gather(here, plan.axes)

  def meet(state, block, back, step):
    there, best, place = state
    owner = (index - step) % n
    masks = here, others_here[owner]
    own, own_back, found = _block(plan, rows, block, masks, bias)
    there = total.merge(jnp.stack([there, own]), axis=0)
    back = total.merge(jnp.stack([back, own_back]), axis=0)
    value, where = found[0], found[1] + owner * count
    # Of equals the first, as in a row of all.
    first = (value > best) | ((value == best) & (where < place))
    best, place = jnp.where(first, value, best), jnp.where(first, where, place)
    return (there, best, place), back

  def turn(carry, step):
    state, block, back = carry
    # The block does not wait for the products.
    moved = _next(plan, block)
    state, back = meet(state, block, back, step)
    back = _next(plan, back) if plan.back else back
    return (state, moved, back), moved

  empty = jnp.full_like(rows[:, 0], total.empty)
  low = jnp.full_like(rows[:, 0], -jnp.inf)
  start = (empty, low, jnp.full(count, n * count)), columns, empty
  carry, blocks = lax.scan(turn, start, jnp.arange(n - 1))
  state, block, back = carry
  state, back = meet(state, block, back, n - 1)
  back = _next(plan, back) if plan.back else jnp.zeros_like(back)
  right = state[2] == _mine(plan, count)
  return (state[0], back, right), (blocks, others_here)


def _ring_gradients(plan, rows, columns, here, bias, *rest):
  blocks, others_here, there, back, to_there, to_back = rest
  n, index = plan.ways, lax.axis_index(plan.axes)
  pairs = jnp.stack([back, to_back])
  if plan.back:
    pairs = lax.all_gather(pairs, plan.axes)

  def part(block, step):
    """What a device owes to the block that it met in a step."""
    owner = (index - step) % n
    masks = here, others_here[owner]
    pair = pairs[owner] if plan.back else pairs
    given = (there, to_there), pair
    return _slopes(plan, rows, block, masks, bias, given)

  def turn(carry, met):
    to_rows, to_bias, to_block = carry
    block, step = met
    moved = _next(plan, to_block)
    more, own, more_bias = part(block, step)
    return (to_rows + more, to_bias + more_bias, moved + own), None

  # A block's sum sets out from the device after its owner and ends there.
  to_rows, to_columns, to_bias = part(columns, 0)
  if n > 1:
    first, own, first_bias = part(blocks[0], 1)
    start = to_rows + first, to_bias + first_bias, own
    met = blocks[1:], jnp.arange(2, n)
    (to_rows, to_bias, moved), _ = lax.scan(turn, start, met)
    to_columns += _next(plan, moved)
  return to_rows, to_columns, to_bias
