"""Evaluators that name and draw clips of the split that they score."""

import functools

from avjax.data import records
from avjax.evaluators import retrieval_pictures
from avjax.evaluators.base import Evaluator


class Shown(Evaluator):
  """Knows the built records of its section's split."""

  @functools.cached_property
  def built(self) -> records.Split:
    """Records of the section's split."""
    data, section = self.context.config.data, self.section
    return records.Split(data, section.split, section.limit)

  @functools.cached_property
  def clips(self) -> retrieval_pictures.Clips:
    """Pictures and names of the split's clips."""
    return retrieval_pictures.Clips(self.built, self.context.config.data)

  def title(self, step: int) -> str:
    """Data set, split and step, for the head of a picture."""
    data = self.context.config.data
    return f"{data.name}, split {self.section.split}, step {step}"
