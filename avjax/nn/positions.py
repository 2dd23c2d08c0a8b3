"""Position tables."""

import numpy as np
from jaxtyping import Float

from avjax.errors import InputError


def sinusoid_1d(n: int, d: int) -> Float[np.ndarray, "n d"]:
  """The fixed table of "Attention is all you need", over a flattened index.

  AV-MAE counts the tokens of each modality from 0 in raster order; the table
  knows nothing of rows, columns or time. Even columns are
  sin(position / 10000^(column/d)), the odd ones after them the cosine.
  """
  frequency = np.exp(-np.log(1e4) / d * np.arange(0, d, 2))
  angle = np.arange(n)[:, None] * frequency
  table = np.zeros((n, d), np.float32)
  table[:, 0::2] = np.sin(angle)
  table[:, 1::2] = np.cos(angle)[:, : d // 2]
  return table


def sincos_2d(grid: tuple[int, int], d: int) -> Float[np.ndarray, "n d"]:
  """The fixed table of MAE and CAV-MAE over a grid in raster order.

  The first half of the channels encodes the column, the second half the row
  (public code: its grid has the width first). Each half is [sin, cos] of
  place / 10000^(k/(d/4)), the cosines after the sines.

  Args:
    grid: rows and columns.
    d: width, divisible by 4.

  Raises:
    InputError: `d` is not divisible by 4.
  """
  if d % 4:
    raise InputError(f"2-D positions need a width divisible by 4, not {d}")
  frequency = 10_000.0 ** -(np.arange(d // 4) / (d / 4))

  def half(places):
    angle = places[:, None] * frequency
    return np.concatenate([np.sin(angle), np.cos(angle)], axis=1)

  rows, columns = np.indices(grid).reshape(2, -1)
  table = np.concatenate([half(columns), half(rows)], axis=1)
  return table.astype(np.float32)
