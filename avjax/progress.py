"""Progress of long work on the terminal, or as a line now and then."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from rich import console
from rich import progress as rich_progress

SAY_EVERY = 10.0  # seconds, where there is no terminal


def track(
  items: Iterable[Any],
  total: int,
  name: str,
  count: Callable[[Any], int] = lambda item: 1,
) -> Iterator[Any]:
  """Passes items on, showing their number, rate and time left.

  Args:
    items: of any kind.
    total: clips in all.
    name: what is done.
    count: clips in an item.
  """
  screen = console.Console(stderr=True)
  columns = (
    rich_progress.TextColumn("{task.description}"),
    rich_progress.BarColumn(),
    rich_progress.MofNCompleteColumn(),
    rich_progress.TextColumn("{task.fields[rate]:.0f} clips/s"),
    rich_progress.TimeRemainingColumn(),
  )
  began = said = time.perf_counter()
  live = screen.is_terminal or screen.is_jupyter
  done = 0
  with rich_progress.Progress(
    *columns, console=screen, disable=not live
  ) as bar:
    task = bar.add_task(name, total=total, rate=0.0)
    for item in items:
      done += count(item)
      now = time.perf_counter()
      rate = done / max(now - began, 1e-6)
      bar.update(task, completed=done, rate=rate)
      if not live and now - said > SAY_EVERY:
        said, left = now, (total - done) / max(rate, 1e-6)
        print(
          f"{name}: {done}/{total}, {rate:.0f} clips/s, {left:.0f} s left",
          file=sys.stderr,
        )
      yield item
