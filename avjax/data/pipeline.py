"""Batches from built data sets (Grain), and their way to the devices.

One Grain element is a whole batch: its number is mapped to numpy arrays, filled
clip by clip by a few threads. So Grain's bookkeeping is paid once a batch, and
every draw follows from (seed, number of the example in the run): neither
threads, worker processes, hosts nor a restart change a batch.
"""

import math
import pathlib
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import grain
import numpy as np
from absl import flags, logging

from avjax.data import batches, example, records
from avjax.data.datasets import built_dir
from avjax.data.transfer import device_batches
from avjax.errors import InputError

__all__ = [
  "Skipped",
  "batch_of_files",
  "batch_shapes",
  "class_names",
  "device_batches",
  "eval_batches",
  "num_examples",
  "steps_per_epoch",
  "train_batches",
]

class_names = records.class_names
batch_shapes = example.shapes


def num_examples(data: Any, split: str | None = None) -> int:
  """Clips of a split (default `data.split`, up to `data.limit`) as built."""
  if split is None:
    return len(batches.training_split(data))
  return len(records.Split(data, split))


def steps_per_epoch(data: Any, batch_size: int) -> int:
  """Whole batches in the training split; what is left joins the next epoch.

  Raises:
    InputError: the split is smaller than a batch.
  """
  count = num_examples(data)
  if count < batch_size:
    raise InputError(
      f"split {data['split']!r} of {built_dir(data)} holds {count} clips; the "
      f"batch size is {batch_size}"
    )
  return count // batch_size


# ------------------------------------------------------------ skipped clips


class Skipped:
  """Clips that could not be read: which and how often. Thread-safe.

  Args:
    max_share: of all clips asked for; more stops the run.
  """

  def __init__(self, max_share: float = 0.5):
    self._max_share = max_share
    self._lock = threading.Lock()
    self._counts: dict[str, int] = {}
    self._ahead: list[tuple[int, str]] = []  # number of the batch, id
    self._known: set[str] = set()
    self._batches = self._failed = self._seen = 0

  def add(self, failed: Sequence[tuple[str, str]], seen: int) -> None:
    """Counts one batch.

    Args:
      failed: id and reason of each clip that could not be read.
      seen: examples in the batch.

    Raises:
      InputError: too large a share of all clips cannot be read.
    """
    with self._lock:
      self._batches += 1
      self._seen += seen
      self._failed += len(failed)
      for name, reason in failed:
        if name not in self._known:
          logging.warning("clip %s is skipped: %s", name, reason)
        self._known.add(name)
        self._ahead.append((self._batches, name))
      tried = self._seen + self._failed
      if failed and self._failed > self._max_share * tried:
        raise InputError(
          f"{self._failed} of {tried} clips cannot be read; at most "
          f"{self._max_share:.0%} may. The last: {failed[-1][0]}: "
          f"{failed[-1][1]}"
        )

  def dump(self, batches: int | None = None) -> dict[str, int]:
    """Id -> how often it was skipped.

    Args:
      batches: count the first so many batches since the start or `load`, at
        least as many as before; those that were read ahead come again in a
        run that goes on. None = all.
    """
    with self._lock:
      stop = self._batches if batches is None else batches
      for number, name in self._ahead:
        if number <= stop:
          self._counts[name] = self._counts.get(name, 0) + 1
      self._ahead = [pair for pair in self._ahead if pair[0] > stop]
      return dict(self._counts)

  def load(self, counts: Mapping[str, int]) -> None:
    """Goes on from counts saved before."""
    with self._lock:
      self._counts = {str(name): int(n) for name, n in counts.items()}
      self._known.update(self._counts)


# --------------------------------------------------------------- iterators


def train_batches(
  data: Any,
  *,
  batch_size: int,
  seed: int,
  start_step: int = 0,
  process_index: int = 0,
  process_count: int = 1,
  skipped: Skipped | None = None,
) -> Iterator[dict[str, Any]]:
  """Endless training batches of `data.split`, in an order of their own.

  Args:
    data: `config.data`. `sampling` 'shuffle': every clip once an epoch;
      'balanced': drawn with replacement, weighted by `label_weights`.
    batch_size: global.
    seed: of order, windows and crops.
    start_step: batches that a run before has seen.
    process_index: this host; it gets its contiguous share of each batch.
    process_count: hosts.
    skipped: counts clips that cannot be read and are replaced by others.

  Returns:
    Host batches (avjax.batch.BATCH) with the list `id`; `index` is the
    example's number in the run. With `data.workers` > 0 the caller's main
    module must be importable without effects (`if __name__ == "__main__"`).

  Raises:
    InputError: the data set or split is missing or smaller than a batch, or
      its sound has another rate.
  """
  steps_per_epoch(data, batch_size)
  making = batches.Batches(
    data,
    data["split"],
    batch_size=batch_size,
    seed=seed,
    process_index=process_index,
    process_count=process_count,
  )
  if making.split.excluded:
    logging.info("%s", making.split.excluded)
  return _iterate(making, start_step, None, data, skipped)


def eval_batches(
  data: Any,
  *,
  split: str,
  batch_size: int,
  views: int = 1,
  limit: int = 0,
  captions: int = 0,
  process_index: int = 0,
  process_count: int = 1,
  skipped: Skipped | None = None,
) -> Iterator[dict[str, Any]]:
  """All clips of a split once, in order.

  Args:
    data: `config.data`.
    split: of the built data set.
    batch_size: global; the last batch is padded with clips whose `valid` is
      false.
    views: windows in time, spread evenly over each modality by itself: frames
      [b v t h w 3], waveform [b v s]; 1 = the centre of each, without `v`.
    limit: first clips only; 0 = all.
    captions: c; `text` [b c l] then holds the texts of each clip in their
      order. 0 = no text. A clip with more is an error.
    process_index: this host; it gets its contiguous share of each batch.
    process_count: hosts.
    skipped: counts clips that cannot be read; `valid` is false for them.

  Raises:
    InputError: as for training.
  """
  making = batches.Batches(
    data,
    split,
    batch_size=batch_size,
    seed=None,
    views=views,
    limit=limit,
    captions=captions,
    process_index=process_index,
    process_count=process_count,
  )
  stop = math.ceil(len(making.split) / batch_size)
  return _iterate(making, 0, stop, data, skipped)


def _iterate(making, first, stop, data, skipped) -> Iterator[dict[str, Any]]:
  """Runs Grain over numbers of batches and counts what was skipped."""
  skipped = Skipped() if skipped is None else skipped
  numbers = grain.MapDataset.range(0, sys.maxsize if stop is None else stop)
  # By slice, not by Grain's state, which another number of workers cannot read.
  dataset = numbers.slice(slice(first, None)).map(making)
  workers = data["workers"]
  ahead = 1 if workers or making.threads == 1 else 2
  stream = dataset.to_iter_dataset(
    grain.ReadOptions(num_threads=ahead, prefetch_buffer_size=ahead)
  )
  if workers:
    if not flags.FLAGS.is_parsed():  # Grain hands absl's flags to its workers
      flags.FLAGS.mark_as_parsed()
    stream = stream.mp_prefetch(
      grain.MultiprocessingOptions(workers, per_worker_buffer_size=1)
    )
  iterator = iter(stream)
  try:
    for batch in iterator:
      failed = [tuple(pair) for pair in batch.pop("skipped")]
      skipped.add(failed, len(batch["id"]))
      yield batch
  finally:
    iterator.close()


def media_files(paths: Any) -> list[str | pathlib.Path]:
  """One or several files as a list.

  Raises:
    InputError: there are none, or one is no path.
  """
  if isinstance(paths, (str, pathlib.Path)):
    return [paths]
  if isinstance(paths, bytes) or not isinstance(paths, Iterable):
    paths = [paths]
  paths = list(paths)
  if not paths:
    raise InputError("no media files were given")
  for path in paths:
    if not isinstance(path, (str, pathlib.Path)):
      kind = type(path).__name__
      raise InputError(f"a media file is given by its path, not as {kind}")
  return paths


def batch_of_files(
  paths: str | pathlib.Path | Sequence[Any], data: Any
) -> dict[str, Any]:
  """A batch of media files, cut as in evaluation with one view.

  Args:
    paths: one or several local files.
    data: `config.data`.

  Returns:
    A host batch without labels; `id` holds the paths.

  Raises:
    InputError: a file cannot be read or has no track that is asked for; or
      the model reads stored features.
  """
  if data["features"]:
    raise InputError(
      "a model of stored features (data.features) reads no media files; make "
      "their features with `python -m data_prep.features`"
    )
  paths = media_files(paths)
  cutter = example.Cutter(data)
  cutter.data["heads"] = ()
  shapes = example.shapes(cutter.data, len(paths), train=False)
  batch: dict[str, Any] = {
    key: np.zeros(shape, dtype) for key, (shape, dtype) in shapes.items()
  }
  for row, path in enumerate(paths):
    cutter.cut(example.from_file(path, cutter.data), batch, row, None)
  batch["valid"][:] = True
  batch["index"][:] = np.arange(len(paths))
  batch["id"] = [str(path) for path in paths]
  return batch
