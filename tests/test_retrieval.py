"""Ranks against literal numbers and a double loop; the evaluator."""

import csv
import dataclasses
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from avjax import evaluators, ranking
from avjax.config import base_config, eval_section
from avjax.data import augment, pipeline, records
from avjax.errors import InputError
from avjax.evaluators import retrieval_pictures
from avjax.evaluators.base import Context
from avjax.methods.base import Method
from avjax.workdir import workdir
from tests import runs


def of(similar, **options):
  """Ranks where the matrix of similarities is `similar` itself."""
  similar = np.asarray(similar, np.float32)
  return ranking.ranks(similar, np.eye(similar.shape[1]), **options)


def test_both_directions_literal():
  found = of([[3, 2, 1], [9, 5, 6], [7, 8, 9]])
  assert found.forward.tolist() == [1, 3, 1]
  assert found.backward.tolist() == [3, 2, 1]
  assert not found.forward_tied.any() and not found.backward_tied.any()


def test_of_equal_similarities_the_true_item_comes_first():
  found = of([[2, 2, 1], [0, 1, 1], [3, 3, 3]])
  assert found.forward.tolist() == [1, 1, 1]
  assert found.forward_tied.tolist() == [True, True, True]
  assert found.backward.tolist() == [2, 3, 1]
  assert found.backward_tied.tolist() == [False, False, False]


def test_not_a_number_is_never_right():
  nan = np.nan
  # Products with the unit vectors would spread nan: give embeddings.
  queries = np.array([[1.0, 0.0], [0.0, 1.0], [nan, 0.0]])
  gallery = np.array([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
  found = ranking.ranks(queries, gallery)
  assert found.forward.tolist() == [1, 1, np.inf]
  # The broken query comes before the right ones.
  assert found.backward.tolist() == [2, 2, np.inf]
  back = ranking.ranks(gallery, queries)
  assert back.forward.tolist() == [2, 2, np.inf]
  values = ranking.scores(found.forward, found.forward_tied)
  assert values["R10"] == pytest.approx(2 / 3)
  broken = ranking.scores(np.full(4, np.inf), np.zeros(4, bool))
  assert broken["R10"] == 0 and broken["median_rank"] == np.inf


def test_scores_are_fractions_and_the_median_counts_from_1():
  rank = np.array([1.0, 2.0, 5.0, 11.0, np.nan])
  tied = np.array([True, False, False, False, True])
  assert ranking.scores(rank, tied) == {
    "R1": 0.25,
    "R5": 0.75,
    "R10": 0.75,
    "median_rank": 3.5,
    "tied": 0.25,
  }


def naive(q, g, positive, groups):
  """Forward and backward ranks, similarity by similarity."""
  s = np.array([[float(np.float32(x @ y)) for y in g] for x in q])
  forward, backward = [], []
  for i, own in enumerate(positive):
    others = [j for j in range(len(g)) if groups[j] == groups[own]]
    forward.append(1 + sum(s[i, j] > s[i, own] for j in others))
  for j in range(len(g)):
    mine = [i for i in range(len(q)) if positive[i] == j]
    others = [i for i in range(len(q)) if groups[positive[i]] == groups[j]]
    best = max((s[i, j] for i in mine), default=np.nan)
    count = 1 + sum(s[i, j] > best for i in others)
    backward.append(count if mine else np.nan)
  return np.array(forward), np.array(backward, float)


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("captions", [False, True])
def test_against_a_double_loop(monkeypatch, grouped, captions):
  # Several blocks, the last one smaller; small integers, so many ties.
  monkeypatch.setattr(ranking, "_TILE", 7)
  monkeypatch.setattr(ranking, "BLOCK_BYTES", 4 * 37 * 14)
  rng = np.random.default_rng(3)
  g = rng.integers(-2, 3, (37, 5))
  positive = rng.permutation(37)
  if captions:  # several for some items, none for others
    positive = rng.integers(0, 37, 61)
  q = rng.integers(-2, 3, (len(positive), 5)) + g[positive]
  groups = rng.integers(0, 4, 37) if grouped else np.zeros(37, int)
  found = ranking.ranks(
    q, g, positive=positive, groups=groups.astype(str) if grouped else None
  )
  forward, backward = naive(q, g, positive, groups)
  np.testing.assert_array_equal(found.forward, forward)
  np.testing.assert_array_equal(found.backward, backward)


def test_equal_embeddings_tie_wherever_they_stand(monkeypatch):
  rng = np.random.default_rng(0)
  one = rng.standard_normal(65)
  for count in (1, 37, 523, 1_290):
    monkeypatch.setattr(ranking, "BLOCK_BYTES", 4 * count * 300)
    same = np.tile(one, (count, 1))
    found = ranking.ranks(same, same)
    assert (found.forward == 1).all() and (found.backward == 1).all()
    assert found.forward_tied.all() == found.backward_tied.all() == (count > 1)


def test_the_whole_matrix_is_never_there(monkeypatch):
  monkeypatch.setattr(ranking, "BLOCK_BYTES", 1 << 20)
  rng = np.random.default_rng(0)
  q = rng.standard_normal((3_000, 8)).astype(np.float32)
  tracemalloc.start()
  found = ranking.ranks(q, q + np.float32(0.01))
  _, peak = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  assert peak < 12 << 20  # the matrix: 36 MB
  assert found.forward.shape == (3_000,)


def test_sides_that_do_not_fit_are_refused():
  with pytest.raises(ValueError, match="2 queries, but 3 items"):
    ranking.ranks(np.eye(3)[:2], np.eye(3))
  with pytest.raises(ValueError, match="true items 0 to 3 of 3 items"):
    ranking.ranks(np.eye(3)[:2], np.eye(3), positive=np.array([0, 3]))


# ------------------------------------------------------------- the evaluator


class Pointer(Method):
  """Embeddings are points of a table, by the number of the clip."""

  def embed(self, params, inputs):
    number = inputs["index"].astype(int)
    return {m: params[m][number] for m in params}


def config(**data):
  made = base_config()
  made.data.update(heads=(), **data)
  return made


def context(made, batches, pictures=None):
  return Context(
    config=made,
    method=Pointer(made),
    prepare=lambda b, rng, train: augment.prepare(b, made.data, rng, train),
    batches=batches,
    workdir=workdir("."),
    picture=lambda name, image, step: pictures.append((name, image)),
  )


def rows(first, valid, **has):
  count = len(valid)
  batch = {
    "index": np.arange(first, first + count, dtype=np.uint32),
    "valid": np.array(valid),
    "has_audio": np.ones(count, bool),
    "has_video": np.ones(count, bool),
  }
  return {**batch, **{k: np.array(v) for k, v in has.items()}}, []


def evaluate(batches, params, **options):
  section = eval_section("retrieval", **options)
  evaluator = evaluators.make(
    context(config(), lambda section: iter(batches)), section
  )
  found = evaluator.run({k: jnp.asarray(v) for k, v in params.items()}, 0)
  return evaluator, found


AUDIO = np.array([[1, 0], [0, 2], [5, 5], [3, 1], [9, 9]], np.float32)
VIDEO = np.array([[2, 0], [1, 2], [0, 4], [9, 9], [9, 9]], np.float32)


def test_padding_and_lacking_clips_are_left_out():
  batches = [
    rows(0, [True] * 3),
    rows(3, [True, False, False], has_video=[False, True, True]),
  ]
  evaluator, found = evaluate(batches, {"audio": AUDIO, "video": VIDEO})
  assert found["gallery"] == 3 and found["left_out"] == 1
  # Cosines: clip 0 right; clip 1 finds video 2 first; clip 2 video 1.
  assert found["a2v_R1"] == pytest.approx(1 / 3)
  assert found["a2v_R5"] == 1 and found["a2v_median_rank"] == 2
  assert found["v2a_R1"] == pytest.approx(1 / 3)
  assert found["v2a_tied"] == 0
  # R5 and R10 are 1 in both directions.
  assert found["sum_R"] == pytest.approx(2 / 3 + 4)
  assert evaluator._embedder._step._cache_size() == 1


def test_a_batch_spread_over_devices_gives_the_same():
  mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
  rng = np.random.default_rng(5)
  params = {m: rng.standard_normal((8, 4)) for m in ("audio", "video")}
  batch, ids = rows(0, [True] * 7 + [False])
  spread = jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data")))
  _, alone = evaluate([(batch, ids)], params)
  _, found = evaluate([(spread, ids)], params)
  assert found == alone and found["gallery"] == 7


def test_no_modality_tells_of_the_other():
  class Leaky(Pointer):
    """Each embedding is the sum of all that the method is given."""

    def embed(self, params, inputs):
      seen = [inputs[k][:, 0] for k in ("fbank", "frames") if k in inputs]
      return {
        m: sum(x.reshape(len(x), -1)[:, :4] for x in seen) for m in params
      }

  rng = np.random.default_rng(0)
  batch, ids = rows(0, [True] * 8)
  batch["fbank"] = rng.standard_normal((8, 1, 4)).astype(np.float32)
  batch["frames"] = rng.integers(0, 256, (8, 1, 2, 2, 3)).astype(np.uint8)
  made = context(config(), lambda section: iter([(batch, ids)]))
  made = dataclasses.replace(made, method=Leaky(made.config))
  section = eval_section("retrieval")
  params = {"audio": jnp.zeros(1), "video": jnp.zeros(1)}
  found = evaluators.make(made, section).run(params, 0)
  assert found["a2v_R1"] < 1


def test_unit_embeddings_of_the_views_are_averaged():
  class Views(Pointer):
    def embed(self, params, inputs):
      return {m: inputs["frames"][:, 0, 0, :2, 0] for m in ("audio", "video")}

  frames = np.full((1, 2, 1, 2, 2, 3), 128, np.uint8)
  frames[0, 0, 0, 0, :, 0] = [255, 128]
  frames[0, 1, 0, 0, :, 0] = [128, 255]
  batch, ids = rows(0, [True])
  made = context(config(), lambda s: iter([({**batch, "frames": frames}, ids)]))
  embedder = evaluators.retrieval.Embedder(
    dataclasses.replace(made, method=Views(made.config)), normalise=True
  )
  found = embedder.split({}, eval_section("retrieval", views=2)).values["audio"]
  np.testing.assert_allclose(found, [[0.5**0.5, 0.5**0.5]], rtol=1e-4)


def test_what_cannot_be_evaluated_is_refused():
  params = {"audio": AUDIO, "video": VIDEO}
  with pytest.raises(InputError, match="no example to embed"):
    evaluate([], params)
  batches = [rows(0, [True] * 2, has_audio=[False, False])]
  with pytest.raises(InputError, match="none of the 2 clips"):
    evaluate(batches, params)
  with pytest.raises(InputError, match="unknown embedding.*'video'"):
    evaluate([rows(0, [True] * 2)], {"audio": AUDIO})
  section = eval_section("retrieval")
  made = context(config(modality="a"), iter)
  with pytest.raises(InputError, match="data.modality='av'; it is 'a'"):
    evaluators.make(made, section)


# ------------------------------------------------------ on stored clips


@pytest.fixture(scope="module")
def stored(demo_data):
  """Config, test split, and embeddings in which half of the clips agree."""
  made = runs.stage("avmae_vgg", data__dir=demo_data)
  split = records.Split(made.data, "test")
  rng = np.random.default_rng(0)
  audio = rng.standard_normal((len(split), 16)).astype(np.float32)
  video = audio.copy()
  video[::2] = rng.standard_normal(video[::2].shape)
  params = {"audio": jnp.asarray(audio), "video": jnp.asarray(video)}
  return made, split, params


def on_stored(stored, **options):
  made, split, params = stored
  pictures, drawn = [], []

  def batches(section):
    for batch in pipeline.eval_batches(
      made.data, split=section.split, batch_size=8
    ):
      drawn.append(batch["index"])
      yield {k: batch[k] for k in ("index", "valid")}, batch["id"]

  section = eval_section("retrieval", **options)
  evaluator = evaluators.make(context(made, batches, pictures), section)
  return evaluator.run(params, 5), pictures


def test_a_subset_restricts_queries_and_gallery(stored, tmp_path):
  made, split, params = stored
  ids = split.column("id")
  path = tmp_path / "ids.csv"
  with path.open("w", newline="") as lines:
    csv.writer(lines).writerows([[ids[k], "more"] for k in (1, 3, 9, 20)])
    lines.write("not there\n\n")
  found, _ = on_stored(stored, subset=str(path))
  assert found["gallery"] == 4
  assert found["a2v_R1"] >= 0.75  # 20 alone does not agree
  path.write_text("x\n")
  with pytest.raises(InputError, match="none of its 1 ids.*test_00000"):
    on_stored(stored, subset=str(path))
  with pytest.raises(InputError, match="No such file"):
    on_stored(stored, subset=str(tmp_path / "missing"))


def test_within_groups_of_classes(stored, tmp_path):
  found, _ = on_stored(stored, within="label")
  # One clip of each class: alone, each is first.
  assert found["within_a2v_R1"] == 1 > found["a2v_R1"]
  table = tmp_path / "groups.csv"
  names = records.class_names(stored[0].data)
  table.write_text("".join(f"{name},all\n" for name in names))
  everything, _ = on_stored(stored, within=str(table))
  for name in ("a2v_R1", "v2a_R5", "a2v_median_rank", "sum_R"):
    assert everything[f"within_{name}"] == everything[name]
  groups, _ = on_stored(stored, within="group")
  assert found["a2v_R1"] < groups["within_a2v_R1"] < 1
  table.write_text("dog,animal\n")
  with pytest.raises(InputError, match="unknown class in .*groups.csv"):
    on_stored(stored, within=str(table))


def test_pictures_of_the_best_and_the_worst(stored):
  _, pictures = on_stored(stored, pictures=2)
  assert [name for name, _ in pictures] == [
    "test_retrieval_a2v",
    "test_retrieval_v2a",
  ]
  green = np.array([0, 158, 115])  # the frame of the right one
  for _, image in pictures:
    assert image.dtype == np.uint8 and image.shape[2] == 3
    assert (image == green).all(axis=-1).sum() > 4_000
    assert 0.05 < (image == 255).all(axis=-1).mean() < 0.7


def test_cells_of_a_row_may_be_fewer(tmp_path):
  black = np.zeros((4, 8, 3), np.uint8)
  cell = retrieval_pictures.Cell(black, "a $ b\nc", retrieval_pictures.OWN)
  image = retrieval_pictures.cell_grid(
    [("one", [cell, cell]), ("two", [cell])], columns=["q", "1."], title="t"
  )
  assert image.shape[1] > image.shape[0]
