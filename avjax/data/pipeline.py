"""Batches from built data sets (Grain), and their way to the devices.

One Grain element is a whole batch: its number is mapped to numpy arrays, filled
clip by clip by a few threads. So Grain's bookkeeping is paid once a batch, and
every draw follows from (seed, number of the example in the run): neither
threads, worker processes, hosts nor a restart change a batch.
"""

import contextlib
import ctypes
import functools
import math
import pathlib
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent import futures
from typing import Any

import cv2
import grain
import numpy as np
from absl import flags, logging

from avjax.data import (
  clip_text,
  example,
  features,
  mixture,
  object_scores,
  records,
)
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

# Clips tried in the place of one that cannot be read.
_ATTEMPTS = 16
# Larger than any attempt: streams of their own.
_NO_DRAW = 1 << 32
_CAPTION = 1 << 33


class_names = records.class_names
batch_shapes = example.shapes


def num_examples(data: Any, split: str | None = None) -> int:
  """Clips of a split (default `data.split`, up to `data.limit`) as built."""
  if split is None:
    return len(_training_split(data))
  return len(records.Split(data, split))


def _training_split(data: Any) -> records.Split | mixture.Mixture:
  if data["mixture"]:
    return mixture.Mixture(data)
  return records.Split(
    data, data["split"], data["limit"], exclude=data["exclude"]
  )


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
    self._failed = self._seen = 0

  def add(self, failed: Sequence[tuple[str, str]], seen: int) -> None:
    """Counts one batch.

    Args:
      failed: id and reason of each clip that could not be read.
      seen: examples in the batch.

    Raises:
      InputError: too large a share of all clips cannot be read.
    """
    with self._lock:
      self._seen += seen
      self._failed += len(failed)
      for name, reason in failed:
        if name not in self._counts:
          logging.warning("clip %s is skipped: %s", name, reason)
        self._counts[name] = self._counts.get(name, 0) + 1
      tried = self._seen + self._failed
      if failed and self._failed > self._max_share * tried:
        raise InputError(
          f"{self._failed} of {tried} clips cannot be read; at most "
          f"{self._max_share:.0%} may. The last: {failed[-1][0]}: "
          f"{failed[-1][1]}"
        )

  def dump(self) -> dict[str, int]:
    """Id -> how often it was skipped."""
    with self._lock:
      return dict(self._counts)

  def load(self, counts: Mapping[str, int]) -> None:
    """Goes on from counts saved before."""
    with self._lock:
      self._counts = {str(name): int(n) for name, n in counts.items()}


# -------------------------------------------------------------- one batch


class _Batches:
  """Number of a batch -> the batch; may go to other processes.

  The result holds the host's contiguous share of the global batch, the list
  `id`, and `skipped`: (id, reason) of clips that others stand in for.
  """

  def __init__(
    self,
    data: Any,
    split: str,
    *,
    batch_size: int,
    seed: int | None,
    views: int = 1,
    limit: int = 0,
    captions: int = 0,
    process_index: int = 0,
    process_count: int = 1,
  ):
    if batch_size < 1 or batch_size % process_count:
      raise InputError(
        f"batch size {batch_size} is not divisible by the {process_count} "
        "processes"
      )
    training = seed is not None
    self.split = (
      _training_split(data) if training else records.Split(data, split, limit)
    )
    if not len(self.split):
      raise InputError(f"split {split!r} of {self.split.folder} holds 0 clips")
    self._check(data)
    self.seed, self.global_size = seed, batch_size
    self.size = batch_size // process_count
    self.first = self.size * process_index
    self.cutter, self.views = example.Cutter(data), views
    self.shapes = example.shapes(
      self.cutter.data, self.size, views, train=training, captions=captions
    )
    self.captions = None
    if "text" in self.shapes:
      self.captions = clip_text.Captions(self.cutter.data, self.split)
    self.objects = {}
    if training and data["object_scores"]:
      ids = self.split.column("id")[: len(self.split)].tolist()
      self.objects = object_scores.columns(data["object_scores"], ids)
    self.features = None
    if data["features"]:
      self.features = features.Reader(data, self.split)
    self.heads, self.modality = tuple(data["heads"]), data["modality"]
    workers = data["workers"]
    self.threads = max(data["threads"] // max(workers, 1), 1)
    self.sums = None
    if seed is not None and data["sampling"] == "balanced":
      self.sums = np.cumsum(self.split.label_weights())
    elif data["sampling"] not in ("shuffle", "balanced"):
      raise InputError(
        f"data.sampling is {data['sampling']!r}; known: balanced, shuffle"
      )
    self._local = threading.local()

  def _check(self, data: Any) -> None:
    """Compares what was built with what is asked for."""
    built = self.split.metadata
    stored = built.get("audio_rate", data["audio"]["rate"])
    sound = "a" in data["modality"] and not data["features"]
    if sound and stored != data["audio"]["rate"]:
      raise InputError(
        f"data.audio.rate is {data['audio']['rate']}; the sound in "
        f"{self.split.folder} has {stored}"
      )
    for head in data["heads"]:
      count = len(records.class_names(data, head))
      if count != example.num_classes(data, head):
        raise InputError(
          f"{self.split.folder} holds {count} classes of head {head!r}; "
          f"{data['name']} has {example.num_classes(data, head)}"
        )

  def __getstate__(self) -> dict[str, Any]:
    made_here = ("_pool", "_order", "_local")
    return {k: v for k, v in self.__dict__.items() if k not in made_here}

  @functools.cached_property
  def _order(self) -> Any:
    """Position in the run -> number of a clip; shuffled anew every epoch."""
    if isinstance(self.split, mixture.Mixture):
      return self.split.order(self.seed)
    everything = grain.MapDataset.range(len(self.split))
    return everything.seed(self.seed % (1 << 32)).shuffle().repeat()

  @functools.cached_property
  def _pool(self) -> futures.ThreadPoolExecutor | None:
    _settle_process()
    if self.threads == 1:
      return None
    return futures.ThreadPoolExecutor(self.threads)

  def __call__(self, step: int) -> dict[str, Any]:
    batch: dict[str, Any] = {
      key: np.empty(shape, dtype) for key, (shape, dtype) in self.shapes.items()
    }
    first = int(step) * self.global_size + self.first
    fill = functools.partial(self._fill, batch, first)
    run = self._pool.map if self._pool else map
    rows = list(run(fill, range(self.size)))
    batch["id"] = [name for name, _ in rows]
    batch["skipped"] = [skipped for _, failed in rows for skipped in failed]
    return batch

  def _fill(self, batch, first, row) -> tuple[str, list[tuple[str, str]]]:
    """Fills a row; returns the clip's id and the clips that failed."""
    position = first + row
    failed: list[tuple[str, str]] = []
    for attempt in range(_ATTEMPTS):
      number = self._number(position, attempt)
      try:
        clip = self._clip(number)
        rng = self._rng(position, attempt)
        self.cutter.cut(clip, batch, row, rng, self.views)
        if self.features:
          self.features.fill(number, batch, row)
        for key, column in self.objects.items():
          batch[key][row] = column[number]
        if self.captions:
          draw = functools.partial(self._rng, position, _CAPTION + attempt)
          self.captions.fill(number, clip.captions, batch, row, draw)
      except InputError:
        raise
      except (ValueError, IndexError, OSError, RuntimeError) as error:
        name = str(self.split.column("id")[number])
        failed.append((name, str(error) or type(error).__name__))
        continue
      batch["index"][row] = position % (1 << 32)
      batch["valid"][row] = self.seed is not None or (
        position < len(self.split) and not failed
      )
      return clip.id, failed
    raise InputError(
      f"{_ATTEMPTS} clips of {self.split.folder} in a row cannot be read: "
      f"{failed[0][0]}: {failed[0][1]}"
    )

  def _clip(self, number: int) -> example.Clip:
    if self.features:
      return self.features.clip(number)
    record = self.split[number]
    with_text = self.captions is not None
    return example.from_record(record, self.modality, self.heads, with_text)

  def _rng(self, position: int, attempt: int) -> np.random.Generator | None:
    """Draws of an example; None in evaluation."""
    if self.seed is None:
      return None
    key = [self.seed % (1 << 64), position]
    return np.random.Generator(np.random.Philox(key=key, counter=attempt << 64))

  def _number(self, position: int, attempt: int) -> int:
    """Which clip; with `attempt`, which stands in for it."""
    count = len(self.split)
    if self.seed is None:
      return (min(position, count - 1) + attempt) % count
    if self.sums is None and not attempt:
      return int(self._order[position])
    rng = self._rng(position, _NO_DRAW + attempt)
    if self.sums is None:
      return int(rng.integers(count))
    draw = rng.random() * self.sums[-1]
    return int(np.searchsorted(self.sums, draw, side="right"))


def _settle_process() -> None:
  """Settings that make decoding in threads fast; once per process."""
  cv2.setNumThreads(0)  # its own threads would fight with ours
  if sys.platform == "linux":
    # Megabytes are taken and freed for each clip. Given back to the system,
    # they cost page faults that take longer than reading the record.
    with contextlib.suppress(OSError, AttributeError):
      mallopt = ctypes.CDLL(None).mallopt
      mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD, at its upper limit
      mallopt(-1, 256 << 20)  # M_TRIM_THRESHOLD


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
  batches = _Batches(
    data,
    data["split"],
    batch_size=batch_size,
    seed=seed,
    process_index=process_index,
    process_count=process_count,
  )
  if batches.split.excluded:
    logging.info("%s", batches.split.excluded)
  return _iterate(batches, start_step, None, data, skipped)


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
  batches = _Batches(
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
  stop = math.ceil(len(batches.split) / batch_size)
  return _iterate(batches, 0, stop, data, skipped)


def _iterate(batches, first, stop, data, skipped) -> Iterator[dict[str, Any]]:
  """Runs Grain over numbers of batches and counts what was skipped."""
  skipped = Skipped() if skipped is None else skipped
  numbers = grain.MapDataset.range(0, sys.maxsize if stop is None else stop)
  # By slice, not by Grain's state, which another number of workers cannot read.
  dataset = numbers.slice(slice(first, None)).map(batches)
  workers = data["workers"]
  ahead = 1 if workers or batches.threads == 1 else 2
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
  if isinstance(paths, (str, pathlib.Path)):
    paths = [paths]
  if not len(paths):
    raise InputError("no media files were given")
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
