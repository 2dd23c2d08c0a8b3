"""A finished run is asked again, in another way."""

import json

import pytest

from avjax import evaluate, train
from avjax.errors import InputError
from tests import runs


@pytest.fixture(scope="module")
def run(demo_data, tmp_path_factory):
  """One step of CAV-MAE, evaluated by retrieval alone."""
  folder = tmp_path_factory.mktemp("run")
  config = runs.stage("cavmae_audioset", data__dir=demo_data, total_steps=1)
  del config.evals["reconstruction"]
  config.evals.retrieval.update(limit=0, pictures=0)
  train.train_and_evaluate(runs.plain(config), folder)
  return folder


def test_another_subset_and_split_of_a_finished_run(run, tmp_path):
  done = json.loads((run / "done.json").read_text())["scores"]
  assert done["retrieval/gallery"] == 24
  subset = tmp_path / "ids,1=x.csv"
  ids = [f"test_{i:05d}" for i in range(3)]
  subset.write_text("\n".join(ids))
  key = f"evals.retrieval.subset={subset}"
  scores = evaluate.evaluate(run, settings=[key])
  assert scores["retrieval/gallery"] == 3
  record = json.loads((run / "evaluation.json").read_text())
  assert record["set"] == {"evals.retrieval.subset": str(subset)}
  assert record["scores"] == scores
  # Nothing of it stays with the run.
  saved = json.loads((run / "config.json").read_text())
  assert saved["evals"]["retrieval"]["subset"] == ""
  scores = evaluate.evaluate(run, settings=["evals.retrieval.split=train"])
  assert scores["retrieval/gallery"] == 48


def settled(*settings):
  config = runs.plain(runs.stage("cavmae_vgg_finetune"))
  return config, evaluate.with_settings(config, settings)


def test_values_take_the_type_of_the_old_ones():
  config, found = settled(
    "evals.test.views=3",
    "evals.frame.average=probabilities",
    "evals.test.modes=av,missing_a",
    "evals.frame.modes=('missing_v',)",
    "evals.test.every_epochs=2",
    "data.dir=/a=b,c",
    "data.files.channels=mean",
  )
  assert config.evals.test.views == found["evals.test.views"] == 3
  assert config.evals.frame.average == "probabilities"
  assert config.evals.test.modes == ("av", "missing_a")
  assert config.evals.frame.modes == ("missing_v",)
  assert config.evals.test.every_epochs == 2.0
  assert config.data.dir == "/a=b,c"
  assert config.data.files.channels == "mean"
  assert config.is_locked


def test_an_option_that_came_after_the_run():
  config = runs.stage("cavmae_audioset")
  del config.evals.retrieval["subset"]
  config = runs.plain(config)
  evaluate.with_settings(config, ["evals.retrieval.subset=x.csv"])
  assert config.evals.retrieval.subset == "x.csv"


@pytest.mark.parametrize(
  "settings, words",
  [
    (["evals.test.view=3"], "Did you mean 'evals.test.views'"),
    (["data.video.size=3"], "unknown key of --set 'data.video.size'"),
    (["evals.test.type=retrieval"], "unknown key of --set"),
    (["batch_size=3"], "unknown key of --set"),
    (["evals.test.views=x"], "'x' is not int, as 2 is"),
    (["evals.test.views"], "'' is not int"),
    (["evals.test.modes=('av'"], "is not tuple"),
    (["data.dir=a", "data.dir=b"], "data.dir is given twice"),
  ],
)
def test_bad_settings_are_refused(settings, words):
  with pytest.raises(InputError, match=words):
    settled(*settings)
