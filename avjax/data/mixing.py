"""Mixup of neighbours in a batch, of inputs and of labels alike."""

from jaxtyping import Array, Float

from avjax.errors import InputError


def partner(values: Array) -> Array:
  """Row i^1 for row i: neighbours change places.

  Local to a device as long as a device holds an even number of examples.

  Raises:
    InputError: an odd number of rows.
  """
  if values.shape[0] % 2:
    raise InputError(
      f"mixup pairs neighbours, so a batch of {values.shape[0]} is refused; "
      "use an even batch_size"
    )
  pairs = values.reshape(-1, 2, *values.shape[1:])
  return pairs[:, ::-1].reshape(values.shape)


def mixup(values: Float[Array, "b ..."], weight: Float[Array, "b"]) -> Array:
  """weight * x + (1 - weight) * x of the partner."""
  own = weight.reshape(-1, *[1] * (values.ndim - 1)).astype(values.dtype)
  return own * values + (1 - own) * partner(values)
