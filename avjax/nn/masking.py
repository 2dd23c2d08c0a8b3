"""Random masking: draw, keep, put back.

The tokens kept are those of the smallest noise, in ascending order of noise:
they are in random order, which only modality inpainting notices. Noise is
drawn with one key per example, so masks do not depend on the devices.
"""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Key, UInt32

# One per example, typed or raw.
Keys = Key[Array, "b"] | UInt32[Array, "b 2"]


def example_keys(rng: jax.Array, index: UInt32[Array, "b"]) -> Keys:
  """One key per example from the step's key and the example's number."""
  return jax.vmap(jax.random.fold_in, (None, 0))(rng, index)


def draw_keys(inputs: Mapping[str, Array], rng: jax.Array) -> Keys:
  """One key per example of a method's inputs, by `index` where it is there."""
  index = inputs.get("index")
  if index is None:
    b = len(next(iter(inputs.values())))
    index = jnp.arange(b, dtype=jnp.uint32)
  return example_keys(rng, index)


def part_key(inputs: Mapping[str, Array], rng: jax.Array) -> jax.Array:
  """A key of these inputs, for draws that go by place in them, as dropout's.

  Micro-batches of a step have one `rng`; without this, all draw the same.
  """
  index = inputs.get("index")
  return rng if index is None else jax.random.fold_in(rng, index[0])


def fold_in(keys: Keys, number: int) -> Keys:
  """Independent keys for one of several purposes."""
  return jax.vmap(jax.random.fold_in, (0, None))(keys, number)


def example_noise(keys: Keys, n: int) -> Float[Array, "b n"]:
  """Uniform noise of `n` tokens per example."""
  return jax.vmap(lambda key: jax.random.uniform(key, (n,)))(keys)


def num_kept(n: int, ratio: float) -> int:
  """`n` less the number removed, `int(ratio * n)`."""
  return n - int(ratio * n)


def whole_lines(
  noise: Float[Array, "b n"],
  keys: Keys,
  grid: tuple[int, int],
  *,
  rows: int,
  columns: int,
) -> Float[Array, "b n"]:
  """Noise in [0, 1), and 1 more in rows and columns drawn per example.

  These tokens are then the last that are kept: where fewer tokens than are to
  be kept lie outside them, random ones of them are kept as well.

  Args:
    noise: of the tokens of a grid in raster order.
    keys: one per example.
    grid: rows and columns of the grid.
    rows: number of rows drawn.
    columns: number of columns drawn.
  """

  def drawn(number, lines, count):
    draws = example_noise(fold_in(keys, number), lines)
    return removed(ids_keep(draws, lines - count), lines)

  chosen = drawn(0, grid[0], rows)[:, :, None]
  chosen = chosen | drawn(1, grid[1], columns)[:, None]
  return noise + chosen.reshape(noise.shape)


def ids_keep(noise: Float[Array, "b n"], kept: int) -> Int[Array, "b k"]:
  """The `kept` tokens of smallest noise, in ascending order of noise."""
  return _smallest(noise, kept)


def _top_k(noise, kept):
  return jax.lax.top_k(-noise, kept)[1]


def _partition(kept, mesh, arguments, result):
  del result
  spec = [*arguments[0].sharding.spec, None][:1]
  rows = NamedSharding(mesh, PartitionSpec(*spec, None))
  return mesh, functools.partial(_top_k, kept=kept), rows, (rows,)


# XLA would gather the rows of all devices before a top_k; every device can do
# its own.
_smallest = custom_partitioning(_top_k, static_argnums=(1,))
_smallest.def_partition(
  partition=_partition,
  sharding_rule="b n -> b k",
  need_replication_factors=("n", "k"),
)


def gather(
  tokens: Float[Array, "b n d"], ids: Int[Array, "b k"]
) -> Float[Array, "b k d"]:
  """tokens[b, ids[b, k]]."""
  take = jax.vmap(
    lambda x, i: x.at[i].get(mode="promise_in_bounds", unique_indices=True)
  )
  return take(tokens, ids)


def unshuffle(
  tokens: Float[Array, "b k d"],
  ids: Int[Array, "b k"],
  mask_token: Float[Array, "d"],
  n: int,
) -> Float[Array, "b n d"]:
  """The kept tokens at their own places, the mask token everywhere else.

  A scatter, because its gradient is a gather; a gather from [tokens, mask
  tokens] would have a scatter-add for a gradient, tens of times dearer.
  """

  def one(x, i):
    base = jnp.broadcast_to(mask_token.astype(x.dtype), (n, x.shape[-1]))
    return base.at[i].set(x, mode="promise_in_bounds", unique_indices=True)

  return jax.vmap(one)(tokens, ids)


def removed(ids: Int[Array, "b k"], n: int) -> Bool[Array, "b n"]:
  """True where a token was masked out, false where it was kept."""

  def one(i):
    return jnp.ones(n, bool).at[i].set(False)

  return jax.vmap(one)(ids)
