"""CoAVT's captions and retrieval, one run and two side by side."""

import csv
import dataclasses
import json

import jax
import jax.numpy as jnp
import matplotlib.image
import numpy as np
import pytest

import avjax
from avjax import (
  compare,
  compare_text,
  evaluate,
  evaluators,
  experiment,
  initialise,
)
from avjax import config as config_lib
from avjax.checkpoint import Checkpoints
from avjax.config import eval_section
from avjax.data import text
from avjax.errors import InputError
from avjax.evaluators.base import Context
from avjax.methods import coavt_config
from avjax.nn.bert import QueryEncoder
from avjax.workdir import workdir
from tests import runs

SMALL = {"width": 32, "depth": 2, "heads": 2, "mlp": 64}
GREEN = (0, 158, 115)


def config_of(demo_data, **model):
  made = runs.stage("cavmae_audioset", data__dir=demo_data)
  made.data.heads = ()
  made.data.text.update(vocabulary="av_demo", length=16)
  made.method = "coavt"
  made.model = coavt_config.default_model(
    **SMALL, **{f"text_{k}": v for k, v in SMALL.items()},
    queries=3, projection=8, vocabulary=text.size(made), **model,
  )  # fmt: skip
  options = {"batch_size": 8, "limit": 16, "captions": 5}
  made.evals = {
    "text_retrieval": eval_section(
      "text_retrieval", modes=("av",), rerank=4, match_batch=64, **options
    )
  }
  if made.model.query_encoder:
    made.evals.captions = eval_section(
      "captions", beams=2, **{**options, "limit": 8}
    )
  return runs.plain(made)


@pytest.fixture(scope="module")
def pair(demo_data, tmp_path_factory):
  """Baseline and CoAVT that have seen nothing."""
  paths = []
  baseline = {
    "modes": ("av",), "query_encoder": False, "objectives": ("contrast",),
  }  # fmt: skip
  for model in (baseline, {}):
    run = workdir(tmp_path_factory.mktemp("run"))
    setup = experiment.build(config_of(demo_data, **model))
    params = experiment.stored(setup.config, setup.init_state()["params"])
    with Checkpoints(run.checkpoints, keep=1) as checkpoints:
      checkpoints.save(1, {"params": params}, wait=True)
    run.config.write_text(json.dumps(config_lib.plain(setup.config)))
    paths.append(str(run.root))
  return paths


def test_two_models_side_by_side(pair, tmp_path):
  written = compare.compare(
    pair, tmp_path, names=("Baseline", "CoAVT"), count=2, top=3,
    evaluation="text_retrieval",
  )  # fmt: skip
  assert (tmp_path / "comparison.md").read_text() == written
  scores = evaluate.evaluate(pair[1], only="text_retrieval")
  name = "text_retrieval/reranked_t2av_R"
  found = " | ".join(f"{scores[f'{name}{k}']:.3f}" for k in (1, 5, 10))
  assert f"| t2av | CoAVT | {found} | yes |" in written
  assert "| av2t | Baseline |" in written and " | no | " in written
  clips, captions = (
    scores[f"text_retrieval/{k}"] for k in ("gallery", "queries")
  )
  assert f"{clips:.0f} clips, {captions:.0f} captions." in written
  assert clips == 16 and captions > 16
  with (tmp_path / "comparison.csv").open() as file:
    rows = list(csv.DictReader(file))
  assert len(rows) == clips + captions
  image = matplotlib.image.imread(tmp_path / "comparison_av2t.png")[..., :3]
  # A text of its own stands in each of the two columns and rows.
  assert ((image * 255).round() == GREEN).all(axis=-1).sum() > 4 * 50


class One(compare_text.Ranked):
  """Of anything that is looked at, whatever its type."""

  def __init__(self, **fields):
    self.__dict__.update(clips=None, **fields)


def test_models_that_cannot_be_compared(pair, tmp_path):
  with pytest.raises(
    InputError, match="'text_retrieval', not 'retr|unknown ev"
  ):
    compare.compare(pair, tmp_path, evaluation="retrieval")
  table = dataclasses.make_dataclass("Table", ["text"])(np.array([0, 1]))
  found = dataclasses.make_dataclass("Found", ["tables"])
  first = {"data": ("d", "s"), "ids": ["a"], "words": ["t", "u"]}
  first["found"] = found({"a": table})
  for change, words in (
    ({"data": ("d", "z")}, "x and y differ in their data set or split"),
    ({"ids": ["b"]}, r"their clips: 1 \(a, …\) and 1 \(b, …\)"),
    ({"words": ["t", "v"]}, "differ in their captions: 2"),
    ({"found": found({"v": table})}, "x, y have no mode in common"),
  ):
    models = [One(name="x", **first), One(name="y", **{**first, **change})]
    with pytest.raises(InputError, match=words):
      compare_text.common_mode(models)


def test_captions_are_the_argmax_of_the_full_pass(pair):
  """And re-ranked pairs have the scores of `match` one by one."""
  run, _ = initialise.locate(pair[1])
  config = config_lib.from_plain(run.read_config())
  setup = experiment.build(config)
  pictures = []
  context = Context(
    config=config,
    method=setup.method,
    prepare=setup.prepare,
    batches=lambda section: evaluate.batches(setup, section),
    workdir=run,
    picture=lambda name, image, step: pictures.append(name),
  )
  _, params = evaluate.restored(run, setup, None)
  evaluator = evaluators.make(context, config.evals.captions)
  made = evaluator.run(params, 1)
  assert pictures == ["test_captions"] and made["clips"] == 8
  assert made["beam_score"] >= made["greedy_score"] - 0.1
  written = evaluator.write(params)
  method, tokens = setup.method, evaluator.tokenizer
  [(batch, _)] = context.batches(config.evals.captions)
  ids = np.asarray(evaluator._step(params, batch)["greedy"])
  inputs = setup.prepare(batch, jax.random.key(0), False)
  media = method.encode_media(params, inputs, "av")["tokens"]
  read = np.concatenate([np.full((8, 1), tokens.dec), ids], axis=1)[:, :-1]
  _, cache = method.asked(params, media)
  whole = jnp.asarray(read), jnp.ones(read.shape, bool)
  logits = method.run(params, QueryEncoder.language, cache, *whole)
  logits = np.array(logits)
  logits[..., [tokens.pad, tokens.unk, tokens.cls, tokens.dec]] = -np.inf
  live = np.cumsum(ids == tokens.sep, axis=1) - (ids == tokens.sep) == 0
  assert live.sum() > 8
  assert (logits.argmax(-1)[live] == ids[live]).all()
  retrieval = evaluators.make(context, config.evals.text_retrieval)
  found = retrieval.find(params)
  matched = found.reranked["av"].matched
  texts, clips = np.nonzero(~np.isnan(matched[:, :8]))
  mask = found.ids[texts] != tokens.pad
  alone = method.match(
    params, media[clips], jnp.asarray(found.ids[texts]), jnp.asarray(mask)
  )
  np.testing.assert_allclose(matched[texts, clips], alone, atol=1e-5)
  # The same in Python.
  model = avjax.load(pair[1])
  media = {k: v for k, v in batch.items() if not k.startswith("text")}
  assert model.caption(media, beams=2) == written.made["beam"]
  assert model.caption(media, beams=1) == written.made["greedy"]
  told = [tokens.decode(row) for row in found.ids]
  similar = model.similarity(told, media, "av")
  expected = found.tables["av"].similar[:, :8]
  np.testing.assert_allclose(similar, expected, atol=1e-5)
  silent = {**media, "has_audio": np.arange(8) != 3}
  with pytest.raises(
    InputError, match="3 has no audio for mode 'av'; mode 'v'"
  ):
    model.caption(silent)
  model.similarity("a bell", silent, "v")
  with pytest.raises(InputError, match="beams=0: at least 1"):
    model.caption(media, beams=0)
  with pytest.raises(InputError, match="unknown mode of retrieval 'w'"):
    model.caption(media, "w")
  with pytest.raises(InputError, match="has no tokens"):
    avjax.load(pair[0]).caption(media)
