"""The order of clips in training: Grain's shuffle, an epoch at a time.

Grain finds each place of an epoch by itself: it enciphers the place, as a
number of 16 bits or more, again and again until it lies within the split. Of
100 clips that takes 650 turns, 0.3 ms a clip, as long as decoding its frame.
Here all numbers of 16 bits are enciphered at once, and the turns are doubled.
"""

import functools

import grain
import numpy as np
from jaxtyping import Int, UInt32

_BITS = 16  # of the smallest block that Grain enciphers
# Clips; of more, Grain needs few turns.
LARGEST = 1 << 13


class Order:
  """Position in the run -> number of a clip; shuffled anew every epoch.

  The numbers are those of `grain.MapDataset.range(count).seed(seed).shuffle()
  .repeat()`; where the first ones are not, all come from Grain.

  Args:
    count: clips.
    seed: less than 2**32.
  """

  def __init__(self, count: int, seed: int):
    shuffled = grain.MapDataset.range(count).seed(seed).shuffle()
    self._grain, self._count = shuffled.repeat(), count
    self._seed = getattr(shuffled, "_seed", None)
    # Two, as a batch may lie in both, and threads make batches out of order.
    self._epoch = functools.lru_cache(4)(self._make)
    self._quick = 1 < count <= LARGEST and self._seed is not None
    if self._quick:
      places = (0, count - 1, count)  # of two epochs
      self._quick = all(self[k] == int(self._grain[k]) for k in places)

  def __getitem__(self, position: int) -> int:
    if not self._quick:
      return int(self._grain[position])
    epoch, place = divmod(position, self._count)
    return int(self._epoch(epoch)[place])

  def _make(self, epoch: int) -> Int[np.ndarray, "n"]:
    return permutation(self._count, (self._seed + epoch) % (1 << 32))


def permutation(count: int, seed: int) -> Int[np.ndarray, "n"]:
  """What Grain's `index_shuffle` with 4 rounds makes of 0, 1, … count - 1.

  Simon (https://eprint.iacr.org/2013/404) with words of 8 bits, walked along
  its cycles (Black and Rogaway, CT-RSA 2002).

  Args:
    count: 2 to 2**16.
    seed: less than 2**32.
  """
  numbers = np.arange(1 << _BITS)
  left, right = (numbers >> 8).astype(np.uint8), numbers.astype(np.uint8)
  keys = _round_keys(seed).astype(np.uint8)
  for one, other in zip(keys[::2], keys[1::2], strict=True):
    left ^= _mix(right) ^ one
    right ^= _mix(left) ^ other
  enciphered = left.astype(np.intp) << 8 | right
  # A number outside leads on, one inside to itself. Then 2, 4, 8 … turns.
  goal = np.where(numbers < count, numbers, enciphered)
  begun = enciphered[:count]  # some others never come in
  while (goal[begun] >= count).any():
    goal = goal[goal]
  return goal[begun]


def _mix(word: np.ndarray) -> np.ndarray:
  # Turned by 1, 8 (all) and 2 of 8 bits.
  return ((word << 1 | word >> 7) & word) ^ (word << 2 | word >> 6)


def _round_keys(seed: int) -> UInt32[np.ndarray, "4"]:
  """`std::seed_seq{seed}` of C++, four numbers ([rand.util.seedseq])."""
  low, size = 0xFFFFFFFF, 4
  words = [0x8B8B8B8B] * size

  def turn(number: int, factor: int) -> int:
    number &= low
    return factor * (number ^ number >> 27) & low

  for k, extra in enumerate((1, 1 + seed, 2, 3)):
    one, other, last = (k + 1) % size, (k + 2) % size, (k - 1) % size
    near = turn(words[k] ^ words[one] ^ words[last], 1_664_525)
    far = near + extra & low
    words[one] = words[one] + near & low
    words[other] = words[other] + far & low
    words[k] = far
  for k in range(size):
    one, other, last = (k + 1) % size, (k + 2) % size, (k - 1) % size
    near = turn(words[k] + words[one] + words[last], 1_566_083_941)
    far = near - k & low
    words[one] ^= near
    words[other] ^= far
    words[k] = far
  return np.array(words, np.uint32)
