"""Batches on their way from the host to the devices."""

import contextlib
import queue
import threading
from collections.abc import Iterator
from typing import Any


def device_batches(
  batches: Iterator[dict[str, Any]], sharding: Any, prefetch: int = 2
) -> "DeviceBatches":
  """Host batches -> (global device arrays, ids), some of them ahead.

  Args:
    batches: host batches, this process's share each.
    sharding: of every array (over its first axis).
    prefetch: batches that wait on the devices at most.
  """
  return DeviceBatches(batches, sharding, prefetch)


class DeviceBatches:
  """See `device_batches`.

  An error of the host side is raised by `next`. `close` stops the thread and
  the host's iterator; so do a `with` statement and the end of the iterator.
  """

  def __init__(
    self, batches: Iterator[dict[str, Any]], sharding: Any, prefetch: int
  ):
    self._ready: queue.Queue = queue.Queue(max(prefetch, 1))
    self._stop = threading.Event()
    self._batches = batches
    # The thread must not hold `self`, or it could never be collected.
    self._thread = threading.Thread(
      target=_send,
      args=(batches, sharding, self._ready, self._stop),
      daemon=True,
    )
    self._thread.start()

  def __iter__(self) -> "DeviceBatches":
    return self

  def __next__(self) -> tuple[dict[str, Any], list[str]]:
    if self._stop.is_set():
      raise StopIteration
    item = self._ready.get()
    if isinstance(item, BaseException):
      self.close()
      raise item
    return item

  def close(self) -> None:
    """Stops; may be called twice."""
    if self._stop.is_set():
      return
    self._stop.set()
    with contextlib.suppress(queue.Empty):
      while True:  # so that the thread does not wait for room
        self._ready.get_nowait()
    self._thread.join()
    close = getattr(self._batches, "close", None)
    if close is not None:
      close()

  def __enter__(self) -> "DeviceBatches":
    return self

  def __exit__(self, *exc_info: object) -> None:
    self.close()

  def __del__(self) -> None:
    self.close()


def _send(batches, sharding, ready, stop) -> None:
  """Fills the queue; the last item is the reason of the end."""
  import jax  # workers that only decode never start it

  def put(item: Any) -> None:
    while not stop.is_set():
      with contextlib.suppress(queue.Full):
        ready.put(item, timeout=0.1)
        return

  try:
    for batch in batches:
      arrays = {
        key: jax.make_array_from_process_local_data(sharding, value)
        for key, value in batch.items()
        if key != "id"
      }
      put((arrays, batch["id"]))
      if stop.is_set():
        return
    put(StopIteration())
  except BaseException as error:  # is raised by next
    put(error)
