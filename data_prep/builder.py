"""The TFDS builder that every data set shares; TensorFlow is never imported.

A data set is a subclass that names its classes and lists its annotation rows;
see `data_prep/av_demo.py`. The result is read by
`tfds.builder_from_directory(...)` without this code: `info.metadata` holds the
class names and the settings, and beside `dataset_info.json` lie `report.json`
(what became of every row) and `index_<split>.npz` (ids and labels).

A build that was stopped goes on where it was; the same command on a data set
that is built adds the rows whose files have come since.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import io
import json
import os
import pathlib
import shutil
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import tensorflow_datasets as tfds

from avjax import workdir
from avjax.config import differences
from avjax.data.datasets import VARIANTS
from avjax.errors import InputError, lookup
from data_prep import decode, parts, progress, recorder, stored
from data_prep.recorder import Options
from data_prep.stored import Row

OUTCOMES = parts.OUTCOMES


class ClipBuilder(
  tfds.core.dataset_builder.FileReaderBuilder, skip_registration=True
):
  """Base of all data sets.

  A subclass sets `name` and `VERSION` and defines `rows`, and `classes` if it
  has labels.
  """

  BUILDER_CONFIGS = [
    tfds.core.BuilderConfig(name=name, description=text)
    for name, text in VARIANTS.items()
  ]
  # Nothing is downloaded; TFDS would look for checksums beside the code.
  url_infos: dict[str, Any] = {}

  def __init__(self, *, options: Options, **kwargs: Any):
    self.options = options
    self.parts: list[parts.Part] = []
    self.late: dict[str, list[Row]] = {}
    self.former: parts.Former | None = None
    self.tallies: dict[str, parts.Tally] = {}
    super().__init__(file_format="array_record", **kwargs)
    self.recorder = recorder.Recorder(
      options, self.builder_config.name, self.classes()
    )

  def classes(self) -> dict[str, Sequence[str]]:
    """Class names of the heads `label`, `verb`, `noun` and `segment`.

    Of `segment`, the last one is the background. None, if not overridden.
    """
    return {}

  def rows(self) -> dict[str, Iterable[Row]]:
    """Annotation rows by split."""
    raise TypeError(f"{type(self).__name__} does not define rows")

  def _info(self) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(
      builder=self,
      description=self.__doc__,
      disable_shuffling=True,  # the order of the annotations
      metadata=tfds.core.MetadataDict(
        classes={k: list(v) for k, v in self.classes().items()},
        audio_rate=self.options.audio_rate,
        short_side=self.options.short_side,
        settings=dict(self.options.settings),
      ),
      features=tfds.features.FeaturesDict(stored.features()),
    )

  # --- Rows ---

  def checked_rows(self) -> dict[str, list[Row]]:
    """Rows by split, each id once in it; counts the duplicates.

    Splits may share clips, such as the test sets of MSR-VTT.

    Raises:
      InputError: a class name is unknown, or a file lies outside the media.
    """
    result: dict[str, list[Row]] = {}
    for split, rows in self.rows().items():
      seen: set[str] = set()
      result[split], self.tallies[split] = [], parts.Tally()
      for row in rows:
        if row.id in seen:
          self.tallies[split].lists["duplicate"].append(row.id)
          continue
        seen.add(row.id)
        self.recorder.labels(row)
        self.recorder.task(row)
        result[split].append(row)
    return result

  def open_rows(self, rows: dict[str, list[Row]]) -> dict[str, list[Row]]:
    """Without those that `former` holds or could not use.

    A row whose file was missing is open again when the file is there.

    Raises:
      InputError: rows that it was built from are gone, or say something else.
    """
    if self.former is None:
      return rows
    result = {}
    for split, some in rows.items():
      tally = self.former.tallies.get(split, parts.Tally())
      self._compare(split, some, tally)
      missing = {parts.identity(e) for e in tally.lists["missing file"]}
      settled = tally.settled()
      result[split] = [
        row
        for row in some
        if row.id not in settled
        or (row.id in missing and os.path.exists(self.recorder.task(row).path))
      ]
      tally.forget_missing(row.id for row in result[split])
      # Duplicates are counted anew.
      tally.lists["duplicate"] = []
    return result

  def _compare(
    self, split: str, rows: Sequence[Row], tally: parts.Tally
  ) -> None:
    """A split that is to grow may have more rows, not others."""
    now = {row.id: stored.digest(row) for row in rows}
    gone = sorted(tally.settled() - set(now))
    changed = sorted(
      entry[0]
      for entry in tally.index
      if entry[-1] not in (None, now.get(entry[0]))
    )
    for ids, words in (
      (gone, "are not in the annotations any more"),
      (changed, "have other labels or captions now"),
    ):
      if ids:
        some = ", ".join(map(repr, ids[: parts.LISTED]))
        raise InputError(
          f"{len(ids)} clips of the built split {split!r} {words}: {some}; "
          "pass --overwrite to build it again"
        )
    tally.index = [(*entry[:-1], now[entry[0]]) for entry in tally.index]

  def late_rows(self) -> dict[str, list[Row]]:
    """Rows that a stopped build missed the files of, which are there now."""
    result: dict[str, list[Row]] = {}
    for part in self.parts:
      missing = part.tally().lists["missing file"] if part.finished else ()
      ids = set(map(parts.identity, missing))
      for row in part.rows:
        if row.id in ids and os.path.exists(self.recorder.task(row).path):
          result.setdefault(part.split, []).append(row)
    return result

  # --- Parts and shards ---

  def _download_and_prepare(self, dl_manager: Any, download_config: Any):
    """Makes the parts that are not there, then names all as shards."""
    del dl_manager, download_config
    self._make_parts()
    shards: dict[str, list[tuple[pathlib.Path, int]]] = {}
    if self.former is not None:
      shards = {k: list(v) for k, v in self.former.shards.items()}
      for split, tally in self.former.tallies.items():
        self.tallies.setdefault(split, parts.Tally()).add(tally)
    for part in self.parts:
      tally = part.tally()
      if not part.second:
        tally.forget_missing(row.id for row in self.late.get(part.split, ()))
      self.tallies[part.split].add(tally)
      if tally.index:
        shards.setdefault(part.split, []).append(
          (part.records, len(tally.index))
        )
    infos = [
      self._name(split, files) for split, files in shards.items() if files
    ]
    if not infos:
      for part in self.parts:
        part.note.unlink(missing_ok=True)
      found = f"{self.words()}{self.example()}"
      found = (
        found or f"no row of a table, and no media, in {self.options.media}"
      )
      raise InputError(f"no clip of {self.name} could be built: {found}")
    self.info.set_splits(tfds.core.splits.SplitDict(infos))

  def _make_parts(self) -> None:
    todo = [part for part in self.parts if not part.finished]
    rows = [row for part in todo for row in part.rows]
    if len(todo) < len(self.parts):
      done = sum(len(part.rows) for part in self.parts) - len(rows)
      print(f"{self.name}: {done} rows are done already", file=sys.stderr)
    if not rows:
      return
    if self.options.beam is None:
      self._make_here(todo, rows)
    else:
      from data_prep import beam

      made = beam.make(self.recorder, todo, self.options.beam)
      for _ in progress.track(made, len(rows), self.name):
        pass
    tallies = [part.tally() for part in todo]
    clips = sum(len(tally.index) for tally in tallies)
    work = sum(tally.work for tally in tallies)
    print(
      f"{self.name}: {clips} clips in {work:.0f} s of one core, "
      f"{clips / max(work, 1e-3):.1f} clips/s/core",
      file=sys.stderr,
    )

  def _make_here(self, todo: Sequence[parts.Part], rows: Sequence[Row]) -> None:
    results = self._results([self.recorder.task(row) for row in rows])
    with contextlib.closing(results):
      shown = progress.track(results, len(rows), self.name)
      for part in todo:
        some = parts.taken(shown, len(part.rows))
        made = map(self.recorder.record, part.rows, some)
        part.write(made, max(self._workers(len(rows)), 1))

  def _results(self, tasks: Sequence[decode.Task]) -> Iterator[decode.Encoded]:
    yield from decode.encode_all(tasks, workers=self._workers(len(tasks)))

  def _workers(self, count: int) -> int:
    """Processes that pay: starting one costs as much as some clips.

    One at least, so that a file that crashes its decoder costs one clip.
    """
    workers = self.options.workers
    if not workers:
      return 0
    return max(min(_cores() if workers < 0 else workers, count // 32), 1)

  def _name(self, split: str, files: Sequence[Any]) -> tfds.core.SplitInfo:
    """Puts the files into their places."""
    template = self._get_filename_template(split)
    for number, (source, _) in enumerate(files):
      path = template.sharded_filepath(
        shard_index=number, num_shards=len(files)
      )
      parts.link(source, pathlib.Path(path))
    return tfds.core.SplitInfo(
      name=split,
      shard_lengths=[count for _, count in files],
      num_bytes=sum(source.stat().st_size for source, _ in files),
      filename_template=template,
    )

  def words(self) -> str:
    """Counts of the outcomes of all splits, as one line."""
    total = Counter()
    for tally in self.tallies.values():
      total.update(tally.counts())
    return ", ".join(f"{n} {name}" for name, n in total.items() if n)

  def example(self) -> str:
    """Why one of the rows could not be built, of the most frequent kind."""
    told = [
      [entry for entry in tally.lists[name] if not isinstance(entry, str)]
      for tally in self.tallies.values()
      for name in OUTCOMES[1:]
    ]
    most = max(told, key=len, default=[])
    return f"; {most[0][0]!r}: {most[0][1]}" if most else ""

  def settings(self) -> dict[str, Any]:
    """All that a record depends on but its row and its file."""
    options = _comparable(self.options)
    classes = json.dumps(self.classes()).encode()
    options["classes"] = hashlib.sha256(classes).hexdigest()[:16]
    return options

  def write_beside(self, folder: pathlib.Path) -> None:
    """report.json and the indices."""
    for split, tally in self.tallies.items():
      if tally.index:
        tally.write_index(folder / f"index_{split}.npz")
    report = {
      "dataset": self.name,
      "variant": self.builder_config.name,
      "version": str(self.version),
      "options": self.settings(),
      "splits": parts.report(self.tallies),
    }
    text = json.dumps(report, indent=1, ensure_ascii=False)
    # File names may hold bytes that are no text.
    (folder / "report.json").write_text(
      text + "\n", encoding="utf-8", errors="backslashreplace"
    )


def build(
  builder: type[ClipBuilder],
  options: Options,
  *,
  data_dir: pathlib.Path,
  variant: str = "video",
  overwrite: bool = False,
) -> pathlib.Path:
  """Builds a data set, or adds to it the rows whose files have come since.

  It appears under its name only when it is complete. What is done of it stays
  in a folder beside it when the build is stopped; the next one goes on there.

  Returns:
    `<data_dir>/<name>/<variant>/<version>`.

  Raises:
    InputError: it is there, made with other options, and `overwrite` is not
      set; the variant or a class name is unknown; a file lies outside the
      media folder; another process builds it; or no clip could be built.
  """
  lookup(VARIANTS, variant, "variant of a data set")
  data_dir = pathlib.Path(data_dir).expanduser()
  place = pathlib.Path(builder.name, variant, str(builder.VERSION))
  target = data_dir / place
  work = data_dir / f".building-{builder.name}-{variant}"
  with _working(work):
    _settle_former(work / "former", target)
    maker = builder(data_dir=work / "tfds", config=variant, options=options)
    if target.exists() and not overwrite:
      maker.former = _former(target, maker)
    rows = maker.open_rows(maker.checked_rows())
    if maker.former is not None and not any(rows.values()):
      print(f"{target} has all there is", file=sys.stderr)
      return target
    fingerprint = json.dumps(maker.settings()) + variant
    maker.parts = parts.plan(rows, work, fingerprint)
    maker.late = maker.late_rows()
    maker.parts += parts.plan(maker.late, work, fingerprint, second=True)
    tfds.disable_progress_bar()
    with contextlib.redirect_stdout(io.StringIO()):  # TFDS is talkative
      maker.download_and_prepare()
    made = work / "tfds" / place
    maker.write_beside(made)
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists():
      target.rename(work / "former")
    made.rename(target)
    shutil.rmtree(work)
  print(parts.table(maker.tallies), file=sys.stderr)
  print(f"{target}: {maker.words()}", file=sys.stderr)
  return target


def _settle_former(former: pathlib.Path, target: pathlib.Path) -> None:
  """Ends a replacement in whose middle a build was killed."""
  if target.exists():
    shutil.rmtree(former, ignore_errors=True)
  elif former.exists():
    former.rename(target)


@contextlib.contextmanager
def _working(work: pathlib.Path) -> Iterator[None]:
  """The folder of one build at a time; finished parts stay in it."""
  workdir.make_folder(work)
  with (work / ".lock").open("w") as lock:
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      raise InputError(f"another process builds in {work}") from None
    try:
      shutil.rmtree(work / "tfds", ignore_errors=True)
      yield
    finally:
      if not any(work.glob("*.json")):
        shutil.rmtree(work, ignore_errors=True)


def _former(target: pathlib.Path, maker: ClipBuilder) -> parts.Former:
  """The data set that is there, if this build would make the same."""
  info = tfds.builder_from_directory(target).info
  former = parts.read(target, info.splits)
  # Options that an earlier version had not, had these values.
  options = {**_comparable(Options(maker.options.media)), **former.options}
  rows = differences(options, maker.settings())
  if any(row.startswith("classes:") for row in rows):
    old = info.metadata["classes"]
    rows = [row for row in rows if not row.startswith("classes:")]
    rows += _class_changes(old, maker.classes())
  if rows:
    raise InputError(
      f"{target} exists, built with other options (there -> asked): "
      f"{'; '.join(rows)}; pass --overwrite to build it again"
    )
  return former


def _comparable(options: Options) -> dict[str, Any]:
  """What a record depends on, as JSON types."""
  values = dataclasses.asdict(options)
  for name in ("media", "annotations", "workers", "beam"):
    del values[name]
  return json.loads(json.dumps(values))


def _class_changes(
  old: dict[str, Sequence[str]], new: dict[str, Sequence[str]]
) -> list[str]:
  """What differs, for a person to read."""
  rows = []
  for head in sorted({*old, *new}):
    before, after = list(old.get(head, ())), list(new.get(head, ()))
    gone = sorted(set(before) - set(after))
    come = sorted(set(after) - set(before))
    if before == after:
      continue
    words = [f"{len(before)} classes of {head} -> {len(after)}"]
    words += [f"new: {', '.join(map(repr, come[:5]))}"] if come else []
    words += [f"gone: {', '.join(map(repr, gone[:5]))}"] if gone else []
    rows.append("; ".join(words if come or gone else [*words, "reordered"]))
  return rows


def _cores() -> int:
  if hasattr(os, "sched_getaffinity"):
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1
