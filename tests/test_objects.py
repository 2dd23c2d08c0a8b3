"""A DETECLAP run: resumed with its scores, used without them."""

import json
import shutil

import numpy as np
import pytest

import avjax
from avjax import compare, convert, evaluate, train
from avjax.data import demo, object_scores
from avjax.errors import InputError
from tests import runs


def stage(demo_data, scores):
  config = runs.stage("deteclap_vgg", data__dir=demo_data, **runs.CONSTANT)
  del config.evals.probe, config.evals.reconstruction
  config.evals.retrieval.pictures = 1
  shutil.copytree(config.data.object_scores, scores)
  config.data.object_scores = str(scores)
  return config


@pytest.fixture(scope="module")
def run(demo_data, tmp_path_factory):
  """The folder of a run, and its config; the scores are gone."""
  place = tmp_path_factory.mktemp("deteclap")
  config = stage(demo_data, place / "scores")
  train.train_and_evaluate(runs.plain(config), place / "run")
  (place / "scores").rename(place / "kept")
  return place / "run", config


def test_the_run_says_what_it_learnt(run):
  said = json.loads((run[0] / "objects.json").read_text())
  assert said["labels"] == list(demo.CLASSES)
  assert said["source"]["video"]["model"] == "av_demo's own objects"
  saved = json.loads((run[0] / "config.json").read_text())
  assert saved["model"]["objects"] == 24


def test_it_is_evaluated_without_its_scores(run):
  before = json.loads((run[0] / "done.json").read_text())["scores"]
  found = evaluate.evaluate(run[0])
  assert found == {name: before[name] for name in found}
  assert "retrieval/within_a2v_R5" in found


def test_it_is_compared_loaded_and_converted_without_its_scores(run, tmp_path):
  ranked = compare.rank(run[0], "DETECLAP")
  assert len(ranked.pairs.audio) == 8
  params = avjax.load(run[0]).params
  assert params["objects_audio"]["kernel"].shape == (32, 24)
  convert.convert(run[0], tmp_path / "model.safetensors")
  convert.convert(tmp_path / "model.safetensors", tmp_path / "again")
  again = avjax.load(tmp_path / "again").params
  for m in ("audio", "video"):
    a, b = (tree[f"objects_{m}"]["kernel"] for tree in (params, again))
    assert np.array_equal(a, b)


@pytest.mark.parametrize("other", ["labels", "source"])
def test_it_does_not_go_on_with_other_scores(run, other, tmp_path):
  folder, config = run
  copy = tmp_path / "run"
  shutil.copytree(folder, copy)
  (copy / "done.json").unlink()
  made = {"labels": demo.CLASSES, "source": {"model": "another"}}
  if other == "labels":
    made["labels"] = demo.CLASSES[::-1]
  ids = object_scores.Scores(folder.parent / "kept", "audio").clips
  for m in object_scores.MODALITIES:
    object_scores.Writer(tmp_path / "other", m, clips=ids, **made).close()
  config = runs.plain(config)
  with config.unlocked():
    config.data.object_scores = str(tmp_path / "other")
  with pytest.raises(InputError, match=f"with other {other} of objects"):
    train.train_and_evaluate(config, copy)


def test_it_goes_on_where_its_scores_have_moved(run, tmp_path):
  folder, config = run
  copy = tmp_path / "run"
  shutil.copytree(folder, copy)
  (copy / "done.json").unlink()
  shutil.rmtree(copy / "checkpoints" / "2")
  config = runs.plain(config)
  with config.unlocked():
    config.data.object_scores = str(folder.parent / "kept")
  train.train_and_evaluate(config, copy)
  assert runs.losses(copy) == runs.losses(folder)
