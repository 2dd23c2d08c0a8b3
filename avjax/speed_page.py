"""The page of speed: every paper's steps, the pipeline, and both together.

python -m avjax.benchmark --page --pin --json=speed.json
python -m avjax.benchmark --page cavmae_audioset pipeline --pin
python -m avjax.benchmark --config=configs/cavmae_audioset.py --batch_size=8 \
  --options --pin --json=speed.json
python -m avjax.benchmark --from_json=speed.json

Steps are of paper size (AV-MAE and its fine-tuning as Base) and whole:
preparation of the clips (log-mel too), forward, backward and optimiser, on a
batch of noise that lies on the device. On a CPU their batches are small, such
that a step takes some ten CPU seconds; elsewhere they are the published ones,
halved until they fit. Every row is measured in a process of its own, in which
the step and the products that measure the peak take turns.

The pipeline reads synthetic clips (data_prep.synthetic), in CPU seconds of all
its threads on any machine.

The file of --json is the record: a row is written as soon as it is measured,
with the device, the batch, the precision, the versions and the command. A row
that is there already, of the same config on the same device, is not measured
again, so that a page that was stopped goes on. The tables are made from it.
"""

import contextlib
import dataclasses
import datetime
import hashlib
import importlib.metadata
import json
import multiprocessing
import os
import pathlib
import shlex
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from multiprocessing import connection
from typing import Any

from avjax import (
  allocator,
  bench_configs,
  benchmark,
  commands,
  errors,
  speed_rows,
  speed_tables,
)
from avjax import config as config_lib
from avjax.errors import InputError
from avjax.speed_rows import Task
from avjax.workdir import write_text

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Line:
  """What a row of the page measures.

  Attributes:
    title: in the table.
    kind: of speed_rows.MEASURES; all of a kind can be named by it.
    config: configs/<config>.py.
    batch_size: on a CPU.
    argument: of the config.
  """

  title: str
  kind: str
  config: str
  batch_size: int
  argument: str = ""


def _steps(config: str, title: str, *args: Any, **kwargs: Any) -> Line:
  return Line(title, "steps", config, *args, **kwargs)


# By the name of a row.
PAGE = {
  "avmae_vgg": _steps(
    "avmae_vgg", "AV-MAE-B pretraining, VGGSound", 2, "size=B"
  ),
  "avmae_audioset": _steps(
    "avmae_audioset", "AV-MAE-B pretraining, AudioSet", 2, "size=B"
  ),
  # Mixup needs two clips.
  "avmae_vgg_finetune": _steps(
    "avmae_vgg_finetune", "MBT-B fine-tuning", 2, "size=B"
  ),
  "cavmae_audioset": _steps("cavmae_audioset", "CAV-MAE pretraining", 2),
  "cavmae_vgg_finetune": _steps(
    "cavmae_vgg_finetune", "CAV-MAE fine-tuning", 2
  ),
  "deteclap_vgg": _steps("deteclap_vgg", "DETECLAP pretraining", 2),
  # Every ratio is in a batch.
  "avsiam_audioset": _steps(
    "avsiam_audioset", "AVSiam-B pretraining", 6
  ),
  # Each step draws what it reads; the dearest, of both, is measured.
  "avsiam_vgg_finetune": _steps(
    "avsiam_vgg_finetune", "AVSiam-B fine-tuning, a step of both", 2
  ),
  "coavt_audioset": _steps("coavt_audioset", "CoAVT pretraining", 2),
  "coavt_vgg_finetune": _steps(
    "coavt_vgg_finetune", "CoAVT fine-tuning, classes", 2
  ),
  "coavt_audiocaps_finetune": _steps(
    "coavt_audiocaps_finetune", "CoAVT fine-tuning, retrieval", 2
  ),
  "uavm_vgg": _steps("uavm_vgg", "UAVM training on features", 32),
  "uavm_extractor_vgg": _steps(
    "uavm_extractor_vgg", "UAVM's ConvNeXt-B, sound", 2
  ),
  "one_frame": Line("one picture, sound", "pipeline", "cavmae_audioset", 16),
  "host_mel": Line(
    "one picture, sound, log-mel on the host", "pipeline", "cavmae_audioset", 16
  ),
  "captions": Line(
    "one picture, sound, caption", "pipeline", "coavt_audioset", 16
  ),
  "ten_views": Line(
    "evaluation, 10 views", "pipeline", "cavmae_vgg_finetune", 16
  ),
  "sixteen_frames": Line(
    "16 pictures, sound", "pipeline", "avmae_vgg", 16, "size=B"
  ),
  "sound": Line("sound alone", "pipeline", "uavm_extractor_vgg", 16),
  "features": Line("stored features", "pipeline", "uavm_vgg", 16),
  "mel_host": Line("log-mel on the host", "mel", "cavmae_audioset", 16),
  "mel_device": Line("log-mel on the device", "mel", "cavmae_audioset", 16),
  "fed_one_frame": Line(
    "CAV-MAE pretraining, one picture", "together", "cavmae_audioset", 2
  ),
  "fed_sixteen_frames": Line(
    "AV-MAE-B pretraining, 16 pictures", "together", "avmae_vgg", 2, "size=B"
  ),
}  # fmt: skip
KINDS = tuple(dict.fromkeys(line.kind for line in PAGE.values()))

# Of --options: what all rows start from, and what each changes. The first is
# what the others are compared with.
PLAIN = {
  "model.remat": "none",
  "model.scan": False,
  "optimizer.accumulate": 1,
  "dtype": "float32",
}
OPTIONS: dict[str, dict[str, Any]] = {
  "plain": {},
  "remat_dots": {"model.remat": "dots"},
  "remat_dots_no_batch": {"model.remat": "dots_no_batch"},
  "remat_full": {"model.remat": "full"},
  "scan": {"model.scan": True},
  "scan_remat_full": {"model.scan": True, "model.remat": "full"},
  "accumulate_2": {"optimizer.accumulate": 2},
  "accumulate_4": {"optimizer.accumulate": 4},
  "bfloat16": {"dtype": "bfloat16"},
}


def command(values: Any, words: Sequence[str]) -> None:
  """What avjax.benchmark does with --page, --options or --from_json.

  Raises:
    InputError: an unknown name, a file that is no record, or at the end, rows
      could not be measured.
  """
  if values.from_json:
    print(speed_tables.tables(read(pathlib.Path(values.from_json))))
    return
  path = pathlib.Path(values.json) if values.json else None
  rows = read(path) if path and path.exists() else []
  if not values.options:
    names_of(words)  # a wrong one is refused before a process starts
  place = apart(speed_rows.place) | {"pinned": values.pin}
  benchmark.refuse_pin(values.pin, place["backend"])
  if values.options:
    tasks = option_tasks(values, words)
  else:
    tasks = page_tasks(values, words, place["backend"])
  failed = measure_all(tasks, rows, path, place)
  print(speed_tables.tables(rows))
  if failed:
    raise InputError(f"not measured: {'; '.join(failed)}")


# ------------------------------------------------------------ what to measure


def names_of(words: Sequence[str]) -> set[str]:
  """Rows of the page that words name, which are rows or kinds; none: all.

  Raises:
    InputError: no such row or kind.
  """
  known = {name: (name,) for name in PAGE}
  for kind in KINDS:
    known[kind] = tuple(n for n, line in PAGE.items() if line.kind == kind)
  return {
    name
    for word in words or KINDS
    for name in errors.lookup(known, word, "row of the page")
  }


def page_tasks(
  values: Any, words: Sequence[str], device: str = "cpu"
) -> list[tuple[Task, Row]]:
  """Tasks of the page's rows that `words` names, see `names_of`.

  Args:
    values: the command's flags.
    words: as of `names_of`.
    device: kind of it; --dtype's default is its own.

  Returns:
    Each with what its row says of it.
  """
  named = names_of(words)
  dtype = values.dtype or benchmark.default_dtype(device)
  return [
    (
      Task(
        kind=line.kind,
        name=name,
        config=config_lib.plain(
          bench_configs.load(
            line.config, line.argument, dtype=dtype, demo=values.demo
          )
        ),
        batch_size=values.batch_size or line.batch_size,
        repeats=values.repeats or 0,
        fixed=bool(values.batch_size),
      ),
      {"title": line.title, "of": _file_of(line, values.demo)},
    )
    for name, line in PAGE.items()
    if name in named
  ]


def _file_of(line: Line, demo: bool) -> str:
  argument = bench_configs.argument(line.argument, demo=demo)
  return f"configs/{line.config}.py" + (f":{argument}" if argument else "")


def option_tasks(values: Any, words: Sequence[str]) -> list[tuple[Task, Row]]:
  """Tasks of --options for a config: the first, and all or those named.

  Raises:
    InputError: no such option, or the config has not what it changes.
  """
  for word in words:
    errors.lookup(OPTIONS, word, "option")
  config = bench_configs.stage_of(
    commands.with_demo_data(values.config), values.stage
  )
  plain = config_lib.plain(config)
  has = {key for key in PLAIN if _has(plain, key)}
  for word in words:
    lacking = sorted(set(OPTIONS[word]) - has)
    if lacking:
      raise InputError(
        f"option {word!r}: a config of method {config.method!r} has no "
        f"{lacking[0]}"
      )
  plain = changed(plain, {k: v for k, v in PLAIN.items() if k in has})
  given = values["config"].config_filename
  of = f"{given} {values.stage}".strip()
  return [
    (
      Task(
        kind="options",
        name=name,
        config=changed(plain, change),
        batch_size=values.batch_size or config.batch_size,
        repeats=values.repeats or 0,
        fixed=True,
      ),
      {"title": name, "of": of},
    )
    for name, change in OPTIONS.items()
    if set(change) <= has and (not words or name in {"plain", *words})
  ]


def _has(plain: Mapping[str, Any], path: str) -> bool:
  for key in path.split("."):
    if key not in plain:
      return False
    plain = plain[key]
  return True


def changed(plain: Mapping[str, Any], changes: Mapping[str, Any]) -> Row:
  """A plain config with other values at paths such as model.remat."""
  result = json.loads(json.dumps(plain))
  for path, value in changes.items():
    place = result
    *above, last = path.split(".")
    for key in above:
      place = place[key]
    place[last] = value
  return result


# ----------------------------------------------------------------- the record


def read(path: pathlib.Path) -> list[Row]:
  """Rows of a file of --json.

  Raises:
    InputError: it cannot be read, or is no record of --page or --options.
  """
  try:
    found = json.loads(path.read_text())
  except (OSError, ValueError) as error:
    raise InputError(f"{path} cannot be read: {error}") from error
  rows = found.get("rows") if isinstance(found, dict) else None
  if not isinstance(rows, list) or not all("kind" in row for row in rows):
    raise InputError(f"{path} is no record of --page or --options")
  return rows


def write(path: pathlib.Path, rows: Sequence[Row]) -> None:
  """Replaces the file at once, so that a stop leaves a whole one."""
  path.parent.mkdir(parents=True, exist_ok=True)
  write_text(path, json.dumps({"rows": rows}, indent=1) + "\n")


# A row takes the place of an earlier one that agrees in these.
SAME = (
  "kind", "name", "of", "device", "devices", "pinned", "dtype", "asked", "host",
)  # fmt: skip
# Kinds in which the host works, too; its processor is told beside a device.
OF_HOST = ("pipeline", "mel", "together")
# It is not measured again where these agree too.
CURRENT = ("config", "repeats_asked", "jax", "avjax")


def facts(task: Task, place: Row, about: Row) -> Row:
  """What a row is of, whatever its numbers are."""
  text = json.dumps(task.config, sort_keys=True)
  try:
    version = importlib.metadata.version("avjax")
  except importlib.metadata.PackageNotFoundError:
    version = "not installed"
  return {
    "kind": task.kind,
    "name": task.name,
    **about,
    **{k: v for k, v in place.items() if k != "host" or task.kind in OF_HOST},
    "dtype": task.config["dtype"],
    "asked": task.batch(place["backend"]),
    "repeats_asked": task.repeats,
    "config": hashlib.sha256(text.encode()).hexdigest()[:16],
    "avjax": version,
  }


def agree(a: Row, b: Row, keys: Iterable[str]) -> bool:
  """Whether two rows have the same values there."""
  return all(a.get(key) == b.get(key) for key in keys)


def put(rows: list[Row], row: Row) -> None:
  """Adds a row, or puts it in the place of the one it stands for.

  One that failed takes the place of no numbers.
  """
  for number, old in enumerate(rows):
    if agree(old, row, SAME):
      if "failed" not in row or "failed" in old:
        rows[number] = row
      return
  rows.append(row)


# ------------------------------------------------------------------ measuring


def measure_all(
  tasks: Sequence[tuple[Task, Row]],
  rows: list[Row],
  path: pathlib.Path | None,
  place: Row,
) -> list[str]:
  """Measures what is not in the rows yet; adds it to them and to the file.

  Args:
    tasks: with what their rows say of them.
    rows: of the record so far.
    path: of the record; None = there is none.
    place: what is measured on, see speed_rows.place; `pinned` too.

  Returns:
    The names of the rows that failed now, with why.
  """
  wanted = [(task, facts(task, place, about)) for task, about in tasks]
  left = [
    (task, about)
    for task, about in wanted
    if not any(
      agree(row, about, SAME + CURRENT) and "failed" not in row for row in rows
    )
  ]
  if len(left) < len(wanted):
    _say(f"{len(wanted) - len(left)} of {len(wanted)} rows are there already")
  began, failed = time.monotonic(), []
  for number, (task, about) in enumerate(left, 1):
    row = about | {
      "date": datetime.date.today().isoformat(),
      "command": shlex.join(["python", "-m", "avjax.benchmark", *sys.argv[1:]]),
    }
    started = time.monotonic()
    try:
      row |= apart(speed_rows.measure, task)
    except InputError as error:
      row["failed"] = str(error)
      failed.append(f"{task.name}: {error}")
    now = time.monotonic()
    row["took_s"] = round(now - started, 1)
    put(rows, row)
    if path:
      write(path, rows)
    found = row.get("failed") or f"{row['clips_per_s']:.3g} clips/s"
    rest = (now - began) / number * (len(left) - number) / 60
    _say(
      f"[{number}/{len(left)}] {task.kind} {task.name}: {found} in "
      f"{row['took_s']:.0f} s; about {rest:.0f} min left"
    )
  return failed


def _say(words: str) -> None:
  print(words, file=sys.stderr, flush=True)


def apart(function: Callable[..., Any], *args: Any) -> Any:
  """`function(*args)` in a new process, whose memory is given back.

  Raises:
    InputError: it raised something, or the process was ended.
  """
  context = multiprocessing.get_context("spawn")
  ours, theirs = context.Pipe(duplex=False)
  child = context.Process(target=_tell, args=(theirs, function, args))
  child.start()
  theirs.close()
  try:
    error, found = ours.recv()
  except EOFError:
    child.join()
    raise InputError(
      f"the process ended with status {child.exitcode}; -9 is mostly for lack "
      "of memory"
    ) from None
  finally:
    ours.close()
  child.join()
  if error:
    raise InputError(error)
  return found


def _tell(pipe: Any, function: Callable[..., Any], args: Any) -> None:
  threading.Thread(target=_end_with_parent, daemon=True).start()
  allocator.keep()  # as where training runs
  try:
    pipe.send(("", function(*args)))
  except InputError as error:
    pipe.send((str(error), None))
  except Exception as error:  # whatever it is, the page goes on
    words = (str(error).splitlines() or [""])[0]
    with contextlib.suppress(BrokenPipeError):  # nobody waits any more
      pipe.send((f"{type(error).__name__}: {words}", None))


def _end_with_parent() -> None:
  """Ends this process when the one that waits for it is killed."""
  connection.wait([multiprocessing.parent_process().sentinel])
  os._exit(1)
