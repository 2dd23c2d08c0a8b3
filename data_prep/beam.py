"""The same build by Apache Beam: on this machine, or on a cluster.

An element of the pipeline is one part (`data_prep.parts`): 256 rows, read from
a file, whose records and outcomes a worker writes beside it. So every worker
must see the media and the data folder under the same paths (NFS, Lustre, a
mounted bucket), and a build that was stopped goes on as a local one does.
"""

import argparse
import contextlib
import dataclasses
import difflib
import os
import pathlib
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

from avjax.errors import InputError
from data_prep import parts
from data_prep.recorder import Recorder

POLL = (0.5, 10.0)  # seconds between looks for finished parts, rising
# Seconds for which notes are still looked for after the pipeline has ended: a
# network file system may show them late.
LATE = 90.0


def make(
  recorder: Recorder, todo: Sequence[parts.Part], flags: Sequence[str]
) -> Iterator[str]:
  """Makes parts; yields the split of each row that is done.

  Args:
    recorder: makes the records.
    todo: parts that are not finished, all in one folder.
    flags: options of the pipeline, such as 'runner=DataflowRunner'.

  Raises:
    InputError: Beam is not installed, or cannot use an option.
    RuntimeError: the pipeline ended without all parts.
  """
  pipeline = _pipeline(flags)
  media = recorder.options.media.absolute()
  recorder = dataclasses.replace(
    recorder, options=dataclasses.replace(recorder.options, media=media)
  )
  paths = [str(part.write_rows().absolute()) for part in todo]
  job = _Job(pipeline, paths, _Step(recorder))
  job.start()
  try:
    yield from _finished(todo, job)
  finally:
    job.cancel()


def _finished(todo: Sequence[parts.Part], job: "_Job") -> Iterator[str]:
  """The splits of the rows of parts, as they appear in their folder."""
  folder = todo[0].path.parent
  waiting = {part.note.name: part for part in todo}
  pause, ended = POLL[0], None
  while waiting:
    job.join(pause)
    pause = min(1.5 * pause, POLL[1])
    if not job.is_alive() and ended is None:
      if job.failure:
        raise job.failure
      ended, pause = time.monotonic(), POLL[0]
    # One look at the folder, not one for each of thousands of parts.
    there = waiting.keys() & {entry.name for entry in os.scandir(folder)}
    for name in [name for name in there if waiting[name].finished]:
      part = waiting.pop(name)
      yield from [part.split] * len(part.rows)
    if ended and waiting and time.monotonic() - ended > LATE:
      part = next(iter(waiting.values()))
      raise RuntimeError(
        f"the pipeline ended, but {part.path} is not finished: do its workers "
        "see this folder under the same path?"
      )
  job.join()
  if job.failure:
    raise job.failure


class _Job(threading.Thread):
  """A running pipeline."""

  def __init__(self, pipeline: Any, paths: Sequence[str], step: "_Step"):
    super().__init__(daemon=True)
    self.failure: BaseException | None = None
    self._pipeline, self._result = pipeline, None
    self._paths, self._step = paths, step

  def run(self) -> None:
    try:
      self._result = _start(self._pipeline, self._paths, self._step)
      self._result.wait_until_finish()
    except BaseException as error:  # the thread that waits raises it
      self.failure = error

  def cancel(self) -> None:
    """Ends it, where the runner can."""
    if self.is_alive() and self._result is not None:
      with contextlib.suppress(Exception):
        self._result.cancel()


class _Step:
  """What a worker does with an element."""

  def __init__(self, recorder: Recorder):
    self.recorder = recorder

  def __call__(self, path: str) -> None:
    part = parts.read_rows(pathlib.Path(path))
    if not part.finished:  # a runner may repeat an element
      self.recorder.make(part)


def _pipeline(flags: Sequence[str]) -> Any:
  try:
    import apache_beam
    from apache_beam.options import pipeline_options
  except ImportError as error:
    raise InputError(
      "--beam_pipeline_options needs Apache Beam: pip install -e '.[beam]'"
    ) from error
  arguments = [f"--{flag.lstrip('-')}" for flag in flags]
  try:
    options = pipeline_options.PipelineOptions(arguments)
    options.get_all_options()  # parses the values
    _say_unknown(arguments, pipeline_options.PipelineOptions)
    return apache_beam.Pipeline(options=options)
  except SystemExit as error:  # argparse has printed what it expected
    raise InputError(
      f"--beam_pipeline_options={','.join(flags)}: a value does not fit"
    ) from error
  except ValueError as error:
    raise InputError(f"--beam_pipeline_options: {error}") from error


def _say_unknown(arguments: Sequence[str], kind: type) -> None:
  """Options that Beam does not know go on to the runner; misspelt ones, too."""
  parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
  for options in kind.__subclasses__():
    with contextlib.suppress(argparse.ArgumentError):  # defined twice
      options._add_argparse_args(parser)
  known = list(parser._option_string_actions)
  for argument in parser.parse_known_args(arguments)[1]:
    name = argument.split("=")[0]
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    print(f"{name!r} is no option of Beam's own{hint}", file=sys.stderr)


def _start(pipeline: Any, paths: Sequence[str], step: _Step) -> Any:
  import apache_beam

  elements = pipeline | "parts" >> apache_beam.Create(paths)
  # Spread them over the workers before anything is decoded.
  elements = elements | "spread" >> apache_beam.Reshuffle()
  elements | "make" >> apache_beam.Map(step)
  return pipeline.run()
