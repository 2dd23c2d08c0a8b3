"""Work on clips that is stored row by row: read, compute, note, report."""

import contextlib
import dataclasses
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from absl import flags, logging

from avjax.data import clip_rows
from avjax.data.datasets import VARIANTS
from avjax.errors import InputError
from avjax.report import duration
from data_prep import object_clips
from data_prep.progress import track

SAVE_EVERY = 30.0  # seconds
NOTHING = {
  "audio": object_clips.NO_SOUND,
  "video": object_clips.NO_PICTURES,
}
_LISTED = 5  # failed clips that are printed; the files hold all


@dataclasses.dataclass
class Job:
  """What is computed of one modality.

  Attributes:
    writer: of the rows; has `write(ids, rows)`.
    prepare: makes of a read clip what `compute` takes; None = it has no such
      track. Called in threads.
    compute: rows of several prepared clips, an array each.
    size: how much of a prepared clip there is.
    batch_size: how much is computed at a time.
    before: clips that had rows, or a reason, already.
  """

  writer: Any
  prepare: Callable[[Any], Any]
  compute: Callable[[Sequence[Any]], Sequence[np.ndarray]]
  size: Callable[[Any], int]
  batch_size: int
  before: int = 0
  _waiting: list[tuple[str, Any]] = dataclasses.field(default_factory=list)

  def add(self, name: str, prepared: Any) -> None:
    """Takes a clip; computes once a batch is full."""
    self._waiting.append((name, prepared))
    if sum(self.size(one) for _, one in self._waiting) >= self.batch_size:
      self.flush()

  def flush(self) -> None:
    """Computes and stores what waits."""
    if not self._waiting:
      return
    names, clips = zip(*self._waiting, strict=True)
    kept = {}
    for name, row in zip(names, self.compute(clips), strict=True):
      if np.isfinite(row).all():
        kept[name] = row
      else:
        words = self.writer.WORDS
        self.writer.fail(name, f"the model's {words} are not finite")
    if kept:
      self.writer.write(list(kept), list(kept.values()))
    self._waiting = []


def work(
  source: object_clips.Source,
  jobs: dict[str, Job],
  words: str,
  *,
  threads: int = 1,
) -> None:
  """Computes the rows that clips of a source lack; saves what is done.

  Args:
    source: of the clips.
    jobs: by modality.
    words: what is made.
    threads: that read clips while the models compute.
  """
  missing = {m: set(job.writer.missing()) for m, job in jobs.items()}
  wanted = {}
  for name in source.ids:
    tracks = "".join(m[0] for m in jobs if name in missing[m])
    if tracks:
      wanted[name] = tracks

  def prepare(clip: Any, tracks: str) -> dict[str, Any]:
    return {m: j.prepare(clip) for m, j in jobs.items() if m[0] in tracks}

  read = object_clips.read_all(
    source, wanted, prepare, threads=threads, ahead=2 * threads + 2
  )
  saved = time.monotonic()
  try:
    with contextlib.closing(read):
      for name, found in track(read, len(wanted), words):
        _take(jobs, name, wanted[name], found)
        if time.monotonic() - saved > SAVE_EVERY:
          _save(jobs)
          saved = time.monotonic()
    for job in jobs.values():
      job.flush()
  finally:
    _save(jobs)


def _take(jobs: dict[str, Job], name: str, tracks: str, found: Any) -> None:
  """Hands what was read of a clip to the jobs that asked for it."""
  for modality, job in jobs.items():
    if modality[0] not in tracks:
      continue
    if isinstance(found, Exception):
      job.writer.fail(name, object_clips.reason(found))
    elif found[modality] is None:
      job.writer.fail(name, NOTHING[modality])
    else:
      job.add(name, found[modality])


def _save(jobs: dict[str, Job]) -> None:
  for job in jobs.values():
    job.writer.save()


# ---------------------------------------------------------------- report


def models(values: Any, modalities: Sequence[str]) -> dict[str, str]:
  """The models that the flags name, by modality, those that are none left out.

  Raises:
    InputError: a flag is not set, or all are none.
  """
  names = {m: getattr(values, f"{m}_model") for m in modalities}
  wanted = {m: name for m, name in names.items() if name != "none"}
  unset = [m for m, name in wanted.items() if not name]
  if unset or not wanted:
    which = " and ".join(f"--{m}_model" for m in unset or names)
    raise InputError(f"name {which}; one of the two may be none")
  return wanted


def carry_out(
  values: Any,
  source: object_clips.Source,
  jobs: dict[str, Job],
  words: str,
  **report: Any,
) -> list[str]:
  """Does the jobs as the flags say; `table`, given `report`.

  Raises:
    InputError: no clip has rows in the end; the table is printed before.
  """
  for job in jobs.values():
    job.before = len(source.ids) - len(job.writer.missing())
  began = time.monotonic()
  threads = values.threads or os.cpu_count() or 1
  work(source, jobs, words, threads=threads)
  spent = time.monotonic() - began
  lines = list(table(jobs, source.ids, spent, **report))
  if not any(job.writer.done().any() for job in jobs.values()):
    print("\n".join(lines))
    kind = next(iter(jobs.values())).writer.WORDS
    raise InputError(f"none of {len(source.ids)} clips has {kind}")
  return lines


def define_flags(what: str, *, variant: str) -> None:
  """The flags that say which clips are read and where rows are written."""
  flags.DEFINE_string("output", None, f"The folder of the {what}.")
  flags.DEFINE_string("dataset", None, "A built data set.")
  flags.DEFINE_list("split", None, "Its split, or several with commas.")
  flags.DEFINE_string(
    "data_dir", "", "Where it was built; default $AVJAX_DATA or ~/avjax_data."
  )
  flags.DEFINE_enum(
    "variant", variant, list(VARIANTS), "Frames stored of a clip."
  )
  flags.DEFINE_integer("threads", 0, "That read; 0 = one a core.", 0)
  flags.DEFINE_integer("limit", 0, "First clips only; 0 = all.", 0)
  flags.DEFINE_bool("retry", False, "Ask again for clips that failed.")


def tell(run: Callable[[Any], Sequence[str]]) -> None:
  """Prints what a command reports of the flags; Ctrl-C may stop it."""
  logging.set_verbosity(logging.WARNING)
  try:
    print("\n".join(run(flags.FLAGS)))
  except KeyboardInterrupt:
    print("stopped; the same command goes on from here", file=sys.stderr)
    sys.exit(130)


def table(
  jobs: dict[str, Job],
  ids: Sequence[str],
  seconds: float,
  *,
  done: str,
  more: Callable[[clip_rows.Rows, np.ndarray], dict[str, str]] | None = None,
) -> Iterator[str]:
  """Lines: what became of the clips.

  Args:
    jobs: by modality.
    ids: of the clips.
    seconds: that it took.
    done: word for clips that have rows.
    more: further lines, given a writer and the rows that are done.
  """
  columns = {}
  for modality, job in jobs.items():
    rows = job.writer.done_rows(ids)
    rows = rows[rows >= 0]
    columns[modality] = {
      "clips": f"{len(ids):,}",
      "done before": f"{job.before:,}",
      done: f"{len(rows):,}",
      "failed": f"{sum(name in job.writer.failed for name in ids):,}",
      **(more(job.writer, rows) if more else {}),
    }
  yield f"{'':22}" + "".join(f"{m:>10}" for m in columns)
  for row in next(iter(columns.values())):
    yield f"{row:22}" + "".join(f"{c[row]:>10}" for c in columns.values())
  new = sum(
    len(ids) - job.before - len(job.writer.missing()) for job in jobs.values()
  )
  rate = new / max(seconds, 1e-6)
  modalities = "both modalities" if len(jobs) > 1 else next(iter(jobs))
  yield f"{duration(seconds)}, {rate:.1f} clips/s over {modalities}"
  for modality, job in jobs.items():
    failed = [name for name in ids if name in job.writer.failed]
    for name in failed[:_LISTED]:
      yield f"  {modality}: {name}: {job.writer.failed[name]}"
    if len(failed) > _LISTED:
      rest = len(failed) - _LISTED
      yield f"  {modality}: {rest:,} more in {modality}.json"
