"""Gradient caching: a contrast over a batch that memory does not hold.

Gao et al., "Scaling Deep Contrastive Learning Batch Size under Memory Limited
Setup" (arXiv:2101.06983). A contrast needs all examples of the batch, but of
each only its vector. So the batch is encoded part by part without keeping what
a gradient needs; the loss gives a gradient to every vector; then the parts are
encoded again, one by one, and each vector's gradient goes on to the parameters.
The result is that of the whole batch at once. Memory beside the batch and the
vectors is that of one part; the encoder's forward pass is computed twice. Over
devices, gradients are summed once for each part unless the compiler takes the
sum out of the loop.

Works for methods whose loss is in two halves, see
`avjax.methods.pretraining.Pretraining`.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from avjax.errors import InputError

Tree = Any
# What the second half of a loss sees of the batch.
FLAGS = ("valid", "has_audio", "has_video")


def check(config: Any, method: Any, batch_size: int, ways: int) -> None:
  """Whether `config.grad_cache` goes with the rest.

  Args:
    config: of one stage.
    method: its method.
    batch_size: of all devices.
    ways: number of devices that share the batch.

  Raises:
    InputError: names the keys and numbers that do not go together.
  """
  size, asked = config.grad_cache, f"grad_cache={config.grad_cache}"
  if not size:
    return
  if not hasattr(method, "loss_of_rows"):
    raise InputError(
      f"{asked}: the loss of method {config.method!r} is not in two halves; "
      "those of cavmae, deteclap and avsiam are. optimizer.accumulate works "
      "for all methods"
    )
  if size < 0 or batch_size % size:
    raise InputError(f"{asked} does not divide the batch size {batch_size}")
  multiple = ways * method.batch_multiple
  if size % multiple:
    raise InputError(
      f"{asked} is not a multiple of {multiple}: {ways} devices take "
      f"{method.batch_multiple} examples together each"
    )
  if config.optimizer.accumulate > 1:
    raise InputError(
      f"{asked} and optimizer.accumulate={config.optimizer.accumulate} both "
      "split the batch; set one"
    )
  if config.data.augment.mixup:
    raise InputError(
      f"{asked}: data.augment.mixup={config.data.augment.mixup} mixes examples "
      "of the whole batch; set it to 0.0"
    )


def value_and_grad(
  encode: Callable[[Tree, Tree], Mapping[str, Array]],
  compare: Callable[[Tree, Tree, Tree], Any],
  *,
  size: int,
  ways: int,
) -> Callable[[Tree, Mapping[str, Array]], Any]:
  """`jax.value_and_grad(..., has_aux=True)` of a loss in two halves.

  Args:
    encode: (params, batch) -> rows [b …] by name; of any part of the batch.
    compare: (params, rows, flags) -> (loss, aux), of the whole batch.
    size: examples that are encoded at a time; divides the batch.
    ways: devices that share the batch; divides `size`. Each takes the next of
      its own examples, so that nothing moves and neighbours stay together.

  Returns:
    (params, batch) -> ((loss, aux), gradients).
  """

  def run(params: Tree, batch: Mapping[str, Array]) -> Any:
    parts = {key: split(x, size, ways) for key, x in batch.items()}
    rows = jax.lax.map(lambda part: encode(params, part), parts)
    rows = {key: join(x, ways) for key, x in rows.items()}
    flags = {key: batch[key] for key in FLAGS if key in batch}
    second = jax.value_and_grad(compare, (0, 1), has_aux=True)
    found, (grads, given) = second(params, rows, flags)
    given = {key: split(x, size, ways) for key, x in given.items()}

    def add(grads: Tree, turn: Any) -> tuple[Tree, None]:
      part, to_rows = turn
      _, back = jax.vjp(lambda params: encode(params, part), params)
      return jax.tree.map(jnp.add, grads, back(to_rows)[0]), None

    return found, jax.lax.scan(add, grads, (parts, given))[0]

  return run


def split(x: Array, size: int, ways: int) -> Array:
  """[b …] -> [parts size …]; a part has consecutive examples of each device."""
  own = size // ways
  x = x.reshape(ways, -1, own, *x.shape[1:]).swapaxes(0, 1)
  return x.reshape(len(x), size, *x.shape[3:])


def join(x: Array, ways: int) -> Array:
  """The inverse of `split`."""
  parts, size = x.shape[:2]
  x = x.reshape(parts, ways, size // ways, *x.shape[2:]).swapaxes(0, 1)
  return x.reshape(parts * size, *x.shape[3:])
