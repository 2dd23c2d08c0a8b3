"""Position tables."""

import numpy as np
from jaxtyping import Float


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
