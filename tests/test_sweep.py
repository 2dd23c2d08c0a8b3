"""Studies: what is run, what is kept, what is written."""

import csv
import dataclasses
import importlib
import json
import pathlib

import matplotlib.image as plt
import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from avjax import plots, sweep
from avjax.errors import InputError
from avjax.sweep import Row, Study

STUDIES = pathlib.Path(__file__).parent.parent / "configs" / "studies"
STUDY = Study(
  title="a study",
  rows=(
    Row("first", "configs/a.py:demo", stages=("pretrain", "finetune")),
    Row("second", "configs/b.py", ("batch_size=4",), start="first/pretrain"),
    Row("third", "configs/b.py", start="audio:first,video:second"),
  ),
  metrics=("test/top1",),
  chance=0.25,
)


def finish(output, row, seed, score):
  folder = output / "runs" / row / str(seed)
  folder.mkdir(parents=True)
  (folder / "done.json").write_text(
    json.dumps({"scores": {"test/top1": score}})
  )


def test_command_of_a_row(tmp_path):
  found = sweep.command(STUDY.rows[1], 7, tmp_path)
  assert found[3:] == [
    "--config=configs/b.py",
    "--config.seed=7",
    "--config.batch_size=4",
    f"--config.init_from={tmp_path}/runs/first/7/pretrain",
    f"--workdir={tmp_path}/runs/second/7",
  ]
  found = sweep.command(STUDY.rows[2], 0, tmp_path)
  assert (
    f"--config.init_from=audio:{tmp_path}/runs/first/0,"
    f"video:{tmp_path}/runs/second/0"
  ) in found
  found = sweep.command(STUDY.rows[0], 0, tmp_path, sweep.SMOKE)
  assert "--config.pretrain.total_steps=2" in found
  assert "--config.finetune.total_steps=2" in found


def test_finished_runs_are_read_and_summed_up(tmp_path, monkeypatch):
  """The first row of seed 1 is the only one that is not there yet."""
  for seed in (0, 1):
    for row, score in (("first", 0.5), ("second", 0.25), ("third", 0.75)):
      if (row, seed) != ("first", 1):
        finish(tmp_path, row, seed, score)
  started = []

  def start(call, **options):
    started.append(call[-1])
    finish(tmp_path / "elsewhere", "first", 1, 0.7)
    made = tmp_path / "elsewhere" / "runs" / "first" / "1" / "done.json"
    made.rename(tmp_path / "runs" / "first" / "1" / "done.json")
    return type("Done", (), {"returncode": 0})

  monkeypatch.setattr(sweep.subprocess, "run", start)
  sweep.run(STUDY, [0, 1], tmp_path)
  assert started == [f"--workdir={tmp_path}/runs/first/1"]
  table = (tmp_path / "results.md").read_text()
  assert "| first | 0.600 ± 0.141 | 2 |" in table
  assert "| second | 0.250 ± 0.000 | 2 |" in table
  assert "| chance | 0.250 | |" in table
  with (tmp_path / "results.csv").open() as file:
    rows = list(csv.DictReader(file))
  assert [(r["row"], r["seed"], r["test/top1"]) for r in rows[:2]] == [
    ("first", "0", "0.5"), ("second", "0", "0.25"),
  ]  # fmt: skip
  assert (tmp_path / "results.png").stat().st_size > 5_000


def test_chance_and_gaps_of_each_metric(tmp_path):
  """One chance per metric; what a row lacks is no number."""
  study = Study(
    title="two",
    rows=(Row("both", "c.py"), Row("one", "c.py")),
    metrics=("test/R1", "test/R10"),
    chance=(1 / 240, 10 / 240),
    headings=("R@1", "R@10"),
  )
  records = [
    {"row": "both", "seed": 0, "seconds": 1.0, "test/R1": 0.5, "test/R10": 1.0},
    {"row": "one", "seed": 0, "seconds": 1.0, "test/R10": 0.25},
  ]
  sweep.write(study, records, tmp_path)
  assert (tmp_path / "results.md").read_text().splitlines()[2:] == [
    "| run | R@1 | R@10 | seeds |",
    "|---|---|---|---|",
    "| both | 0.500 ± 0.000 | 1.000 ± 0.000 | 1 |",
    "| one | – | 0.250 ± 0.000 | 1 |",
    "| chance | 0.004 | 0.042 | |",
  ]
  image = plt.imread(tmp_path / "results.png")[..., :3]
  for colour in plots.COLOURS[:2]:
    near = np.abs(image - to_rgb(colour)).max(-1) < 0.15
    reach = [np.flatnonzero(row) for row in near if row.any()]
    # A line reaches from edge to edge; no bar does.
    assert max(np.ptp(x) for x in reach) > 0.85 * image.shape[1]


def test_a_row_may_call_a_metric_otherwise(tmp_path):
  finish(tmp_path, "first", 0, 0.5)
  row = dataclasses.replace(
    STUDY.rows[0], renamed={"test/top1": "test/av/top1"}
  )
  found = sweep.run_row(row, 0, tmp_path)
  assert found["test/av/top1"] == 0.5 and "test/top1" not in found


def test_as_many_chances_as_metrics():
  with pytest.raises(InputError, match="3 chances for 2 metrics"):
    Study("x", (), ("a", "b"), chance=(0.1, 0.2, 0.3))
  with pytest.raises(InputError, match="1 columns for 2 metrics"):
    Study("x", (), ("a", "b"), headings=("A",))


def curve_rows(*places, name="line"):
  return tuple(Row(f"{name}_{x}", "c.py", curve=name, x=x) for x in places)


def test_curves_of_a_study(tmp_path, monkeypatch):
  study = Study(
    title="by threshold",
    rows=(
      Row("apart", "c.py"),
      Row("plain", "c.py", curve="plain"),
      *curve_rows(0.9, 0.1),
      *curve_rows(0.9, name="other"),
      Row("both", "c.py", curve="line, other", x=0.5),
    ),
    metrics=("test/R1", "test/R10"),
    chance=(0.25, 0.01),
    axis="threshold",
  )
  scores = {"apart": 0.3, "plain": 0.2, "line_0.9": 0.6, "both": 0.7}
  records = [
    {"row": row, "seed": seed, "seconds": 1.0, "test/R1": score + seed / 10}
    for row, score in scores.items()
    for seed in (0, 1)
  ]
  # Of curve `other` one point, of row line_0.1 the other metric alone.
  records.append({"row": "line_0.1", "seed": 0, "test/R10": 0.5})
  kept = {}
  draw = plots.curve_panels
  monkeypatch.setattr(
    plots, "curve_panels", lambda *a, **k: draw(kept.update(*a) or a[0], **k)
  )
  sweep.write(study, records, tmp_path)
  assert {n: (c.x, c.y) for n, c in kept["test/R1"].items()} == {
    "plain": ([], (pytest.approx(0.25),)),
    "line": ([0.9, 0.5], (pytest.approx(0.65), pytest.approx(0.75))),
    "other": ([0.5], (pytest.approx(0.75),)),
  }
  assert kept["test/R1"]["plain"].spread == pytest.approx((0.1 / 2**0.5,))
  assert set(kept["test/R10"]) == {"line"}
  with (tmp_path / "results.csv").open() as file:
    lines = list(csv.DictReader(file))
  assert list(lines[0])[:4] == ["row", "seed", "curve", "x"]
  assert [(r["curve"], r["x"]) for r in lines[::2]] == [
    ("", ""), ("plain", ""), ("line", "0.9"), ("line, other", "0.5"),
    ("line", "0.1"),
  ]  # fmt: skip
  assert "| line_0.9 | 0.650 ± 0.071 |" in (tmp_path / "results.md").read_text()
  image = plt.imread(tmp_path / "results_curves.png")[..., :3]
  near = [np.abs(image - to_rgb(c)).max(-1) < 0.1 for c in plots.COLOURS[:4]]
  across = [max(np.ptp(np.flatnonzero(row)) for row in n if row.any())
            for n in near[:2]]  # fmt: skip
  # The curve of one row reaches from edge to edge of its panel.
  assert across[0] > 0.4 * image.shape[1] > across[1]
  assert near[2].any() and not near[3].any()


def test_without_curves_no_picture_of_them(tmp_path):
  records = [{"row": "first", "seed": 0, "test/top1": 0.5}]
  sweep.write(STUDY, records, tmp_path)
  assert (tmp_path / "results.png").exists()
  assert not (tmp_path / "results_curves.png").exists()
  header = (tmp_path / "results.csv").read_text().splitlines()[0]
  assert header == "row,seed,test/top1"


@pytest.mark.parametrize(
  "places, scale",
  [((1, 20), "linear"), ((1, 21), "log"), ((0, 21), "linear")],
)
def test_a_wide_axis_is_logarithmic(places, scale):
  axis = Figure().subplots()
  plots._ticks(axis, places)
  assert axis.get_xscale() == scale
  assert [text.get_text() for text in axis.get_xticklabels()] == [
    str(place) for place in places
  ]


def test_far_chance_is_written_near_chance_drawn():
  curve = plots.Curve((0, 1), (0.5, 0.6), (0.0, 0.0))
  axes = Figure().subplots(1, 2)
  for axis, chance in zip(axes, (0.45, 0.05), strict=True):
    plots._dress(axis, "R@1", "", "")
    plots._curve(axis, "a", curve, 0)
    plots._chance(axis, chance)
  assert [axis.get_title() for axis in axes] == ["R@1", "R@1 (chance 0.05)"]
  assert len(axes[0].lines) == len(axes[1].lines) + 1


def test_bad_curves_are_refused():
  with pytest.raises(InputError, match="row 'a' has x=0.5, but no curve"):
    Row("a", "c.py", x=0.5)
  for rows in (curve_rows(1, 1.0), curve_rows(1, None)):
    with pytest.raises(InputError, match="of curve 'line' have x=1, "):
      Study("x", rows, ())
  hidden = dataclasses.replace(curve_rows(1)[0], shown=False)
  assert Study("x", (hidden, *curve_rows(1)), ()).curves["line"][0].shown


def test_recall_among_240_clips_has_two_chances():
  study = sweep.read_study(str(STUDIES / "cavmae_demo.py"))
  for metric, chance in zip(study.metrics, study.chances, strict=True):
    assert chance == int(metric.split("_R")[1]) / 240


def test_failed_run_is_named_with_its_log(tmp_path, monkeypatch):
  failed = type("Done", (), {"returncode": 1})
  monkeypatch.setattr(sweep.subprocess, "run", lambda *args, **kwargs: failed)
  with pytest.raises(InputError, match=r"first seed 3 failed, see .*log\.txt"):
    sweep.run(STUDY, [3], tmp_path)


@pytest.mark.parametrize(
  "text, words",
  [
    (None, "does not exist"),
    ("x = 1", "does not define get_study"),
    (
      "from avjax.sweep import *\n"
      "def get_study():\n"
      "  return Study('', (Row('a', 'c.py', start='b'),), ())",
      "row 'a' starts from 'b', which is not a row before it",
    ),
  ],
)
def test_bad_study_is_refused(tmp_path, text, words):
  path = tmp_path / "study.py"
  if text is not None:
    path.write_text(text)
  with pytest.raises(InputError, match=words):
    sweep.read_study(str(path))


@pytest.mark.parametrize(
  "path", sorted(STUDIES.glob("*.py")), ids=lambda p: p.stem
)
def test_rows_of_every_study_resolve(path, tmp_path):
  """Their configs exist, and have the keys that they override."""
  study = sweep.read_study(str(path))
  for row in study.rows:
    file, _, argument = row.config.partition(":")
    config = importlib.import_module(
      file.removesuffix(".py").replace("/", ".")
    ).get_config(argument)
    for override in row.overrides:
      *places, last = override.split("=")[0].split(".")
      section = config
      for place in places:
        section = section[place]
      assert last in section, override
    assert set(row.stages) <= set(config.stages)
    metrics = {metric.split("/")[0] for metric in study.metrics}
    names = row.stages or config.stages
    stages = [config[name] for name in names] or [config]
    assert not row.shown or metrics <= set(stages[-1].evals)
