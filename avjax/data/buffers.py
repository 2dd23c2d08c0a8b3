"""Memory of batches, used again: fresh pages cost more than decoding a frame.

The system hands out tens of megabytes page by page, zeroed. An array is filled
anew only when nobody but this module holds it or a view of it, so what a
consumer keeps never changes: a JAX array that lies in the memory of a NumPy
array (`jax.device_put` on a CPU) holds it too.
"""

import sys
import threading
from collections.abc import Mapping
from typing import Any

import numpy as np

LEAST = 1 << 20  # bytes; of smaller arrays malloc's own memory is as good
KEPT = 6  # arrays of a key: filled, waiting, on their way and in a step


def _holders(arrays: list[np.ndarray]) -> list[int]:
  """References to each array, those of this function and the list included."""
  return [sys.getrefcount(array) for array in arrays]


_IDLE = _holders([np.empty(1)])[0]


class Buffers:
  """Hands out arrays of fixed shapes; thread-safe.

  Args:
    shapes: (shape, dtype) by key.
  """

  def __init__(self, shapes: Mapping[str, tuple[tuple[int, ...], Any]]):
    self._shapes = dict(shapes)
    self._lock = threading.Lock()
    self._made: dict[str, list[np.ndarray]] = {
      key: []
      for key, (shape, dtype) in self._shapes.items()
      if np.dtype(dtype).itemsize * np.prod(shape, dtype=np.int64) >= LEAST
    }

  def take(self) -> dict[str, np.ndarray]:
    """One array a key, with any content. Drop it to give it back."""
    with self._lock:
      return {
        key: self._idle(key) if key in self._made else np.empty(shape, dtype)
        for key, (shape, dtype) in self._shapes.items()
      }

  def _idle(self, key: str) -> np.ndarray:
    made = self._made[key]
    for array, holders in zip(made, _holders(made), strict=True):
      if holders == _IDLE:
        return array
    shape, dtype = self._shapes[key]
    array = np.empty(shape, dtype)
    if len(made) < KEPT:
      made.append(array)
    return array
