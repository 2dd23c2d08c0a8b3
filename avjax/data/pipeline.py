"""Batches from built data sets (TFDS array_record, read by Grain).

One Grain element is one whole batch: its clips are decoded straight into
preallocated arrays, so that Grain's cost per element is paid once a batch.
Which clips a batch holds is a function of the seed and the step alone:

    number = step * batch_size + position      # counts over the whole run
    epoch, place = divmod(number, clips)
    clip = permutation(seed, epoch)[place]

so order, augmentation and resumption depend on neither threads, processes nor
hosts. Training epochs follow each other without a gap; nothing is dropped.
"""

import functools
import json
import queue
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import grain
import jax
import numpy as np
import tensorflow_datasets as tfds

from avjax.data import clips, media
from avjax.data.datasets import DATASETS, built_dir
from avjax.errors import InputError, lookup

Batch = dict[str, Any]

# Clips that may fail in one batch before the data set is called broken.
MOST_FAILURES = 0.5


class Skipped:
  """Counts clips that could not be read, by id. Safe to share by threads."""

  def __init__(self) -> None:
    self._counts: Counter[str] = Counter()
    self._lock = threading.Lock()

  def add(self, names: Sequence[str]) -> None:
    """Counts every name once more."""
    with self._lock:
      self._counts.update(names)

  def dump(self) -> dict[str, int]:
    """id -> how often it was skipped."""
    with self._lock:
      return dict(self._counts)

  def load(self, counts: Mapping[str, int]) -> None:
    """Starts from what a checkpoint holds."""
    with self._lock:
      self._counts = Counter(counts)


# ---- what is there ----------------------------------------------------------


@functools.lru_cache(maxsize=8)
def _builder(folder: str) -> Any:
  return tfds.builder_from_directory(folder)


def num_examples(data: Any, split: str = "") -> int:
  """Clips of a split of the built data set; '' = the training split.

  Raises:
    InputError: the data set is not built or has no such split.
  """
  split = split or data.split
  splits = _builder(str(built_dir(data))).info.splits
  count = lookup(splits, split, f"split of {data.name}").num_examples
  return min(count, data.limit) if data.limit and split == data.split else count


def steps_per_epoch(data: Any, batch_size: int) -> int:
  """Whole batches in the training split.

  Raises:
    InputError: the split is smaller than a batch; names both numbers.
  """
  count = num_examples(data)
  if count < batch_size:
    raise InputError(
      f"split {data.split} of {data.name} holds {count} clips, batch size "
      f"{batch_size}"
    )
  return count // batch_size


def class_names(data: Any, head: str = "label") -> list[str]:
  """Names in the order of the class numbers; [] if none are stored."""
  path = built_dir(data) / "classes.json"
  return json.loads(path.read_text()).get(head, []) if path.exists() else []


def head_sizes(data: Any) -> dict[str, int]:
  """Number of classes of every head that `data.heads` names.

  Raises:
    InputError: the data set has no such head.
  """
  heads = lookup(DATASETS, data.name, "data set").heads
  sizes = {h: lookup(heads, h, f"head of {data.name}") for h in data.heads
           if data.name != "folder"}  # fmt: skip
  if data.name == "folder":
    sizes = {head: len(class_names(data, head)) for head in data.heads}
  return sizes


def batch_shapes(
  data: Any, batch_size: int, views: int = 0
) -> dict[str, tuple[tuple[int, ...], Any]]:
  """Shape and dtype of every array of a batch; see avjax.batch.BATCH."""
  lead = (batch_size, views) if views > 1 else (batch_size,)
  video, audio = data.video, data.audio
  shapes: dict[str, tuple[tuple[int, ...], Any]] = {}
  if "v" in data.modality:
    size = (video.num_frames, video.size, video.size, 3)
    shapes["frames"] = (lead + size, np.uint8)
  if "a" in data.modality:
    samples = round(audio.seconds * audio.rate)
    shapes["waveform"] = ((*lead, samples), np.int16)
  for head, count in head_sizes(data).items():
    key = head if head == "label" else f"label/{head}"
    size = (count,)
    if head == "segment":
      size = (round(DATASETS[data.name].seconds), count)
    shapes[key] = ((batch_size, *size), np.float32)
  for key, dtype in (
    ("has_audio", np.bool_),
    ("has_video", np.bool_),
    ("valid", np.bool_),
    ("index", np.uint32),
  ):
    shapes[key] = ((batch_size,), dtype)
  return shapes


# ---- one batch --------------------------------------------------------------


class Maker:
  """Makes the arrays of one batch from numbers of stored clips.

  Instances go to worker processes, so they hold no open file.
  """

  def __init__(self, data: Any, split: str, *, seed: int = 0, views: int = 0):
    self.data, self.split, self.seed, self.views = data, split, seed, views
    self.folder = str(built_dir(data))

  def __getstate__(self) -> dict[str, Any]:
    return {k: v for k, v in self.__dict__.items() if k != "source"}

  @functools.cached_property
  def source(self) -> Any:
    """Random access to the stored clips."""
    return _builder(self.folder).as_data_source(split=self.split)

  def __call__(
    self, numbers: Sequence[int], stored: Sequence[int], count: int
  ) -> Batch:
    """A batch.

    Args:
      numbers: what `index` holds and what seeds each clip's draws.
      stored: which clip of the split each is.
      count: clips of the split, from which replacements come.
    """
    shapes = batch_shapes(self.data, len(numbers), self.views)
    batch: Batch = {k: np.zeros(s, d) for k, (s, d) in shapes.items()}
    batch["id"], batch["skipped"] = [], []
    for row, (number, clip) in enumerate(zip(numbers, stored, strict=True)):
      for attempt in range(count):
        if self._fill(batch, row, int(number), (int(clip) + attempt) % count):
          break
        self._check(batch, len(numbers))
    return batch

  def _check(self, batch: Batch, size: int) -> None:
    failed = len(batch["skipped"])
    if failed > max(1, MOST_FAILURES * size):
      raise InputError(
        f"{failed} clips of a batch of {size} from {self.folder} cannot be "
        f"read: {', '.join(batch['skipped'][:5])}, …"
      )

  def _fill(self, batch: Batch, row: int, number: int, clip: int) -> bool:
    """Writes one example; False if its clip cannot be read."""
    name = f"clip {clip} of {self.split}"
    try:
      record = self.source[clip]
      name = text(record["id"])
      fill(batch, row, record, name, self._cuts(record, number), self.data)
    except (InputError, KeyError):
      raise
    except (ValueError, OSError, RuntimeError, IndexError) as error:
      batch["skipped"].append(f"{name} ({type(error).__name__}: {error})"[:200])
      return False
    batch["index"][row] = number % 2**32
    batch["valid"][row] = True
    batch["id"].append(name)
    return True

  def _cuts(self, record: Any, number: int) -> tuple[list[clips.Cut], Any]:
    if self.views:
      return clips.view_cuts(record, self.data, self.views), None
    rng = np.random.default_rng((self.seed, number))
    return [clips.random_cut(record, self.data, rng)], rng


def text(value: Any) -> str:
  """Stored text as str."""
  return value.decode() if isinstance(value, bytes) else str(value)


def fill(
  batch: Batch, row: int, record: Any, name: str, cuts: Any, data: Any
) -> None:
  """Writes one clip into row `row` of the batch's arrays."""
  cuts, rng = cuts
  several = len(cuts) > 1
  has_video = len(record["frames"]) > 0
  has_audio = len(record["waveform"]) > 0
  for view, cut in enumerate(cuts):
    place = (row, view) if several else (row,)
    if "frames" in batch and has_video:
      clips.write_frames(record, cut.frames, data, rng, batch["frames"][place])
    if "waveform" in batch and has_audio:
      clips.write_waveform(record, cut, batch["waveform"][place])
  for key in batch:
    if key == "label" or key.startswith("label/"):
      head = key.removeprefix("label/")
      clips.write_label(record, head, name, batch[key][row])
  batch["has_audio"][row] = has_audio and "waveform" in batch
  batch["has_video"][row] = has_video and "frames" in batch


# ---- training ---------------------------------------------------------------


@functools.lru_cache(maxsize=4)
def _order(count: int, seed: int, epoch: int) -> np.ndarray:
  return np.random.default_rng((seed, epoch)).permutation(count)


@functools.lru_cache(maxsize=4)
def _balanced(folder: str, split: str, seed: int, epoch: int) -> np.ndarray:
  """Draws with replacement, a clip's weight summed over its labels' 1/n."""
  only = {"label": True, "id": True}
  builder = _builder(folder)
  source = builder.as_data_source(
    split=split, decoders=tfds.decode.PartialDecoding(only)
  )
  labels = [np.atleast_1d(record["label"]) for record in source]
  counts = Counter(int(k) for row in labels for k in row)
  weights = np.array([sum(1 / counts[int(k)] for k in row) for row in labels])
  rng = np.random.default_rng((seed, epoch))
  return rng.choice(len(labels), size=len(labels), p=weights / weights.sum())


@functools.lru_cache(maxsize=4)
def _steps(batch_size: int, share: int, process_index: int) -> np.ndarray:
  return np.arange(batch_size)[process_index * share :][:share]


class _TrainStep:
  """step -> this process's share of the global batch."""

  def __init__(self, maker, batch_size, share, process_index, count):
    self.maker, self.batch_size, self.share = maker, batch_size, share
    self.process_index, self.count = process_index, count

  def __call__(self, step: int) -> Batch:
    positions = _steps(self.batch_size, self.share, self.process_index)
    numbers = step * self.batch_size + positions
    maker = self.maker
    stored = []
    for number in numbers:
      epoch, place = divmod(int(number), self.count)
      if maker.data.sampling == "balanced":
        order = _balanced(maker.folder, maker.split, maker.seed, epoch)
      else:
        order = _order(self.count, maker.seed, epoch)
      stored.append(order[place])
    return maker(numbers, stored, self.count)


def train_batches(
  data: Any,
  *,
  batch_size: int,
  seed: int,
  start_step: int = 0,
  process_index: int = 0,
  process_count: int = 1,
  skipped: Skipped | None = None,
) -> Iterator[Batch]:
  """Endless training batches; the first is that of step `start_step`.

  Args:
    data: `config.data`.
    batch_size: global; this process yields its contiguous share.
    seed: of order and draws.
    start_step: number of steps already taken.
    process_index: of this host.
    process_count: of all hosts.
    skipped: is told which clips could not be read.

  Yields:
    Host batches (avjax.batch.BATCH) with `id`, a list of str.

  Raises:
    InputError: an unknown sampling, a batch that the processes do not divide,
      or a split smaller than a batch.
  """
  lookup({"shuffle": 0, "balanced": 0}, data.sampling, "data.sampling")
  if batch_size % process_count:
    raise InputError(
      f"batch size {batch_size} is not divisible by the {process_count} "
      "processes"
    )
  steps_per_epoch(data, batch_size)
  step = _TrainStep(
    Maker(data, data.split, seed=seed),
    batch_size,
    batch_size // process_count,
    process_index,
    num_examples(data),
  )
  steps = grain.MapDataset.range(start_step, 2**40).map(step)
  return _Stream(_iterate(steps, data), skipped or Skipped())


def _iterate(batches: grain.MapDataset, data: Any) -> Any:
  """Threads of this process, or worker processes where `data` says so."""
  if not data.workers:
    options = grain.ReadOptions(data.threads, max(2, data.threads))
    return iter(batches.to_iter_dataset(options))
  from absl import flags

  if not flags.FLAGS.is_parsed():
    # Grain's workers read absl flags, which a notebook never parses.
    flags.FLAGS.mark_as_parsed()
  options = grain.MultiprocessingOptions(
    num_workers=data.workers, per_worker_buffer_size=2
  )
  return iter(
    batches.to_iter_dataset(grain.ReadOptions(1, 2)).mp_prefetch(options)
  )


class _Stream:
  """Takes the list of skipped clips out of every batch."""

  def __init__(self, batches: Any, skipped: Skipped):
    self._batches, self._skipped = batches, skipped

  def __iter__(self) -> "_Stream":
    return self

  def __next__(self) -> Batch:
    batch = next(self._batches)
    self._skipped.add(batch.pop("skipped"))
    return batch


# ---- evaluation -------------------------------------------------------------


class _EvalStep:
  """Batch number -> this process's share of it, padded."""

  def __init__(self, maker, batch_size, share, process_index, count):
    self.maker, self.batch_size, self.share = maker, batch_size, share
    self.process_index, self.count = process_index, count

  def __call__(self, step: int) -> Batch:
    positions = _steps(self.batch_size, self.share, self.process_index)
    numbers = step * self.batch_size + positions
    # Padding repeats the last clip, so that no garbage is computed on.
    stored = np.minimum(numbers, self.count - 1)
    batch = self.maker(numbers, stored, self.count)
    batch["valid"] &= numbers < self.count
    return batch


def eval_batches(
  data: Any,
  *,
  split: str,
  batch_size: int,
  views: int = 1,
  limit: int = 0,
  process_index: int = 0,
  process_count: int = 1,
  skipped: Skipped | None = None,
) -> Iterator[Batch]:
  """All clips of a split in order; the last batch is padded.

  Args:
    data: `config.data`.
    split: to read.
    batch_size: global; this process yields its contiguous share.
    views: temporal views a clip; with several, `frames` are [b v t h w 3] and
      `waveform` [b v s].
    limit: first clips only; 0 = all.
    process_index: of this host.
    process_count: of all hosts.
    skipped: is told which clips could not be read (another takes the place).

  Raises:
    InputError: no such split, it is empty, or the processes do not divide the
      batch.
  """
  count = num_examples(data, split)
  count = min(count, limit) if limit else count
  if not count:
    raise InputError(f"split {split} of {data.name} holds 0 clips")
  if batch_size % process_count:
    raise InputError(
      f"evaluation batch size {batch_size} is not divisible by the "
      f"{process_count} processes"
    )
  share = batch_size // process_count
  step = _EvalStep(
    Maker(data, split, views=views), batch_size, share, process_index, count
  )
  steps = grain.MapDataset.range(-(-count // batch_size)).map(step)
  return _Stream(_iterate(steps, data), skipped or Skipped())


# The rate at which media files are read for a model; data sets store the same.
FILE_RATE = 12.5


def batch_of_files(paths: Sequence[Any], data: Any) -> Batch:
  """Media files as one batch, cut as in evaluation (the centre of the clip).

  Raises:
    InputError: a file cannot be read, or lacks every track that is needed.
  """
  shapes = batch_shapes(data, len(paths))
  batch: Batch = {
    key: np.zeros(shape, dtype)
    for key, (shape, dtype) in shapes.items()
    if not key.startswith("label")
  }
  batch["id"] = [str(path) for path in paths]
  for row, path in enumerate(paths):
    clip = media.read_clip(
      path,
      frame_rate=FILE_RATE,
      short_side=2 * data.video.resize,
      audio_rate=data.audio.rate,
      tracks=data.modality,
    )
    record = {
      "frames": clip.frames if clip.frames is not None else (),
      "waveform": clip.waveform if clip.waveform is not None else (),
      "frame_rate": FILE_RATE,
    }
    cuts = (clips.view_cuts(record, data, 1), None)
    fill(batch, row, record, str(path), cuts, data)
    if not (batch["has_audio"][row] or batch["has_video"][row]):
      raise InputError(f"{path} has none of the tracks {data.modality!r}")
  batch["valid"][:] = True
  batch["index"][:] = np.arange(len(paths))
  return batch


# ---- to the devices ---------------------------------------------------------


def device_batches(
  batches: Iterator[Batch], sharding: Any, prefetch: int
) -> "DeviceBatches":
  """Host batches -> (global device arrays, ids), prefetched by a thread.

  Args:
    batches: host batches of this process.
    sharding: of the global batch along its first axis.
    prefetch: batches in flight.
  """
  return DeviceBatches(batches, sharding, prefetch)


class DeviceBatches:
  """The iterator of `device_batches`; `close` it when done."""

  _END = object()

  def __init__(self, batches: Iterator[Batch], sharding: Any, prefetch: int):
    self._queue: queue.Queue = queue.Queue(max(1, prefetch))
    self._stop = threading.Event()
    self._thread = threading.Thread(
      target=self._work, args=(batches, sharding), daemon=True
    )
    self._thread.start()

  def _work(self, batches: Iterator[Batch], sharding: Any) -> None:
    try:
      for batch in batches:
        names = batch.pop("id")
        arrays = {
          key: jax.make_array_from_process_local_data(sharding, value)
          for key, value in batch.items()
        }
        if not self._put((arrays, names)):
          return
      self._put(self._END)
    except Exception as error:
      # Handed to the consumer, which raises it.
      self._put(error)

  def _put(self, item: Any) -> bool:
    while not self._stop.is_set():
      try:
        self._queue.put(item, timeout=0.1)
        return True
      except queue.Full:
        continue
    return False

  def __iter__(self) -> "DeviceBatches":
    return self

  def __next__(self) -> tuple[dict[str, jax.Array], list[str]]:
    item = self._queue.get()
    if item is self._END:
      raise StopIteration
    if isinstance(item, Exception):
      raise item
    return item

  def close(self) -> None:
    """Stops the thread; batches in flight are dropped."""
    self._stop.set()
    self._thread.join(timeout=10)
