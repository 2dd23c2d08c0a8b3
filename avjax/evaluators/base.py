"""What an evaluator is given and what it returns."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

from avjax.methods.base import Method, Params
from avjax.workdir import Workdir


@dataclasses.dataclass(frozen=True)
class Context:
  """All that evaluators share.

  Attributes:
    config: the run's config.
    method: the method under evaluation.
    prepare: (device batch, rng, train) -> inputs; jit-safe.
    batches: (eval section) -> iterator over global device batches of the
      section's split in order, the last one padded with `valid` false; each
      a pair (device batch, list of ids).
    workdir: where pictures go.
    picture: (name, uint8 [h, w, 3], step) -> None; PNG and TensorBoard.
  """

  config: Any
  method: Method
  prepare: Callable[[Any, jax.Array, bool], dict[str, jax.Array]]
  batches: Callable[[Any], Iterator[tuple[dict[str, jax.Array], list[str]]]]
  workdir: Workdir
  picture: Callable[[str, Any, int], None]


class Evaluator:
  """Computes scores of a set of parameters on one split.

  `run` is called by the trainer at the section's interval and by
  `avjax.evaluate`; its metric names carry no prefix (the caller adds the
  section's name).
  """

  def __init__(self, context: Context, section: Any):
    self.context = context
    self.section = section

  def run(self, params: Params, step: int) -> Mapping[str, float]:
    """Scores by name; padded examples never count."""
    raise TypeError(f"{type(self).__name__} does not define run")
