"""One batch: from its number to numpy arrays.

Rows are filled by a few threads. Every draw follows from (seed, number of the
example in the run), so neither threads nor processes change a batch.
"""

import functools
from concurrent import futures
from typing import Any

import cv2
import numpy as np

from avjax import allocator
from avjax.data import (
  buffers,
  clip_text,
  example,
  features,
  mixture,
  object_scores,
  order,
  records,
)
from avjax.errors import InputError

# Clips tried in the place of one that cannot be read.
_ATTEMPTS = 16
# Larger than any attempt: streams of their own.
_NO_DRAW = 1 << 32
_CAPTION = 1 << 33


def training_split(data: Any) -> records.Split | mixture.Mixture:
  """What a run trains on: `data.split` or `data.mixture`."""
  if data["mixture"]:
    return mixture.Mixture(data)
  return records.Split(
    data, data["split"], data["limit"], exclude=data["exclude"]
  )


class Batches:
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
    if views < 1:
      raise InputError(f"views is {views}; expected at least 1")
    training = seed is not None
    self.split = (
      training_split(data) if training else records.Split(data, split, limit)
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
    self.threads = max(data["threads"] // max(data["workers"], 1), 1)
    self.sums = None
    if seed is not None and data["sampling"] == "balanced":
      self.sums = np.cumsum(self.split.label_weights())
    elif data["sampling"] not in ("shuffle", "balanced"):
      raise InputError(
        f"data.sampling is {data['sampling']!r}; known: balanced, shuffle"
      )

  def _check(self, data: Any) -> None:
    """Compares what was built with what is asked for."""
    for key in ("workers", "threads"):
      if data[key] < 0:
        raise InputError(f"data.{key} is {data[key]}; expected 0 or more")
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
    made_here = ("_pool", "_order", "_buffers")
    return {k: v for k, v in self.__dict__.items() if k not in made_here}

  @functools.cached_property
  def _order(self) -> Any:
    """Position in the run -> number of a clip; shuffled anew every epoch."""
    if isinstance(self.split, mixture.Mixture):
      return self.split.order(self.seed)
    return order.Order(len(self.split), self.seed % (1 << 32))

  @functools.cached_property
  def _buffers(self) -> buffers.Buffers:
    return buffers.Buffers(self.shapes)

  @functools.cached_property
  def _pool(self) -> futures.ThreadPoolExecutor | None:
    _settle_process()
    if self.threads == 1:
      return None
    return futures.ThreadPoolExecutor(self.threads)

  def __call__(self, step: int) -> dict[str, Any]:
    batch: dict[str, Any] = self._buffers.take()
    first = int(step) * self.global_size + self.first
    rows: list[Any] = [None] * self.size
    todo = iter(range(self.size))

    def fill() -> None:
      for row in todo:  # shared: each thread takes the next row
        rows[row] = self._fill(batch, first, row)

    if self._pool is None:
      fill()
    else:
      jobs = [self._pool.submit(fill) for _ in range(self.threads)]
      futures.wait(jobs)  # an error must not leave writers behind
      for job in jobs:
        job.result()
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
        # Nothing is cut from stored features.
        rng = None if self.features else self._rng(position, attempt)
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
  allocator.settle()
