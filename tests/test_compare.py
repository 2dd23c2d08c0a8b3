"""Models side by side: which queries, which pictures, what is refused."""

import csv
import dataclasses
import json

import jax
import matplotlib.image
import numpy as np
import pytest

from avjax import compare, compare_ranks, evaluate, experiment, initialise
from avjax import config as config_lib
from avjax.checkpoint import Checkpoints
from avjax.errors import InputError
from avjax.evaluators import retrieval_pictures
from avjax.evaluators.retrieval import Pairs
from avjax.workdir import Workdir, workdir
from tests import runs

INF = np.inf
GREEN = (0, 158, 115)


def ranked(name, ranks, ids=("a", "b", "c"), data=("set", "test")):
  ranks = np.array(ranks, float)
  none = np.zeros((len(ids), 2), np.float32)
  pairs = Pairs(none, none, np.arange(len(ids)), 0)
  clips = object.__new__(retrieval_pictures.Clips)  # nothing is drawn
  both = {"a2v": ranks, "v2a": ranks[::-1]}
  return compare.Ranked(name, data, pairs, list(ids), both, clips)


def test_queries_that_improved_and_others_at_random():
  first = np.array([10.0, 90.0, 5.0, 2.0, INF, INF, 1.0, 8.0])
  last = np.array([1.0, 45.0, 5.0, 3.0, 7.0, INF, 1.0, 2.0])
  chosen = compare_ranks.choose(first, last, 6)
  random = [query for sort, query in chosen if sort == "at random"]
  improved = [query for sort, query in chosen if sort == "improved most"]
  assert len(random) == 3 and len(set(random)) == 3
  # By factor, infinite ranks of the first before all; none of them twice.
  order = [4, 0, 7, 1]
  assert improved == [query for query in order if query not in random][:3]
  assert compare_ranks.choose(first, last, 6) == chosen
  assert compare_ranks.choose(first, last, 1) == [("improved most", 4)]
  # Nothing improves: random ones alone, and never more than there are.
  assert [sort for sort, _ in compare_ranks.choose(last, first + 1, 4)] == (
    ["at random"] * 2
  )
  assert len(compare_ranks.choose(first, last, 100)) == 8


def test_recalls_and_who_is_ahead():
  models = [ranked("one", [1, 7, INF]), ranked("two", [1, 2, 11])]
  lines = compare.table(models).splitlines()
  assert lines[2:4] == [
    "| a2v | one | 0.333 | 0.333 | 0.667 |  | 0 of 3 |",
    "| a2v | two | 0.333 | 0.667 | 0.667 |  | 2 of 3 |",
  ]
  third = ranked("three", [1, 2, 20])
  ranks = compare.ranks_of([*models, third])["a2v"]
  assert compare_ranks.ahead(ranks)[1].tolist() == [False, False, True]


def test_models_of_other_clips_are_refused():
  one = ranked("one", [1, 1, 1])
  for other, words in (
    ({"data": ("else", "test")}, "differ in their data set: 'set' and 'else'"),
    ({"data": ("set", "train")}, "differ in their split: 'test' and 'train'"),
    ({"ids": ["a", "b"]}, "differ in their clips: 3 and 2, 2 of them in both"),
  ):
    with pytest.raises(InputError, match=f"one and two {words}"):
      compare.check([one, dataclasses.replace(one, name="two", **other)])
  compare.check([one, one])


@pytest.mark.parametrize(
  "paths, options, words",
  [
    (["a"], {}, "--workdirs names 1 run; a comparison needs two or more"),
    (["a", "b"], {"names": ["x"]}, "1 names for 2 workdirs"),
    (["a", "b"], {"names": ["x", "x"]}, "names x, x: each must be another"),
    (["a", "b"], {"top": 0}, "--top=0 must be at least 1"),
    (["a", "b"], {"count": 0}, "--count=0 must be at least 1"),
    (["nowhere/a", "b"], {}, "nowhere/a does not exist"),
  ],
)
def test_bad_calls_are_refused(tmp_path, paths, options, words):
  with pytest.raises(InputError, match=words):
    compare.compare(paths, tmp_path, **options)


def test_names_are_where_the_paths_differ():
  assert compare._names(["runs/a/0", "runs/b/0"]) == ["a", "b"]
  assert compare._names(["/x/a/0", "/x/a/1"]) == ["0", "1"]
  assert compare._names(["runs/a", "runs/a/fine"]) == ["a", "a/fine"]


# ------------------------------------------------------------- on real runs


@pytest.fixture(scope="module")
def pair(demo_data, tmp_path_factory):
  """Two checkpoints of a run of CAV-MAE that has seen nothing."""
  run = workdir(tmp_path_factory.mktemp("run"))
  config = runs.stage("cavmae_audioset", data__dir=demo_data)
  config.evals.retrieval.update(limit=0, pictures=0)
  setup = experiment.build(runs.plain(config))
  stored = experiment.stored(setup.config, setup.init_state()["params"])
  rng = np.random.default_rng(0)
  with Checkpoints(run.checkpoints, keep=2) as checkpoints:
    for step in (1, 2):
      params = jax.tree.map(
        lambda x: x + 0.1 * rng.standard_normal(x.shape).astype(x.dtype), stored
      )
      checkpoints.save(step, {"params": params}, wait=True)
  run.config.write_text(json.dumps(config_lib.plain(config)))
  return [str(run.checkpoints / str(step)) for step in (1, 2)]


def test_two_models_side_by_side(pair, tmp_path):
  limit = ["evals.retrieval.limit=8"]
  text = compare.compare(
    pair, tmp_path, names=("one", "two"), count=2, top=8, settings=limit
  )
  assert (tmp_path / "comparison.md").read_text() == text
  # The recalls are those of the evaluator.
  scores = evaluate.evaluate(pair[1], only="retrieval", settings=limit)
  found = [scores[f"retrieval/a2v_R{k}"] for k in (1, 5, 10)]
  cells = " | ".join(f"{value:.3f}" for value in found)
  assert f"| a2v | two | {cells} |" in text
  with (tmp_path / "comparison.csv").open() as file:
    rows = list(csv.DictReader(file))
  assert len(rows) == 16 and set(rows[0]) == {"id", "direction", "one", "two"}
  first = [int(r["two"]) for r in rows if r["direction"] == "a2v"]
  assert np.mean(np.array(first) <= 5) == pytest.approx(found[1])
  for way in compare.DIRECTIONS:
    path = tmp_path / f"comparison_{way}.png"
    image = (matplotlib.image.imread(path)[..., :3] * 255).round()
    # All are shown, so a row has its own in a frame for both models.
    assert (image == GREEN).all(axis=-1).sum() > 2 * 2_000
    assert image.shape[1] > 17 * 170
  # A map for each model; the first clips are of as many classes.
  assert matplotlib.image.imread(tmp_path / "comparison_map.png").size
  ahead = text.split("\n")[2].split(" | ")[-2:]
  assert 0 <= float(ahead[0]) <= 1


def test_what_is_of_the_query_and_what_of_its_class(pair):
  model = compare.rank(pair[0], "one", split="train")
  assert model.data == ("av_demo", "train") and len(model.ids) == 48
  assert model.ids == sorted(model.ids)
  numbers = model.pairs.number
  main = [model.clips.main_class(int(number)) for number in numbers]
  similar = compare._similar(model.pairs, "v2a", 5)
  cells = retrieval_pictures.answers(
    "v2a", similar, 5, numbers, model.clips, top=48, own=False
  )
  frames = [cell.frame for cell in cells]
  place = frames.index(retrieval_pictures.OWN)
  assert place + 1 == model.ranks["v2a"][5]
  # Two clips of each class.
  assert main.count(main[5]) == 2
  assert frames.count(retrieval_pictures.SAME_CLASS) == 1
  assert frames.count("") == 46


def test_runs_that_cannot_be_compared(pair, tmp_path, monkeypatch):
  with pytest.raises(InputError, match="unknown evaluation of .* 'retrival'"):
    compare.compare(pair, tmp_path, evaluation="retrival")
  settings = ["evals.retrieval.limit=9"]
  assert len(compare.rank(pair[0], "one", settings=settings).ids) == 9
  # What is wrong with a run says which.
  settings = [f"evals.retrieval.subset={tmp_path}/none.csv"]
  with pytest.raises(InputError, match=r"checkpoints/1: .*none.csv: .*No such"):
    compare.compare(pair, tmp_path, settings=settings)
  config = initialise.locate(pair[0])[0].read_config()
  config["evals"]["retrieval"]["type"] = "classification"
  monkeypatch.setattr(Workdir, "read_config", lambda self: config)
  with pytest.raises(InputError, match="type 'classification', not"):
    compare.compare(pair, tmp_path)
