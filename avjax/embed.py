"""Embeddings of media files, or of a built data set, in one file.

python -m avjax.embed --model=PATH --media=DIR --output=FILE.npz [--predict]
python -m avjax.embed --model=PATH --dataset=NAME --split=SPLIT
    --output=FILE.parquet

PATH is a run, a checkpoint or a weights file; DIR a folder that is searched
with all folders in it, or one file. Clips are cut as in evaluation with one
view. The output holds, for every clip, sorted by id:

| entry (npz, parquet) | |
|---|---|
| `id` | path relative to DIR, or the data set's id |
| `audio`, `video`, … | the method's embeddings [b, d], see its `embed` |
| `has_audio`, `has_video` | what it has; what it lacks is not-a-number |
| `logits/label`, … | with --predict |
| `classes/label`, … | with --predict, npz: names of the classes |

Parquet keeps the classes and the shapes as JSON in the schema's metadata.

Work in progress lies in FILE.parts; a run that was stopped goes on from there
if started again. Files that cannot be read are skipped and listed in
FILE.report.json. The output appears at once, complete; all of it is held in
memory then.
"""

import collections
import contextlib
import dataclasses
import json
import os
import pathlib
import time
from collections.abc import Iterator, Mapping
from concurrent import futures
from typing import Any

import numpy as np
from absl import flags, logging

from avjax import commands, embed_parts, progress
from avjax.data import media, media_folder, pipeline
from avjax.errors import InputError, lookup
from avjax.methods.base import Method
from avjax.model import Model, load, padded

BATCH_SIZE = 32
# What a file that cannot be read may raise; InputError is a ValueError.
UNREADABLE = (ValueError, IndexError, OSError, RuntimeError, MemoryError)

Rows = Mapping[str, np.ndarray]


@dataclasses.dataclass
class Source:
  """Clips to embed.

  Attributes:
    signatures: id -> what changes when the clip does.
    failed: id -> reason, of clips that could not be read so far.
  """

  signatures: dict[str, str]
  failed: dict[str, str] = dataclasses.field(default_factory=dict)

  def batches(
    self, model: Model, wanted: list[str], size: int
  ) -> Iterator[tuple[list[str], Rows]]:
    """(ids, host batch of `size`) of the wanted clips; rows beyond the ids are
    padding."""
    raise TypeError(f"{type(self).__name__} does not define batches")


# ------------------------------------------------------------- media files


class Files(Source):
  """Media files under a folder, or one file; decoded in threads.

  Args:
    media: the folder or file.
    threads: that decode; 0 = one for each core.

  Raises:
    InputError: there are no media files.
  """

  def __init__(self, media: str | pathlib.Path, threads: int = 0):
    self.threads = threads or os.cpu_count() or 1
    self._paths = media_folder.listed(media)
    super().__init__({i: _signature(p) for i, p in self._paths.items()})

  def batches(
    self, model: Model, wanted: list[str], size: int
  ) -> Iterator[tuple[list[str], Rows]]:
    """See Source; unreadable files are noted and passed over."""
    ids: list[str] = []
    rows: list[Rows] = []
    decoded = self._decoded(model, wanted, 2 * size)
    with contextlib.closing(decoded):
      for name, row in progress.track(decoded, len(wanted), "embed"):
        if row is None:
          continue
        ids.append(name)
        rows.append(row)
        if len(ids) == size:
          yield ids, _joined(rows)
          ids, rows = [], []
    if ids:
      yield ids, padded(_joined(rows), size)

  def _decoded(
    self, model: Model, wanted: list[str], ahead: int
  ) -> Iterator[tuple[str, Rows | None]]:
    """Ids in order with batches of one, None where a file is unreadable."""
    waiting: collections.deque = collections.deque()
    data = model.config.data
    pool = futures.ThreadPoolExecutor(self.threads)
    try:
      for name in [*wanted, *[None] * ahead]:
        if name is not None:
          path = self._paths[name]
          future = pool.submit(pipeline.batch_of_files, [path], data)
          waiting.append((name, future))
        if waiting and (name is None or len(waiting) > ahead):
          yield self._result(*waiting.popleft())
    finally:
      pool.shutdown(cancel_futures=True)

  def _result(self, name: str, future: Any) -> tuple[str, Rows | None]:
    try:
      return name, future.result()
    except UNREADABLE as error:
      reason = str(error) or type(error).__name__
      if isinstance(error, media.Unreadable):
        reason = f"{error.reason}: {reason}"
      self.failed[name] = reason
      return name, None


def _signature(path: pathlib.Path) -> str:
  try:
    status = path.stat()
  except OSError:  # a link to nothing: reading it says so
    return ""
  return f"{status.st_size} {status.st_mtime_ns}"


def _joined(rows: list[Rows]) -> Rows:
  """One batch of batches of one."""
  names = [name for name in rows[0] if name != "id"]
  return {name: np.concatenate([row[name] for row in rows]) for name in names}


# ---------------------------------------------------------- built data sets


class Stored(Source):
  """A split of a built data set.

  Args:
    data: `config.data` with the data set's name, place and variant.
    split: of the data set.
  """

  def __init__(self, data: Any, split: str):
    self._data, self._split = data, split
    stored = pipeline.records.Split(data, split)
    built = stored.folder.stat().st_mtime_ns
    super().__init__({str(i): str(built) for i in stored.column("id")})

  def batches(
    self, model: Model, wanted: list[str], size: int
  ) -> Iterator[tuple[list[str], Rows]]:
    """See Source; all clips are read again, those not wanted left out."""
    skipped = pipeline.Skipped(max_share=1.0)
    batches = pipeline.eval_batches(
      self._data, split=self._split, batch_size=size, skipped=skipped
    )
    missing = set(wanted)
    total = len(self.signatures)
    for batch in progress.track(
      batches, total, "embed", lambda batch: int(batch["valid"].sum())
    ):
      kept = [
        row
        for row, name in enumerate(batch["id"])
        if batch["valid"][row] and name in missing
      ]
      if kept:
        ids = [batch["id"][row] for row in kept]
        rows = {k: v[kept] for k, v in batch.items() if k != "id"}
        yield ids, padded(rows, size)
    self.failed.update(dict.fromkeys(skipped.dump(), "cannot be read"))


# --------------------------------------------------------------------- work


def run(
  model: Model,
  source: Source,
  output: str | pathlib.Path,
  *,
  predict: bool = False,
  batch_size: int = BATCH_SIZE,
) -> dict[str, Any]:
  """Embeds all clips of a source into a file; goes on where it was stopped.

  Args:
    model: of `avjax.load`.
    source: `Files` or `Stored`.
    output: name ending in .npz or .parquet; replaced if it exists.
    predict: also write logits and class names.
    batch_size: clips computed at a time.

  Returns:
    The report, as it stands in <output>.report.json.

  Raises:
    InputError: the output cannot be written, its .parts hold another job, or
      not one clip can be read.
  """
  output = pathlib.Path(output).expanduser()
  write = lookup(embed_parts.WRITERS, output.suffix, "kind of output file")
  if predict and type(model.method).predict is Method.predict:
    raise InputError(f"the method {model.config.method} has no predictions")
  embed_parts.check(output)
  began = time.monotonic()
  with embed_parts.Parts(output, _job(model, predict)) as parts:
    before = parts.done(source.signatures)
    wanted = [name for name in source.signatures if name not in before]
    for ids, batch in (
      source.batches(model, wanted, batch_size) if wanted else ()
    ):
      rows = _compute(model, batch, len(ids), predict)
      parts.add(ids, [source.signatures[name] for name in ids], rows)
    parts.flush()
    values = parts.collect(source.signatures)
    if not values:
      parts.remove()
      name, reason = next(iter(source.failed.items()), ("", "no clips"))
      raise InputError(
        f"none of {len(source.signatures)} clips could be embedded; the first: "
        f"{name}: {reason}"
      )
    write(output, values, model.class_names if predict else {})
    report = _report(model, source, values, len(before))
    report["seconds"] = round(time.monotonic() - began, 1)
    embed_parts.write_report(output, report)
    parts.remove()
  return report


def _job(model: Model, predict: bool) -> dict[str, Any]:
  """What must not differ between a run and the one that continues it."""
  return {
    "parameters": embed_parts.fingerprint(model.params),
    "predict": predict,
    **{
      key: json.loads(json.dumps(model.config.data[key].to_dict()))
      for key in ("video", "audio", "fbank", "files")
    },
    **{key: model.config.data[key] for key in ("variant", "modality")},
  }


def _compute(
  model: Model, batch: Rows, count: int, predict: bool
) -> dict[str, np.ndarray]:
  """Embeddings, what the clips have, and logits of the first `count` rows."""
  values = dict(model.embed(batch))
  for m in ("audio", "video"):
    has = np.asarray(batch[f"has_{m}"])
    if m in values:
      rows = np.asarray(values[m], np.float32)
      values[m] = np.where(has[:, None], rows, np.float32(np.nan))
    values[f"has_{m}"] = has
  if predict:
    known = model.method.modes
    logits = model.predict(batch, "av" if "av" in known else known[0])
    values |= {f"logits/{head}": rows for head, rows in logits.items()}
  return {
    name: np.asarray(rows)[:count]
    if name.startswith("has_")
    else np.asarray(rows, np.float32)[:count]
    for name, rows in values.items()
  }


def _report(
  model: Model, source: Source, values: Rows, before: int
) -> dict[str, Any]:
  return {
    "clips": len(source.signatures),
    "embedded": len(values["id"]),
    "of_these_before": before,
    "skipped": len(source.failed),
    "skipped_clips": source.failed,
    "method": model.config.method,
    "step": model.step,
    "shapes": {
      name: list(rows.shape[1:])
      for name, rows in values.items()
      if rows.dtype == np.float32
    },
  }


# ------------------------------------------------------------------ command


def make_source(model: Model, values: Any) -> Source:
  """What the flags name."""
  if (values.media is None) == (values.dataset is None):
    raise InputError("give --media, or --dataset and --split")
  if values.media is not None:
    return Files(values.media, values.threads)
  if not values.split:
    raise InputError(f"--dataset={values.dataset} needs --split")
  data = model.config.data.copy_and_resolve_references().unlock()
  data.update(name=values.dataset, heads=(), limit=0)
  if values.data_dir:
    data.dir = values.data_dir
  return Stored(data, values.split)


def main(argv: list[str]) -> None:
  """Prints what became of the clips."""
  del argv
  logging.set_verbosity(logging.WARNING)
  values = flags.FLAGS
  model = load(values.model)
  report = run(
    model,
    make_source(model, values),
    values.output,
    predict=values.predict,
    batch_size=values.batch_size,
  )
  shapes = ", ".join(f"{k} {v}" for k, v in report["shapes"].items())
  print(
    f"{values.output}: {report['embedded']} of {report['clips']} clips "
    f"({shapes}), {report['skipped']} skipped"
  )


if __name__ == "__main__":
  flags.DEFINE_string("model", None, "A run, a checkpoint or a weights file.")
  flags.DEFINE_string("media", None, "A folder of media files, or one file.")
  flags.DEFINE_string("dataset", None, "A built data set, instead of --media.")
  flags.DEFINE_string("split", None, "Of the data set.")
  flags.DEFINE_string("data_dir", "", "Where it is built; see README.md.")
  flags.DEFINE_string("output", None, "A file *.npz or *.parquet.")
  flags.DEFINE_bool("predict", False, "Write logits and class names, too.")
  flags.DEFINE_integer("batch_size", BATCH_SIZE, "Clips at a time.", 1)
  flags.DEFINE_integer("threads", 0, "That decode; 0 = one per core.", 0)
  commands.run(main, required=("model", "output"))
