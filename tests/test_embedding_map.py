"""Maps of embeddings: which clips, what lies near, and the picture."""

import numpy as np
import pytest

from avjax import embedding_map, plots

NONE = np.array([], np.int64)


def labels(*rows):
  return [np.array(row, np.int64) for row in rows]


def test_clips_of_the_most_frequent_classes(monkeypatch):
  rows = labels([3], [1], [], [1, 3], [3], [5], [3])
  clips, main = embedding_map.choose(rows, 2)
  assert clips.tolist() == [0, 1, 3, 4, 6] and main.tolist() == [3, 1, 1, 3, 3]
  clips, main = embedding_map.choose(rows, 9)
  assert len(clips) == 6 and set(main) == {1, 3, 5}
  assert not len(embedding_map.choose([NONE, NONE], 3)[0])
  monkeypatch.setattr(embedding_map, "POINTS", 3)
  drawn = embedding_map.choose(rows, 9)[0]
  assert len(drawn) == 3 and (np.diff(drawn) > 0).all()
  assert drawn.tolist() == embedding_map.choose(rows, 9)[0].tolist()


def test_how_often_the_nearest_is_of_the_class(monkeypatch):
  gallery = np.eye(4, dtype=np.float32)
  queries = gallery[[1, 0, 2, 0]]
  queries[1, 3] = 0.1
  rows = labels([7], [7, 2], [2], [1])
  # The third finds itself, the first two each other, the last nothing of its.
  assert embedding_map.same_class(queries, gallery, rows) == 0.75
  monkeypatch.setattr(embedding_map, "BLOCK", 3)
  assert embedding_map.same_class(queries, gallery, rows) == 0.75
  # Without the first there is no other of class 7, and its clip is no answer.
  rows[0] = NONE
  share = embedding_map.same_class(queries, gallery, rows)
  assert share == pytest.approx(1 / 3)
  assert np.isnan(embedding_map.same_class(queries, gallery, [NONE] * 4))


def test_what_lies_together_is_drawn_together():
  rng = np.random.default_rng(0)
  centres = np.repeat(np.eye(3, 8), 8, axis=0)
  sides = [centres + 0.05 * rng.standard_normal((24, 8)) for _ in range(2)]
  points = np.concatenate(sides).astype(np.float32)
  places = embedding_map.tsne(points)
  assert (places == embedding_map.tsne(points)).all()
  group = np.tile(np.repeat(np.arange(3), 8), 2)
  far = np.linalg.norm(places[:, None] - places, axis=-1)
  np.fill_diagonal(far, np.inf)
  # A point's nearest are of its class, whatever its modality.
  assert (group[far.argsort(axis=1)[:, :5]] == group[:, None]).mean() > 0.95


def test_a_panel_for_each_model_and_a_colour_for_each_class():
  audio = np.float32([[1, 0], [0, 1], [1, 1], [2, 1]])
  picture = embedding_map.draw(
    {"one": (audio, audio), "two": (audio, audio[::-1])},
    np.array([4, 9, 4, 9]),
    [f"class {i}" for i in range(10)],
  )
  colours = {tuple(c) for c in picture.reshape(-1, 3).tolist()}
  # The first two of the table, and none else (white, black and greys apart).
  assert (31, 119, 180) in colours and (255, 127, 14) in colours
  assert (44, 160, 44) not in colours
  one = plots.scatter_panels({"one": {"sound": audio}}, np.arange(4), "abcd")
  assert picture.shape[1] == 2 * one.shape[1]
