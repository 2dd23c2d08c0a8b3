"""Clips decoded in processes of their own.

A process is started as this module, not through `multiprocessing`, which would
run the caller's script again: so it works from a script without a `__main__`
guard, from a notebook and from pytest. A file that crashes its decoder costs
that one clip: the process is replaced and the clip counted as corrupt.
"""

import collections
import contextlib
import dataclasses
import functools
import os
import pathlib
import pickle
import queue
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator
from concurrent import futures

import numpy as np
import simplejpeg
from jaxtyping import Int16

from avjax.data import media
from avjax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Task:
  """One clip to read; see `avjax.data.media.read_clip`.

  Attributes:
    variant: `video` or `frames10`.
    quality: of the JPEG frames.
  """

  path: str
  start: float = 0.0
  end: float | None = None
  variant: str = "video"
  frame_rate: float = media.VIDEO_RATE
  short_side: int = 256
  audio_rate: int = 16_000
  channels: str = "mean"
  quality: int = 85
  limits: media.Limits = media.Limits()


@dataclasses.dataclass(frozen=True)
class Encoded:
  """What became of a task.

  Attributes:
    problem: '' or the reason why there is no clip: 'missing file', 'corrupt'
      or 'too short'.
    message: the reason in words, or what was damaged in a clip that is there.
    frames: JPEG files; empty without pictures.
    frame_rate: of `frames`.
    waveform: int16 [s]; empty without sound.
    seconds: length of the clip.
    height, width: of the pictures in the file.
  """

  problem: str
  message: str
  frames: tuple[bytes, ...] = ()
  frame_rate: float = media.VIDEO_RATE
  waveform: Int16[np.ndarray, "s"] = dataclasses.field(
    default_factory=lambda: np.zeros(0, np.int16)
  )
  seconds: float = 0.0
  height: int = 0
  width: int = 0

  @property
  def has_audio(self) -> bool:
    """There is sound."""
    return len(self.waveform) > 0


def encode(task: Task) -> Encoded:
  """Reads a clip and compresses its frames; never raises for a bad file."""
  try:
    clip = media.read_clip(
      task.path,
      start=task.start,
      end=task.end,
      frame_rate=task.frame_rate,
      short_side=task.short_side,
      audio_rate=task.audio_rate,
      channels=task.channels,
      limits=task.limits,
    )
  except media.Unreadable as error:
    return Encoded(error.reason, str(error))
  except (InputError, OSError) as error:
    return Encoded("corrupt", str(error))
  pictures = [] if clip.frames is None else list(clip.frames)
  pictures, rate = media.spread(pictures, task.variant, task.frame_rate)
  jpeg = functools.partial(
    simplejpeg.encode_jpeg,
    quality=task.quality,
    colorspace="RGB",
    colorsubsampling="420",
  )
  return Encoded(
    problem="",
    message=", ".join(clip.notes),
    frames=tuple(jpeg(picture) for picture in pictures),
    frame_rate=rate,
    seconds=clip.seconds,
    height=clip.height,
    width=clip.width,
    **({} if clip.waveform is None else {"waveform": clip.waveform}),
  )


def encode_all(
  tasks: Iterable[Task], *, workers: int, timeout: float = 600.0
) -> Iterator[Encoded]:
  """Results in the order of the tasks.

  Args:
    tasks: are drawn from a little ahead of the results.
    workers: processes; 0 = none, decode in this one.
    timeout: seconds after which a process is taken to hang.
  """
  if not workers:
    yield from map(encode, tasks)
    return
  pool = _Pool(workers, timeout)
  waiting: collections.deque = collections.deque()
  try:
    for task in tasks:
      waiting.append(pool.submit(task))
      if len(waiting) > 2 * workers:
        yield waiting.popleft().result()
    while waiting:
      yield waiting.popleft().result()
  finally:
    pool.close()


class _Pool:
  """Threads of this process, each of which feeds one worker process."""

  def __init__(self, workers: int, timeout: float):
    self._threads = futures.ThreadPoolExecutor(workers)
    self._idle: queue.SimpleQueue = queue.SimpleQueue()
    self._timeout = timeout
    self._running: set[subprocess.Popen] = set()
    for _ in range(workers):
      self._idle.put(None)  # started when first needed

  def submit(self, task: Task) -> futures.Future:
    return self._threads.submit(self._run, task)

  def _run(self, task: Task) -> Encoded:
    process = self._idle.get() or self._start()
    timer = threading.Timer(self._timeout, process.kill)
    timer.start()
    try:
      pickle.dump(task, process.stdin)
      process.stdin.flush()
      result = pickle.load(process.stdout)
    except (EOFError, OSError, pickle.UnpicklingError):
      self._end(process)
      process = None
      result = Encoded(
        "corrupt",
        f"{task.path}: its decoder crashed or took over {self._timeout:g} s",
      )
    finally:
      timer.cancel()
      self._idle.put(process)
    return result

  def _start(self) -> subprocess.Popen:
    root = str(pathlib.Path(__file__).resolve().parents[1])
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    process = subprocess.Popen(
      [sys.executable, "-m", "data_prep.decode"],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
    )
    self._running.add(process)
    return process

  def _end(self, process: subprocess.Popen) -> None:
    self._running.discard(process)
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
      with contextlib.suppress(OSError):
        pipe.close()

  def close(self) -> None:
    for process in list(self._running):
      process.kill()  # so that no thread waits for one
    self._threads.shutdown(cancel_futures=True)
    for process in list(self._running):
      self._end(process)


def _worker() -> None:
  """Tasks from standard input, results to standard output, until it ends."""
  results = os.fdopen(os.dup(1), "wb")
  os.dup2(2, 1)  # whatever a library prints must not mix with the results
  while True:
    try:
      task = pickle.load(sys.stdin.buffer)
    except EOFError:
      return
    pickle.dump(encode(task), results)
    results.flush()


if __name__ == "__main__":
  # Unpickled tasks belong to the module under its real name.
  from data_prep import decode

  decode._worker()
