"""A study: rows of overrides x seeds, one resumable run each.

python -m avjax.sweep --study=configs/studies/avmae_demo.py --output=DIR

A study file defines `get_study() -> Study`. Every run is a process of its own
in `DIR/runs/<row>/<seed>`; a second call goes on where the first stopped.
Results: DIR/results.csv, DIR/results.md, DIR/results.png; and
DIR/results_curves.png where rows are points of curves.
"""

import csv
import dataclasses
import importlib.util
import json
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags

from avjax import commands, report
from avjax.errors import InputError

# A row's name and (mean, standard deviation, runs) per metric.
Summary = tuple[str, list[tuple[float, float, int]]]

# Appended by --smoke: shows that every row runs, and nothing else.
SMOKE = (
  "total_steps=2", "total_epochs=0.0", "data.demo.clips_per_class=2",
  "data.demo.test_per_class=1",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Row:
  """One line of a study.

  Attributes:
    name: of the row, used as a folder's name.
    config: config file with its argument, `configs/x.py:demo`.
    overrides: `key=value` of config keys.
    start: row, or `row/stage`, whose run with the same seed `init_from`
      names, or ''; or `audio:ROW,video:ROW`.
    stages: of a staged config.
    shown: whether the row appears in the results.
    curve: the curve that the row is a point of, or ''; several, which share
      the point, are separated by commas.
    x: its place on the horizontal axis; None = a curve of this one row, drawn
      across as a line to compare with.
    renamed: the study's name of a metric by the one that these runs give it.

  Raises:
    InputError: an x without a curve.
  """

  name: str
  config: str
  overrides: Sequence[str] = ()
  start: str = ""
  stages: Sequence[str] = ()
  shown: bool = True
  curve: str = ""
  x: float | int | None = None
  renamed: Mapping[str, str] = dataclasses.field(default_factory=dict)

  def __post_init__(self):
    if self.x is not None and not self.curve:
      raise InputError(f"row {self.name!r} has x={self.x:g}, but no curve")


@dataclasses.dataclass(frozen=True)
class Study:
  """Rows and what is compared.

  Attributes:
    title: of the table and the plot.
    rows: in order; a row's `start` comes before it.
    metrics: names of scores, `<eval>/<metric>`.
    chance: score of guessing, one for all metrics or one per metric; drawn
      as lines.
    headings: of the metrics in the table and the plot; () = their names.
    axis: label of the curves' horizontal axis.

  Raises:
    InputError: another number of chances or headings than of metrics, or two
      rows at one place of a curve.
  """

  title: str
  rows: Sequence[Row]
  metrics: Sequence[str]
  chance: float | Sequence[float] = 0.0
  headings: Sequence[str] = ()
  axis: str = ""

  def __post_init__(self):
    for key in ("chances", "columns"):
      if len(getattr(self, key)) != len(self.metrics):
        raise InputError(
          f"study {self.title!r}: {len(getattr(self, key))} {key} for "
          f"{len(self.metrics)} metrics"
        )
    for name, rows in self.curves.items():
      places = [row.x for row in rows]
      if len(set(places)) < len(places) or (None in places and len(places) > 1):
        raise InputError(
          f"study {self.title!r}: rows {', '.join(row.name for row in rows)} "
          f"of curve {name!r} have x={', '.join(map(str, places))}; each needs "
          "an x of its own"
        )

  @property
  def curves(self) -> dict[str, list[Row]]:
    """Rows that are shown by curve."""
    found: dict[str, list[Row]] = {}
    for row in self.rows:
      for name in row.curve.split(",") if row.curve and row.shown else ():
        found.setdefault(name.strip(), []).append(row)
    return found

  @property
  def chances(self) -> tuple[float, ...]:
    """The score of guessing by metric."""
    if isinstance(self.chance, Sequence):
      return tuple(self.chance)
    return (self.chance,) * len(self.metrics)

  @property
  def columns(self) -> tuple[str, ...]:
    """The heading of each metric."""
    return tuple(self.headings or self.metrics)


def read_study(path: str) -> Study:
  """Runs a study file's `get_study`.

  Raises:
    InputError: no such file, or it defines no study.
  """
  if not pathlib.Path(path).exists():
    raise InputError(f"study {path} does not exist")
  spec = importlib.util.spec_from_file_location("study", path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  if not hasattr(module, "get_study"):
    raise InputError(f"{path} does not define get_study()")
  study = module.get_study()
  names = [row.name for row in study.rows]
  for position, row in enumerate(study.rows):
    for start in starts(row).values():
      if start.split("/")[0] not in names[:position]:
        raise InputError(
          f"{path}: row {row.name!r} starts from {start!r}, which is not a "
          "row before it"
        )
  return study


def starts(row: Row) -> dict[str, str]:
  """Rows by modality ('' = both) that a row starts from."""
  if not row.start:
    return {}
  if ":" not in row.start:
    return {"": row.start}
  return dict(part.split(":") for part in row.start.split(","))


def command(
  row: Row, seed: int, output: pathlib.Path, more: Sequence[str] = ()
) -> list[str]:
  """The process that runs one row with one seed.

  Args:
    row: of the study.
    seed: of the run.
    output: of the study.
    more: `key=value` for every stage.
  """
  folder = output / "runs"
  overrides = [f"seed={seed}", *row.overrides]
  sources = []
  for modality, name in starts(row).items():
    name, _, stage = name.partition("/")
    path = str(folder / name / str(seed) / stage)
    sources.append(f"{modality}:{path}" if modality else path)
  if sources:
    overrides.append(f"init_from={','.join(sources)}")
  places = [f"{stage}." for stage in row.stages] or [""]
  overrides += [f"{place}{item}" for place in places for item in more]
  return [
    sys.executable, "-m", "avjax.main", f"--config={row.config}",
    *(f"--config.{item}" for item in overrides),
    f"--workdir={folder / row.name / str(seed)}",
  ]  # fmt: skip


def run(
  study: Study, seeds: Sequence[int], output: Any, more: Sequence[str] = ()
) -> Any:
  """Runs what is missing, then writes the results.

  Args:
    study: rows.
    seeds: of each row.
    output: folder.
    more: `key=value` for every run.

  Returns:
    List of dicts: row, seed, seconds and the scores.

  Raises:
    InputError: a run failed; names its log.
  """
  output = pathlib.Path(output)
  jobs = [(seed, row) for seed in seeds for row in study.rows]
  began, records = time.time(), []
  for number, (seed, row) in enumerate(jobs):
    records.append(run_row(row, seed, output, more))
    scores = {m: records[-1][m] for m in study.metrics if m in records[-1]}
    left = (time.time() - began) / (number + 1) * (len(jobs) - number - 1)
    print(
      f"[{number + 1}/{len(jobs)}] {row.name} seed {seed}: "
      f"{report.in_words(scores)}; {report.duration(left)} left",
      flush=True,
    )
    write(study, records, output)
  return records


def run_row(
  row: Row, seed: int, output: pathlib.Path, more: Sequence[str] = ()
) -> dict[str, Any]:
  """One run; a finished one is only read."""
  folder = output / "runs" / row.name / str(seed)
  folder.mkdir(parents=True, exist_ok=True)
  done, took = folder / "done.json", folder / "seconds.json"
  if not done.exists():
    began = time.time()
    log = folder / "log.txt"
    with log.open("a") as file:
      code = subprocess.run(
        command(row, seed, output, more), stdout=file, stderr=file, check=False
      ).returncode
    if code:
      tail = "\n".join(log.read_text().splitlines()[-5:])
      raise InputError(f"{row.name} seed {seed} failed, see {log}:\n{tail}")
    before = json.loads(took.read_text()) if took.exists() else 0.0
    took.write_text(json.dumps(before + time.time() - began))
  scores = json.loads(done.read_text())["scores"]
  seconds = json.loads(took.read_text()) if took.exists() else 0.0
  scores = {row.renamed.get(name, name): x for name, x in scores.items()}
  return {"row": row.name, "seed": seed, "seconds": seconds, **scores}


def summary(study: Study, records: Sequence[dict[str, Any]]) -> list[Summary]:
  """(row, [(mean, standard deviation, runs) per metric]) of shown rows.

  A metric that no run of a row has is (not a number, 0, 0).
  """
  result = []
  for row in study.rows:
    runs = [r for r in records if r["row"] == row.name]
    if not row.shown or not runs:
      continue
    cells = []
    for metric in study.metrics:
      values = [r[metric] for r in runs if metric in r]
      if values:
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        cells.append((statistics.mean(values), spread, len(values)))
      else:
        cells.append((float("nan"), 0.0, 0))
    result.append((row.name, cells))
  return result


def write(study: Study, records: Sequence[dict[str, Any]], output: Any) -> None:
  """results.csv, results.md, results.png and results_curves.png."""
  from avjax import plots

  first = ["row", "seed"]
  if study.curves:
    # None is an empty cell.
    place = {r.name: {"curve": r.curve, "x": r.x} for r in study.rows}
    records = [{**record, **place[record["row"]]} for record in records]
    first += ["curve", "x"]
  keys = sorted({key for record in records for key in record} - set(first))
  with (output / "results.csv").open("w", newline="") as file:
    writer = csv.DictWriter(file, [*first, *keys])
    writer.writeheader()
    writer.writerows(records)
  rows = summary(study, records)
  if not rows:
    return
  (output / "results.md").write_text(table(study, rows))
  plots.save(
    output / "results.png",
    plots.bar_plot(
      [name for name, _ in rows],
      {m: [c[i][:2] for _, c in rows] for i, m in enumerate(study.columns)},
      title=study.title,
      line=study.chance,
    ),
  )
  if panels := curves(study, rows):
    picture = plots.curve_panels(
      panels, title=study.title, x_label=study.axis, lines=study.chances
    )
    plots.save(output / "results_curves.png", picture)


def curves(study: Study, rows: Sequence[Summary]) -> dict[str, dict[str, Any]]:
  """Heading -> curve -> `plots.Curve` of a `summary`; {} without curves."""
  from avjax import plots

  cells = dict(rows)
  panels: dict[str, dict[str, Any]] = {}
  for i, heading in enumerate(study.columns):
    panel = {}
    for name, members in study.curves.items():
      # Where no run has the metric there is no point.
      members = [r for r in members if r.name in cells and cells[r.name][i][2]]
      if members:
        mean, spread, _ = zip(*(cells[r.name][i] for r in members), strict=True)
        x = [r.x for r in members if r.x is not None]
        panel[name] = plots.Curve(x, mean, spread)
    panels[heading] = panel
  return panels if any(panels.values()) else {}


def table(study: Study, rows: Sequence[Summary]) -> str:
  """Markdown of a `summary`."""
  lines = [
    f"# {study.title}", "",
    f"| run | {' | '.join(study.columns)} | seeds |",
    "|---" * (len(study.metrics) + 2) + "|",
  ]  # fmt: skip
  for name, cells in rows:
    texts = [
      f"{mean:.3f} ± {spread:.3f}" if runs else "–"
      for mean, spread, runs in cells
    ]
    seeds = max(runs for _, _, runs in cells)
    lines.append(f"| {name} | {' | '.join(texts)} | {seeds} |")
  chances = " | ".join(f"{chance:.3f}" for chance in study.chances)
  lines += [f"| chance | {chances} | |", ""]
  return "\n".join(lines)


def main(argv: list[str]) -> None:
  """Prints one line a run and the table at the end."""
  del argv
  values = flags.FLAGS
  study = read_study(values.study)
  seeds = [int(seed) for seed in values.seeds]
  more = [*(SMOKE if values.smoke else ()), *values.overrides]
  run(study, seeds, values.output, more)
  print((pathlib.Path(values.output) / "results.md").read_text())


if __name__ == "__main__":
  flags.DEFINE_string("study", None, "A file that defines get_study().")
  flags.DEFINE_string("output", None, "Folder of the runs and the results.")
  flags.DEFINE_list("seeds", ["0", "1", "2"], "Seeds, comma separated.")
  flags.DEFINE_bool("smoke", False, "Two steps on few clips a run.")
  flags.DEFINE_list("overrides", [], "key=value of config keys, for all runs.")
  commands.run(main, required=("study", "output"))
