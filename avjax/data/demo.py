"""`av_demo`, the built-in data set: clips drawn and synthesised from a seed.

24 classes in 7 groups. Twelve of them are six pairs that look alike and sound
different (violin and guitar); the other twelve are six pairs that sound alike
and look different (bell and glockenspiel). So one modality alone cannot pass
three quarters, and both together can come near to all. Noise, silent objects,
sounds from outside the picture and clips with several sounding objects stand in
the way of either.

A clip follows from (seed, split, number) alone: how many clips are made, by how
many processes and in which order, changes nothing. Its files are a real MP4
(H.264, 112x112, 25 frames/s; AAC, mono, 16 kHz; 3 s) and a line of
annotations.jsonl, whose fields `demo_clip.record` lists.
"""

import contextlib
import json
import operator
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence

from rich import console
from rich import progress as rich_progress

import avjax
from avjax.data import demo_clip
from avjax.errors import InputError
from avjax.workdir import replacing

CLASSES: tuple[str, ...] = demo_clip.CLASSES
GROUPS: dict[str, str] = demo_clip.GROUPS
VERBS: tuple[str, ...] = demo_clip.VERBS
NOUNS: tuple[str, ...] = demo_clip.NOUNS

Key = tuple[str, int, int]  # split, number, seed: all that a clip follows from

# A process of its own costs about as much as this many clips.
_CLIPS_PER_PROCESS = 16


def write_media(
  folder: pathlib.Path,
  *,
  clips_per_class: int,
  test_per_class: int,
  seed: int,
  processes: int = 0,
  progress: bool = True,
) -> pathlib.Path:
  """Writes `media/<id>.mp4` and annotations.jsonl into a folder.

  Clips that are there are kept, so a second call goes on where the first one
  was stopped, or makes a set larger; each file is written under another name
  and renamed. The annotations are written last.

  Args:
    folder: is made if need be; holds one seed's clips only.
    clips_per_class: training clips of each of the 24 classes.
    test_per_class: test clips of each class, may be 0.
    seed: of all that is drawn at random.
    processes: how many run at once; 0 = one a core.
    progress: shows a bar with rate and time left on standard error.

  Returns:
    The path of annotations.jsonl; `file` in it is relative to its folder.

  Raises:
    InputError: a number is out of range, or the folder holds clips of another
      seed or of another version of the drawings.
    RuntimeError: a process that makes clips has failed; its message is quoted.
  """
  for name, value, least in (
    ("clips_per_class", clips_per_class, 1),
    ("test_per_class", test_per_class, 0),
    ("seed", seed, 0),
    ("processes", processes, 0),
  ):
    if operator.index(value) < least:
      raise InputError(f"{name} is {value}; it must be at least {least}")
  folder = pathlib.Path(folder).expanduser()
  media = folder / "media"
  media.mkdir(parents=True, exist_ok=True)
  _check_settings(folder, seed)
  counts = zip(demo_clip.SPLITS, (clips_per_class, test_per_class), strict=True)
  keys = [
    (split, number, seed)
    for split, count in counts
    for number in range(count * len(CLASSES))
  ]
  present = {path.name for path in media.iterdir()}
  missing = [
    k for k in keys if f"{demo_clip.clip_id(*k[:2])}.mp4" not in present
  ]
  _track(_make(media, missing, processes), len(missing), shown=progress)
  annotations = folder / "annotations.jsonl"
  if not _lists(annotations, keys):
    records = (demo_clip.record(demo_clip.plan_clip(*key)) for key in keys)
    lines = "".join(json.dumps(line) + "\n" for line in records)
    _write(annotations, lines.encode())
  return annotations


def _lists(annotations: pathlib.Path, keys: Sequence[Key]) -> bool:
  """Whether the file has the records of just these clips."""
  if not annotations.exists():
    return False
  lines = annotations.read_text().splitlines()
  return len(lines) == len(keys) and all(
    line.startswith(f'{{"id": "{demo_clip.clip_id(split, number)}"')
    for line, (split, number, _) in zip(lines, keys, strict=True)
  )


def _check_settings(folder: pathlib.Path, seed: int) -> None:
  """Refuses to mix the clips of two seeds or versions in one folder."""
  path = folder / "settings.json"
  wanted = {"version": demo_clip.VERSION, "seed": seed}
  if not path.exists():
    _write(path, json.dumps(wanted).encode())
  found = json.loads(path.read_text())
  for name, value in wanted.items():
    if found.get(name) != value:
      raise InputError(
        f"{path} says {name} {found.get(name)}, but {name} {value} is asked "
        "for: name another folder, or delete this one"
      )


def _write(path: pathlib.Path, content: bytes) -> None:
  """Writes a file that is whole or absent at any time."""
  with replacing(path) as temporary:
    temporary.write_bytes(content)


def write_clips(media: pathlib.Path, keys: Iterable) -> Iterator[str]:
  """Draws, synthesises and writes clips; yields the id of each when done."""
  for key in keys:
    clip = demo_clip.plan_clip(*key)
    content = demo_clip.encode(*demo_clip.render(clip))
    _write(media / f"{clip.id}.mp4", content)
    yield clip.id


def _track(done: Iterator[str], total: int, *, shown: bool) -> None:
  """Waits for all clips behind a progress bar."""
  columns = (
    rich_progress.TextColumn("av_demo"),
    rich_progress.BarColumn(),
    rich_progress.MofNCompleteColumn(),
    rich_progress.TextColumn("{task.fields[rate]:.0f} clips/s"),
    rich_progress.TimeRemainingColumn(),
  )
  with rich_progress.Progress(
    *columns,
    console=console.Console(stderr=True),
    disable=not (shown and total),
  ) as bar:
    task = bar.add_task("av_demo", total=total, rate=0.0)
    start = time.perf_counter()
    for count, _ in enumerate(done, 1):
      rate = count / (time.perf_counter() - start)
      bar.update(task, advance=1, rate=rate)


# --- Processes. They are started as a module of their own, which, unlike
# multiprocessing, does not run the caller's script again: a script without a
# `__main__` guard, a notebook and `python -` all work.


def _make(
  media: pathlib.Path, keys: Sequence[Key], processes: int
) -> Iterator[str]:
  """Yields the ids as clips are finished."""
  cores = os.cpu_count() or 1
  if hasattr(os, "sched_getaffinity"):
    cores = len(os.sched_getaffinity(0))
  workers = min(processes or cores, -(-len(keys) // _CLIPS_PER_PROCESS))
  if workers < 2:
    return write_clips(media, keys)
  return _from_workers(media, [keys[k::workers] for k in range(workers)])


def _start(media: pathlib.Path, keys: Sequence[Key], ids: int, errors):
  """A process that makes clips and prints their ids to a descriptor."""
  root = str(pathlib.Path(avjax.__file__).resolve().parents[1])
  paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
  process = subprocess.Popen(
    [sys.executable, "-m", "avjax.data.demo", str(media.resolve())],
    stdin=subprocess.PIPE,
    stdout=ids,
    stderr=errors,
    env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
  )
  with contextlib.suppress(BrokenPipeError), process.stdin as pipe:
    pipe.write(json.dumps(keys).encode())
  return process


def _stop(process: subprocess.Popen) -> None:
  """Ends a process, if it has not ended."""
  process.kill()
  process.wait()


def _from_workers(media: pathlib.Path, jobs: Sequence) -> Iterator[str]:
  """Runs a process for each list of clips; ids come through one pipe."""
  reader, writer = os.pipe()
  running = []
  with contextlib.ExitStack() as stack:
    ids = stack.enter_context(open(reader))
    try:
      for keys in jobs:
        errors = stack.enter_context(tempfile.TemporaryFile())
        process = _start(media, keys, writer, errors)
        stack.callback(_stop, process)
        running.append((process, errors))
    finally:
      os.close(writer)
    for line in ids:
      yield line.strip()
    for process, errors in running:
      if process.wait():
        errors.seek(0)
        words = errors.read().decode(errors="replace")[-2000:]
        raise RuntimeError(
          f"a process that makes av_demo's clips ended with status "
          f"{process.returncode}:\n{words}"
        )


def _worker() -> None:
  """Makes the clips listed on standard input."""
  keys = json.loads(sys.stdin.read())
  for name in write_clips(pathlib.Path(sys.argv[1]), keys):
    print(name, flush=True)


if __name__ == "__main__":
  _worker()
