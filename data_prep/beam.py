"""The same build by Apache Beam: on this machine, or on a cluster.

An element of the pipeline is one part (`data_prep.parts`): 256 rows, read from
a file, whose records and outcomes a worker writes beside it. So every worker
must see the media and the data folder under the same paths (NFS, Lustre, a
mounted bucket), and a build that was stopped goes on as a local one does.
"""

import dataclasses
import pathlib
import threading
from collections.abc import Iterator, Sequence

from avjax.errors import InputError
from data_prep import parts
from data_prep.recorder import Recorder

POLL = 0.5  # seconds between looks for finished parts


def make(
  recorder: Recorder, todo: Sequence[parts.Part], flags: Sequence[str]
) -> Iterator[str]:
  """Makes parts; yields the split of each row that is done.

  Args:
    recorder: makes the records.
    todo: parts that are not finished.
    flags: options of the pipeline, such as 'runner=DataflowRunner'.

  Raises:
    InputError: Beam is not installed, or does not know the runner.
    RuntimeError: the pipeline ended without all parts.
  """
  pipeline = _pipeline(flags)
  media = recorder.options.media.absolute()
  recorder = dataclasses.replace(
    recorder, options=dataclasses.replace(recorder.options, media=media)
  )
  paths = [str(part.write_rows().absolute()) for part in todo]
  step = _Step(recorder)
  failures: list[Exception] = []

  def run() -> None:
    try:
      _run(pipeline, paths, step)
    except Exception as error:
      failures.append(error)

  thread = threading.Thread(target=run, daemon=True)
  thread.start()
  waiting = list(todo)
  while thread.is_alive() or waiting:
    thread.join(POLL)
    over = not thread.is_alive()  # before the look, so that none is missed
    for part in [part for part in waiting if part.finished]:
      waiting.remove(part)
      yield from [part.split] * len(part.rows)
    if over and failures:
      raise failures[0]
    if over and waiting:
      raise RuntimeError(
        f"the pipeline ended, but {waiting[0].path} is not finished: do its "
        "workers see this folder under the same path?"
      )


class _Step:
  """What a worker does with an element."""

  def __init__(self, recorder: Recorder):
    self.recorder = recorder

  def __call__(self, path: str) -> None:
    part = parts.read_rows(pathlib.Path(path))
    if not part.finished:  # a runner may repeat an element
      self.recorder.make(part)


def _pipeline(flags: Sequence[str]):
  try:
    import apache_beam
    from apache_beam.options import pipeline_options
  except ImportError as error:
    raise InputError(
      "--beam_pipeline_options needs Apache Beam: pip install -e '.[beam]'"
    ) from error
  options = pipeline_options.PipelineOptions(
    [f"--{flag.lstrip('-')}" for flag in flags]
  )
  try:
    return apache_beam.Pipeline(options=options)
  except ValueError as error:
    raise InputError(f"--beam_pipeline_options: {error}") from error


def _run(pipeline, paths: Sequence[str], step: _Step) -> None:
  import apache_beam

  with pipeline:
    elements = pipeline | "parts" >> apache_beam.Create(paths)
    # Spread them over the workers before anything is decoded.
    elements = elements | "spread" >> apache_beam.Reshuffle()
    elements | "make" >> apache_beam.Map(step)
