"""What layers tell of the modality, retrieve and look at."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avjax import evaluators
from avjax.config import base_config, eval_section
from avjax.errors import InputError
from avjax.evaluators import layers
from avjax.evaluators.base import Context
from avjax.methods.base import Method
from avjax.methods.uavm import UAVM, default_model
from avjax.workdir import workdir

TOKENS, WIDTH, CLIPS = 4, 8, 11


def make(tmp_path, batches, variant="unified", **options):
  config = base_config()
  config.method = "uavm"
  config.data.update(name="av_demo", feature_frames=TOKENS, feature_width=WIDTH)
  config.model = default_model(
    variant=variant, specific_layers=1, shared_layers=1, width=WIDTH,
    shared_width=4, tokens=TOKENS, heads=2, classes={"label": 3},
  )  # fmt: skip
  pictures = {}
  context = Context(
    config=config,
    method=UAVM(config),
    prepare=lambda batch, rng, train: batch,
    batches=lambda section: iter(batches),
    workdir=workdir(tmp_path),
    picture=lambda name, picture, step: pictures.update({name: picture}),
  )
  section = eval_section("layers", **options)
  return evaluators.make(context, section), context.method, pictures


def clips(missing=()):
  """One batch of features whose last row is padding."""
  rng = np.random.default_rng(0)
  shape = (CLIPS + 1, TOKENS, WIDTH)
  batch = {
    f"features/{m}": jnp.asarray(rng.standard_normal(shape), jnp.float32)
    for m in ("audio", "video")
  }
  batch["index"] = jnp.arange(CLIPS + 1, dtype=jnp.uint32)
  batch["valid"] = jnp.arange(CLIPS + 1) < CLIPS
  batch["has_audio"] = jnp.ones(CLIPS + 1, bool)
  batch["has_video"] = ~jnp.isin(jnp.arange(CLIPS + 1), jnp.array(missing))
  return batch


def test_scores_are_those_of_the_representations(tmp_path):
  batch = clips(missing=[2])
  evaluator, method, pictures = make(tmp_path, [(batch, [])], tsne=5)
  params = method.init(jax.random.key(0), batch)
  scores = evaluator.run(params, 7)
  assert scores["clips"] == CLIPS - 1
  names = ("0", "1", "2", "logits", "last")
  assert {k.split("/")[0] for k in scores} == {*names, "clips"}
  assert scores["last/a2v_R5"] == scores["2/a2v_R5"]
  assert scores["last/attention"] == scores["2/attention"]
  assert "logits/attention" not in scores and "0/attention" not in scores
  kept = np.array([i for i in range(CLIPS) if i != 2])
  found = jax.jit(method.representations)(params, batch)
  for k, name in enumerate(names[:4]):
    a, v = (np.asarray(found[m][k])[kept] for m in ("audio", "video"))
    a, v = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a, v))
    similar = a @ v.T
    ranks = 1 + (similar > np.diag(similar)[:, None]).sum(axis=1)
    assert scores[f"{name}/a2v_R5"] == pytest.approx((ranks <= 5).mean())
  maps = jax.jit(method.attention_maps)(params, batch)
  for k in (1, 2):
    a, v = (np.asarray(maps[m][k - 1])[kept] for m in ("audio", "video"))
    assert scores[f"{k}/attention"] == pytest.approx(np.abs(a - v).mean())
  shown = {"layers_modality", "layers_retrieval", "layers_attention"}
  shown |= {"modality_coefficients", "attention_heat", "layers_tsne"}
  assert set(pictures) == {f"test_{name}" for name in shown}
  assert all(p.dtype == np.uint8 and p.std() > 0 for p in pictures.values())
  assert evaluator.run(params, 7) == scores


def test_modalities_are_told_apart_where_they_differ():
  rng = np.random.default_rng(0)
  audio, video = rng.standard_normal((2, 200, 6))
  video[:, 3] += 6
  accuracy, sizes = layers.tell_apart(audio, video)
  assert accuracy > 0.98 and sizes.argmax() == 3 and len(sizes) == 6
  chance, _ = layers.tell_apart(*rng.standard_normal((2, 400, 6)))
  assert abs(chance - 0.5) < 0.1


def test_each_row_of_a_heat_map_counts_by_its_maximum():
  maps = jnp.array([[[[0.5, 0.25], [0.1, 0.4]]]])
  assert layers.heat_map(maps).tolist() == [[[1.25, 1.5]]]


def test_published_maps_leave_the_layer_norm_out(tmp_path):
  batch = clips()
  found = []
  for published in (False, True):
    evaluator, method, _ = make(
      tmp_path, [(batch, [])], published_maps=published
    )
    params = method.init(jax.random.key(0), batch)
    found.append(evaluator.run(params, 0)["last/attention"])
  assert found[0] != found[1]


def test_so_many_clips_of_a_class(tmp_path, monkeypatch):
  evaluator, _, _ = make(tmp_path, [], per_class=2)
  rows = [np.array(x, np.int64) for x in ([1], [0], [1], [], [1], [0], [0])]
  monkeypatch.setattr(layers.records, "Split", lambda *rest: None)
  monkeypatch.setattr(layers, "class_numbers", lambda split: rows)
  # Clip 4 is the third of class 1, clip 3 has none; clip 1 is not there.
  number = np.array([0, 2, 3, 4, 5, 6])
  assert evaluator._gallery(number).tolist() == [0, 1, 4, 5]


def test_shared_blocks_of_both_have_no_map_of_one(tmp_path):
  batch = clips()
  evaluator, method, pictures = make(
    tmp_path, [(batch, [])], variant="cross_modal"
  )
  scores = evaluator.run(method.init(jax.random.key(0), batch), 0)
  assert "logits/modality" not in scores and "2/modality" in scores
  assert "1/attention" in scores and "2/attention" not in scores
  assert "test_layers_tsne" not in pictures


def test_what_cannot_be_analysed_is_refused(tmp_path):
  batch = clips(missing=range(3, CLIPS))
  evaluator, method, _ = make(tmp_path, [(batch, [])])
  params = method.init(jax.random.key(0), batch)
  with pytest.raises(InputError, match="has 3 clips with both"):
    evaluator.run(params, 0)
  broken = clips()
  broken["features/audio"] = broken["features/audio"].at[0].set(jnp.nan)
  evaluator, _, _ = make(tmp_path, [(broken, [])])
  with pytest.raises(InputError, match="layer 0: 1 of 22 representations"):
    evaluator.run(params, 0)
  plain = Method(evaluator.context.config)
  other = dataclasses.replace(evaluator.context, method=plain)
  with pytest.raises(InputError, match="need a method with representations"):
    evaluators.make(other, eval_section("layers"))
