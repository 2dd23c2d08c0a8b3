"""A trace of a few steps by `jax.profiler`.

python -m avjax.main --config=… --profile=10:15

The trace holds what every device and thread did, by time and operation:
`perfetto_trace.json.gz` opens at https://ui.perfetto.dev, the folder itself in
TensorBoard with its profile plugin.
"""

import pathlib
import re
from typing import Any

import jax
from absl import logging

from avjax.errors import InputError

STEP = "train_step"  # name of a step's events


class Trace:
  """Starts and stops the profiler around some steps.

  Args:
    steps: 'first:end', counted from the start of this process: 10:15 are the
      tenth to the fourteenth. '' = no trace.
    folder: that the trace is written to; made if need be.

  Raises:
    InputError: `steps` is no such pair.
  """

  def __init__(self, steps: str, folder: pathlib.Path):
    self.first, self.end = _pair(steps) if steps else (0, 0)
    self.folder, self._count, self._running = folder, 0, False

  def before_step(self, pending: Any) -> None:
    """To be called before every step.

    Args:
      pending: arrays of the steps before, which are waited for where the trace
        starts or ends.
    """
    self._count += 1
    if self._count == self.first:
      jax.block_until_ready(pending)
      self.folder.mkdir(parents=True, exist_ok=True)
      jax.profiler.start_trace(self.folder, create_perfetto_trace=True)
      self._running = True
    elif self._count == self.end:
      self.close(pending)

  def close(self, pending: Any = None) -> None:
    """Ends a trace that runs; says so where its steps never came."""
    if not self._running:
      if self._count < self.first:
        logging.warning(
          "no trace: --profile=%d:%d begins at step %d of this process, which "
          "took %d",
          self.first,
          self.end,
          self.first,
          self._count,
        )
      return
    jax.block_until_ready(pending)
    self._running = False
    jax.profiler.stop_trace()
    logging.info(
      "trace of steps %d to %d in %s: perfetto_trace.json.gz opens at "
      "https://ui.perfetto.dev",
      self.first,
      min(self.end - 1, self._count),
      self.folder,
    )


def named(step: int) -> Any:
  """A context in which a step has its number in the trace."""
  return jax.profiler.StepTraceAnnotation(STEP, step_num=step)


def _pair(steps: str) -> tuple[int, int]:
  found = re.fullmatch(r"(\d+):(\d+)", steps)
  if not found or not 0 < int(found[1]) < int(found[2]):
    raise InputError(
      f"--profile={steps}: 10:15 traces the tenth to the fourteenth step; the "
      "first is 1, and the end is larger"
    )
  return int(found[1]), int(found[2])
