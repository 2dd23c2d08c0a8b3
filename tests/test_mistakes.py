"""What users get wrong costs no training, and is told in one line."""

import os
import pathlib
import signal
import types

import jax
import pytest

from avjax import commands, evaluate, experiment, parallel, report, train
from avjax.config import base_config, eval_section
from avjax.errors import InputError, SaveError
from avjax.evaluators.retrieval import Retrieval
from avjax.workdir import Workdir
from data_prep import build, parts, tables
from tests import runs
from tests.test_pipeline import broken, broken_data

__all__ = ["broken", "broken_data"]  # fixtures


def pretraining(demo_data, **overrides):
  whole = {"evals__retrieval__limit": 0, "evals__retrieval__pictures": 0}
  overrides = {"data__dir": demo_data, **runs.CONSTANT, **whole, **overrides}
  config = runs.stage("cavmae_audioset", **overrides)
  del config.evals["reconstruction"]
  return config


def begin(config, folder):
  return train.train_and_evaluate(runs.plain(config), folder)


@pytest.mark.parametrize(
  "overrides, words",
  [
    ({"evals__retrieval__split": "tst"}, "evals.retrieval: .*'tst'.*'test'"),
    ({"evals__retrieval__subset": "/nope"}, "evals.retrieval: /nope: "),
    ({"evals__retrieval__views": 0}, "evals.retrieval: views is 0"),
    ({"evals__retrieval__limit": -1}, "evals.retrieval: limit is -1"),
    ({"log_every": 0}, "log_every is 0; expected at least 1"),
    ({"batch_size": 0}, "batch size 0 is less than 1"),
    ({"data__workers": -1}, "data.workers is -1"),
    ({"data__modality": "x"}, "unknown data.modality 'x'. Known: a, av, v"),
    ({"checkpoint__best": "retreival/mAP"}, "Did you mean 'retrieval/…'"),
  ],
)
def test_refused_before_the_first_step(overrides, words, demo_data, tmp_path):
  with pytest.raises(InputError, match=words):
    begin(pretraining(demo_data, **overrides), tmp_path)
  assert not (tmp_path / "metrics.jsonl").exists()


def test_an_evaluation_that_fails_costs_no_training(
  demo_data, tmp_path, monkeypatch
):
  config = pretraining(demo_data)
  config.evals.retrieval.every_epochs = 0.0
  config.checkpoint.best = "retrieval/no_such"
  with pytest.raises(InputError, match="checkpoint.best 'retrieval/no_such'"):
    begin(config, tmp_path)
  config.checkpoint.best = ""

  def fail(self, params, step):
    raise OSError("no room")

  with monkeypatch.context() as patch:
    patch.setattr(Retrieval, "run", fail)
    with pytest.raises(OSError, match="no room"):
      begin(config, tmp_path / "other")
  # The last step is there; nothing is trained again.
  with monkeypatch.context() as patch:
    patch.setattr(train.Loop, "train", fail)
    for folder in (tmp_path, tmp_path / "other"):
      assert begin(config, folder)["retrieval/gallery"] == 24


def test_ctrl_c_while_a_run_starts_ends_it(demo_data, tmp_path, monkeypatch):
  built = experiment.build

  def interrupted(config):
    os.kill(os.getpid(), signal.SIGINT)
    return built(config)

  before = signal.getsignal(signal.SIGINT)
  monkeypatch.setattr(experiment, "build", interrupted)
  with pytest.raises(SystemExit) as ended:
    begin(pretraining(demo_data), tmp_path)
  assert ended.value.code == 128 + signal.SIGTERM
  assert not list((tmp_path / "checkpoints").glob("[0-9]*"))
  assert signal.getsignal(signal.SIGINT) is before


class Finished(train.Loop):
  """Was interrupted while it ended."""

  def go(self):
    self.interrupted = True
    return {}


@pytest.mark.parametrize("more", [True, False])
def test_a_signal_in_the_last_step_begins_no_other_stage(
  more, demo_data, tmp_path, monkeypatch
):
  monkeypatch.setattr(train, "Loop", Finished)
  config = runs.plain(pretraining(demo_data))
  if not more:
    assert train.train_stage(config, Workdir(tmp_path)) == {}
    return
  with pytest.raises(SystemExit) as ended:
    train.train_stage(config, Workdir(tmp_path), more=True)
  assert ended.value.code == 128 + signal.SIGTERM


def test_scores_of_an_earlier_step_are_not_a_later_ones(demo_data, tmp_path):
  config = pretraining(demo_data)
  config.checkpoint.best = "retrieval/mAP"
  loop, saved = train.Loop(config, Workdir(tmp_path)), {}
  loop.checkpoints = types.SimpleNamespace(
    save=lambda step, state, metrics, extra: saved.update({step: metrics})
  )
  loop.scores, loop.scored = {"retrieval/mAP": 0.5}, {"retrieval": 2}
  for step in (2, 3):
    loop.save(step, {})
  assert saved == {2: {"retrieval/mAP": 0.5}, 3: None}


def test_a_staged_run_goes_on_from_another_place(tmp_path):
  run = Workdir(tmp_path / "moved/finetune")
  beside = str(tmp_path / "moved/pretrain")
  assert train._same_stage("runs/demo/pretrain", beside, run)
  assert not train._same_stage("runs/demo/pretrain", "other/pretrain", run)
  assert not train._same_stage("runs/demo/first", beside, run)
  assert not train._same_stage("runs/demo/first", "", run)


def test_a_mark_that_cannot_be_read_is_named(tmp_path):
  run = Workdir(tmp_path)
  run.done.touch()
  with pytest.raises(InputError, match="done.json cannot be read"):
    report.final_scores(run)


def test_clips_left_out_of_scores_are_listed(broken_data, tmp_path):
  config = base_config()
  config.data, config.batch_size, config.method = broken_data, 8, "cavmae"
  setup = object.__new__(experiment.Experiment)
  mesh = parallel.make_mesh(config.mesh, jax.devices()[:1])
  setup.__dict__.update(config=config, mesh=mesh)
  section = eval_section("retrieval")
  section.split = "train"
  left_out = {}
  for _ in range(2):
    list(evaluate.batches(setup, section, left_out))
  assert left_out == {"train": ["-2"]}
  run = Workdir(tmp_path)
  report.write(run, config, {}, {}, left_out)
  text = run.report.read_text()
  assert "Left out of the scores on train: 1.\n\n- `-2`\n" in text


def test_a_folder_that_cannot_be_made(demo_data, tmp_path):
  (tmp_path / "file").touch()
  with pytest.raises(InputError, match="file/run cannot be made: Not a dir"):
    begin(pretraining(demo_data), tmp_path / "file/run")


def test_the_flag_that_is_wrong_is_named(capsys):
  def parsed(argv):
    raise AttributeError('Did you mean "name" instead of "nam"')

  with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
    patch.setattr(commands.flags, "FLAGS", parsed)
    commands.parse_flags(["", "--config.data.name=x", "--config.data.nam=y"])
  assert "--config.data.nam=y: no config key 'nam'" in capsys.readouterr().err


def test_a_disk_that_is_full_is_one_line(capsys, monkeypatch, tmp_path):
  words = r"x cannot be written, [\d,]+ bytes are free: No space"
  with (
    pytest.raises(InputError, match=words),
    parts._telling(tmp_path / "x"),
  ):
    raise RuntimeError("No space left on device")

  def main(argv):
    raise SaveError("step 2 could not be saved")

  monkeypatch.setattr(
    commands.app, "run", lambda guarded, flags_parser: guarded([""])
  )
  monkeypatch.setattr(commands, "keep_compiled", lambda: None)
  with pytest.raises(SystemExit):
    commands.run(main)
  assert capsys.readouterr().err == "error: step 2 could not be saved\n"


def test_a_build_that_is_stopped_says_how_it_goes_on(capsys, monkeypatch):
  def main(argv):
    raise KeyboardInterrupt

  monkeypatch.setattr(build, "main", main)
  with pytest.raises(SystemExit):
    build.run([""])
  assert "the same command goes on" in capsys.readouterr().err


@pytest.mark.parametrize(
  "text, words",
  [
    ("", "line 1: expected a header with the columns path"),
    ("ok.mp4,dog\n", "header with the columns path, found 'ok.mp4,dog'"),
    ("path;split\na;b\n", "header with the columns path, found 'path;split'"),
    ("path,a,a\nx,1,2\n", "line 1: expected one column a"),
    ('path,a\nx,"y\nz,w\n', "line 2: expected a second quotation mark"),
  ],
)
def test_tables_whose_content_would_be_lost(text, words, tmp_path):
  path = pathlib.Path(tmp_path / "a.csv")
  path.write_text(text)
  with pytest.raises(InputError, match=words):
    list(tables.read_csv(path, ("path",)))


def test_quoted_lines_stay_together(tmp_path):
  path = pathlib.Path(tmp_path / "a.csv")
  path.write_text('path,a\nx,"y\n""z"""\n')
  assert [line["a"] for line in tables.read_csv(path, ("path",))] == ['y\n"z"']
