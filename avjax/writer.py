"""Where a run's numbers and pictures go: metrics.jsonl and TensorBoard."""

import importlib
import json
import math
import sys
from collections.abc import Mapping
from typing import Any

import cv2
import jax
import numpy as np
from absl import logging

from avjax.workdir import Workdir, write_text


def _tensorboard() -> Any:
  """tensorboardX; where PyTorch is installed it would take seconds for it."""
  hidden = "torch" not in sys.modules
  if hidden:
    sys.modules["torch"] = None
  try:
    return importlib.import_module("tensorboardX")
  finally:
    if hidden:
      del sys.modules["torch"]


class Writer:
  """Writes on the first process only; the others' calls do nothing."""

  def __init__(self, run: Workdir, first_step: int = 0):
    """Opens the files; lines of steps after `first_step` are dropped.

    A resumed run repeats the steps since its checkpoint, so their old lines
    would stand twice.
    """
    self._active = jax.process_index() == 0
    self._run = run
    if not self._active:
      return
    run.root.mkdir(parents=True, exist_ok=True)
    _drop_after(run.metrics, first_step)
    self._lines = run.metrics.open("a")
    self._events = _tensorboard().SummaryWriter(
      str(run.root), purge_step=first_step + 1, flush_secs=30
    )

  def scalars(self, step: int, values: Mapping[str, Any]) -> None:
    """One line of metrics.jsonl: `step` and the metrics by name."""
    if not self._active:
      return
    numbers = {k: float(v) for k, v in values.items()}
    safe = {k: v if math.isfinite(v) else str(v) for k, v in numbers.items()}
    self._lines.write(json.dumps({"step": step, **safe}) + "\n")
    self._lines.flush()
    for name, value in numbers.items():
      self._events.add_scalar(name, value, step)

  def picture(self, name: str, image: np.ndarray, step: int) -> None:
    """A uint8 [h, w, 3] image as pictures/<name>_<step>.png and an event."""
    if not self._active:
      return
    self._run.pictures.mkdir(parents=True, exist_ok=True)
    path = self._run.pictures / f"{name.replace('/', '_')}_{step:07d}.png"
    if not cv2.imwrite(str(path), image[..., ::-1]):
      logging.warning("could not write %s", path)
    self._events.add_image(name, image, step, dataformats="HWC")

  def close(self) -> None:
    """Flushes and closes the files."""
    if self._active:
      self._lines.close()
      self._events.close()


def _drop_after(path: Any, step: int) -> None:
  if not path.exists():
    return
  kept = []
  for line in path.read_text().splitlines():
    try:
      if json.loads(line)["step"] <= step:
        kept.append(line)
    except (json.JSONDecodeError, KeyError):
      logging.warning("%s: dropped an unfinished line", path)
  write_text(path, "".join(f"{line}\n" for line in kept))
