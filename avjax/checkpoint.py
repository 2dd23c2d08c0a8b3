"""Checkpoints that know when they are damaged, and the lock of a run.

Orbax writes the arrays in the background and puts a finished step in place by
one rename. It does not notice a flipped byte, so every step also holds a
record: shape, dtype and checksum of each array, scores, and what else resuming
needs, under a checksum of its own. Layout of `<directory>/<step>/`: `state`
(Orbax, readable by Orbax alone) and `record/metadata` (JSON).
"""

import datetime
import errno
import fcntl
import logging as std_logging
import math
import os
import pathlib
import shutil
import socket
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging
from jax.experimental import multihost_utils

from avjax import parallel, stored_step, trees
from avjax.errors import InputError, SaveError, lookup, unknown

Path = str | pathlib.Path


class Checkpoints:
  """The steps saved in one folder.

  Saving runs in the background. A step is complete or absent, never half
  written, whenever the process dies; older steps go only once their successor
  is complete.

  Args:
    directory: created if need be; one run may write there at a time.
    keep: how many of the newest steps stay; None opens for reading alone:
      nothing is created, cleaned or deleted.
    best: metric whose best step stays as well; '' = none.
    best_mode: 'max' or 'min'.

  Raises:
    InputError: `keep` below 1 or an unknown `best_mode`.
  """

  def __init__(
    self,
    directory: Path,
    *,
    keep: int | None = 2,
    best: str = "",
    best_mode: str = "max",
  ):
    if keep is not None and keep < 1:
      raise InputError(f"checkpoint.keep is {keep}; at least 1 step must stay")
    _quiet_orbax()
    self.directory = pathlib.Path(directory).expanduser().absolute()
    self._keep, self._best = keep, best
    modes = {"max": 1.0, "min": -1.0}
    self._sign = lookup(modes, best_mode, "checkpoint.best_mode")
    self._manager: ocp.CheckpointManager | None = None
    self._saving: int | None = None
    self._damaged: dict[int, str] = {}
    self._scores: dict[int, float] = {}
    for step in self.steps() if best else ():
      try:
        self._note_score(
          step, stored_step.read_record(self.directory / str(step))
        )
      except stored_step.DamageError as error:
        logging.warning("%s", error)
    if keep is not None:
      self._open()

  # --- Writing ---------------------------------------------------------------

  def save(
    self,
    step: int,
    state: Mapping[str, Any],
    *,
    metrics: Mapping[str, float] | None = None,
    extra: Mapping[str, Any] | None = None,
    wait: bool = False,
  ) -> None:
    """Starts to write a step; returns once the arrays may be donated.

    Waits for the save before it. Steps that `restore` found damaged are set
    aside first, as `damaged-<step>`.

    Args:
      step: number of the step; later than every step in the folder.
      state: nested dicts of arrays; typed PRNG keys are arrays too.
      metrics: scores; must hold `best` if the step is to compete for it.
      extra: JSON values: data position, scores, counts.
      wait: whether to return only when the step is complete.

    Raises:
      SaveError: this save or the one before failed.
      InputError: the folder holds this step or a later one, the folder is
        open for reading alone, or an argument is not what it should be.
    """
    self.wait()
    if self._manager is None:
      raise InputError(f"{self.directory} is closed or open for reading only")
    self._set_damaged_aside()
    later = [s for s in self.steps() if s >= step]
    if later:
      raise InputError(
        f"cannot save step {step}: {self.directory} holds step {later[-1]} "
        "already; go on from that step or use another folder"
      )
    if self._best and metrics is not None and self._best not in metrics:
      raise unknown("metric in checkpoint.best", self._best, metrics)
    arrays, record = stored_step.pack(step, state, metrics or {}, extra or {})
    self._note_score(step, record["body"])
    self._saving = step
    arguments = ocp.args.Composite(
      state=ocp.args.PyTreeSave(trees.unflatten(arrays)),
      record=ocp.args.JsonSave(record),
    )
    try:
      self._manager.save(step, args=arguments, force=True)
    except (OSError, ValueError, RuntimeError) as error:
      self._fail(error)
    if wait:
      self.wait()

  def check(self) -> None:
    """Raises SaveError if the last save has failed; does not wait for it."""
    if self._manager is not None and not self._manager.is_saving_in_progress():
      self.wait()

  def wait(self) -> None:
    """Returns once no save is running; raises SaveError if it failed."""
    if self._manager is not None and self._saving is not None:
      try:
        self._manager.wait_until_finished()
      except Exception as error:
        self._fail(error)
      self._saving = None

  def close(self) -> None:
    """Waits, and ends the background threads; raises SaveError."""
    try:
      self.wait()
    finally:
      manager, self._manager = self._manager, None
      if manager is not None:
        manager.close()

  def __enter__(self) -> "Checkpoints":
    return self

  def __exit__(self, *_: Any) -> None:
    self.close()

  def _clean(self) -> None:
    """Removes what saves left behind that died or failed."""
    if jax.process_index() == 0:
      for path in self.directory.glob("*.orbax-checkpoint-tmp*"):
        shutil.rmtree(path, ignore_errors=True)

  def _open(self) -> None:
    self._clean()
    self._manager = ocp.CheckpointManager(
      self.directory,
      options=ocp.CheckpointManagerOptions(
        create=True, preservation_policy=self
      ),
    )

  def should_preserve(
    self, checkpoints: Sequence[Any], *, context: Any
  ) -> list[bool]:
    """Orbax's preservation policy: the newest `keep` steps and the best."""
    policy = ocp.checkpoint_managers.LatestN(self._keep)
    latest = policy.should_preserve(checkpoints, context=context)
    best = self.best()
    return [
      new or info.step == best
      for new, info in zip(latest, checkpoints, strict=True)
    ]

  def _note_score(self, step: int, body: Mapping[str, Any]) -> None:
    score = body["metrics"].get(self._best)
    if score is not None and math.isfinite(score):
      self._scores[step] = score

  def _fail(self, error: Exception) -> None:
    """Cleans up after a failed save and raises SaveError."""
    step, self._saving = self._saving, None
    self._scores.pop(step, None)
    free = shutil.disk_usage(self.directory).free
    try:
      self._manager.close()
    except Exception:
      logging.debug("closing after a failed save", exc_info=True)
    # Writes that Orbax had started beside the failed one go on for a moment.
    for _ in range(5):
      self._clean()
      time.sleep(0.05)
    self._open()
    raise SaveError(
      f"step {step} could not be saved in {self.directory}, where {free:,} "
      f"bytes are free: {stored_step.first_line(error)}. Complete there: "
      f"{_listed(self.steps())}."
    ) from error

  def _set_damaged_aside(self) -> None:
    if not self._damaged:
      return
    if jax.process_index() == 0:
      for step in self._damaged:
        target = self.directory / f"damaged-{step}"
        while target.exists():
          target = target.with_name(target.name + "x")
        (self.directory / str(step)).rename(target)
        logging.warning("moved the damaged step %d to %s", step, target)
    if jax.process_count() > 1:
      multihost_utils.sync_global_devices("avjax: damaged steps are aside")
    for step in self._damaged:
      self._scores.pop(step, None)
    self._damaged = {}
    self._manager.reload()

  # --- Reading ---------------------------------------------------------------

  def steps(self) -> list[int]:
    """Complete steps in ascending order, and the one being saved."""
    found = set(_steps(self.directory))
    return sorted(found | ({self._saving} - {None}))

  def latest(self) -> int | None:
    """The newest step, or None."""
    return max(self.steps(), default=None)

  def best(self) -> int | None:
    """The step with the best score, the newest of equals; None without one."""
    present = set(self.steps())
    scores = [
      (self._sign * score, step)
      for step, score in self._scores.items()
      if step in present
    ]
    return max(scores)[1] if scores else None

  def restore(
    self, template: Mapping[str, Any] | None = None, step: int | None = None
  ) -> tuple[int, dict[str, Any], dict[str, Any]]:
    """The newest step that passes verification.

    A damaged step is reported (which array or file) and the one before it is
    taken.

    Args:
      template: nested dicts of ShapeDtypeStructs or arrays. A leaf is restored
        with the template's sharding, whatever mesh it was saved on, or as a
        numpy array if that has none. None: all that is there, as numpy.
      step: this step and no other; None = the newest.

    Returns:
      The step, its state and its `extra`.

    Raises:
      InputError: there is no intact step, or an array's name, shape or dtype
        differs from the template's; names it and both values.
    """
    self.wait()
    found, state, body = _restore(
      self.directory, template, step, damaged=self._damaged
    )
    return found, state, body["extra"]


def restore_params(
  directory: Path, step: int | None = None, *, averaged: bool = True
) -> tuple[int, dict[str, Any]]:
  """Step and parameters (numpy) of the newest verified step of a folder.

  Args:
    directory: a run's `checkpoints`.
    step: this step and no other; None = the newest.
    averaged: whether to take the averaged weights where the run keeps some.

  Raises:
    InputError: there is no intact step.
  """

  def choose(paths: list[str]) -> list[str]:
    mean = [p for p in paths if p.startswith("average/mean/")]
    own = [p for p in paths if p.startswith("params/")]
    return mean if averaged and mean else own

  directory = pathlib.Path(directory).expanduser().absolute()
  found, state, _ = _restore(directory, None, step, damaged={}, choose=choose)
  return found, state.get("average", {}).get("mean") or state["params"]


def _steps(directory: pathlib.Path) -> list[int]:
  if not directory.is_dir():
    return []
  return sorted(int(p.name) for p in directory.iterdir() if p.name.isdigit())


def _restore(directory, template, step, *, damaged, choose=list):
  """Tries one step, or all from the newest on; fills `damaged`."""
  known = _steps(directory)
  if step is not None and step not in known:
    raise InputError(
      f"{directory} holds no step {step}; it holds {_listed(known)}"
    )
  candidates = [step] if step is not None else known[::-1]
  for candidate in candidates:
    reason = ""
    try:
      body, state = stored_step.load(
        directory / str(candidate), template, choose
      )
    except stored_step.DamageError as error:
      reason = str(error)
    if all(parallel.exchange(not reason)):
      return candidate, state, body
    damaged[candidate] = reason or "damaged as another process reads it"
    logging.warning("%s", damaged[candidate])
  reasons = "; ".join(damaged[candidate] for candidate in candidates)
  raise InputError(
    f"{directory} holds no intact checkpoint: {reasons or 'it is empty'}"
  )


# --- Words and logs -----------------------------------------------------------


def _listed(steps: list[int]) -> str:
  return f"step {', '.join(map(str, steps))}" if steps else "no step"


def _important(record: std_logging.LogRecord) -> bool:
  """Drops what Orbax says at every step of a save, and its tracebacks.

  Errors come back as SaveError, whose cause has the traceback.
  """
  if f"{os.sep}orbax{os.sep}" not in record.pathname:
    return True
  record.exc_info = None
  return record.levelno >= std_logging.WARNING


def _quiet_orbax() -> None:
  logger = logging.get_absl_logger()
  if _important not in logger.filters:
    logger.addFilter(_important)


class RunLock:
  """Lets one run at a time work in a folder; a context manager.

  The operating system gives the lock back when the process ends, however it
  ends. Of several JAX processes the first holds it for all.

  Args:
    path: the lock's file; it stays behind, unlocked.
  """

  def __init__(self, path: Path):
    self.path = pathlib.Path(path).expanduser()
    self._file: Any = None

  def __enter__(self) -> "RunLock":
    """Raises InputError if the folder is in use: by whom and since when."""
    if jax.process_index() != 0:
      return self
    self.path.parent.mkdir(parents=True, exist_ok=True)
    file = self.path.open("a+")
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
      if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
        file.seek(0)
        holder = file.read().strip() or "another process"
        file.close()
        raise InputError(
          f"{self.path.parent} is in use by {holder}; wait for that run, stop "
          "it, or choose another --workdir"
        ) from None
      # Some network file systems have no locks.
      logging.warning("%s cannot be locked: %s", self.path, error)
    file.truncate(0)
    now = datetime.datetime.now().isoformat(" ", "seconds")
    host = socket.gethostname()
    file.write(f"process {os.getpid()} on {host} since {now}\n")
    file.flush()
    self._file = file
    return self

  def __exit__(self, *_: Any) -> None:
    if self._file is not None:
      self._file.close()
      self._file = None
