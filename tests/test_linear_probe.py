"""Linear probes of embeddings whose separability is known."""

import jax.numpy as jnp
import numpy as np
import pytest

from avjax import evaluators
from avjax.config import base_config, eval_section
from avjax.data import augment, records
from avjax.errors import InputError
from avjax.evaluators import linear_probe
from avjax.evaluators.base import Context
from avjax.methods.base import Method
from avjax.workdir import workdir

CLASSES = ("dog", "cat", "bell")
COUNT = 60


class Stored(records.Split):
  """Stands in for a built split: labels alone."""

  def __init__(self, labels):
    self._labels = labels

  def __len__(self):
    return len(self._labels)

  def column(self, name):
    if name == "label":
      return np.concatenate(self._labels)
    return np.cumsum([len(row) for row in self._labels])


class Pointer(Method):
  """Embeddings are rows of a table: audio tells, video does not."""

  names = ("audio", "video")

  def embed(self, params, inputs):
    side, number = inputs["label/noun"][:, 0], inputs["index"].astype(int)
    return {m: params[m][side.astype(int), number] for m in self.names}


@pytest.fixture
def probe(monkeypatch):
  """A function that runs the evaluator: labels of (train, test) -> scores."""

  def run(
    labels, params, multilabel=False, method=Pointer, has=None, **options
  ):
    made = base_config()
    made.data.multilabel, made.data.heads = multilabel, ()
    splits = dict(zip(("train", "test"), labels, strict=True))

    def split(data, name, limit):
      return Stored(splits[name][: limit or None])

    def batches(section):
      count = len(split(None, section.split, section.limit))
      for first in range(0, count, 16):
        number = np.arange(first, first + 16, dtype=np.uint32)
        yield (
          {
            "index": number,
            "valid": number < count,
            "has_audio": np.ones(16, bool),
            "has_video": np.ones(16, bool) if has is None else has[number],
            # Which split it is, for the table of the method.
            "label/noun": np.full((16, 1), section.split == "test", np.float32),
          },
          [],
        )

    monkeypatch.setattr(linear_probe.records, "Split", split)
    monkeypatch.setattr(
      linear_probe.records, "class_names", lambda data: CLASSES
    )
    context = Context(
      config=made,
      method=method(made),
      prepare=lambda b, rng, train: augment.prepare(b, made.data, rng, train),
      batches=batches,
      workdir=workdir("."),
      picture=lambda name, image, step: None,
    )
    evaluator = evaluators.make(
      context, eval_section("linear_probe", **options)
    )
    return evaluator.run({k: jnp.asarray(v) for k, v in params.items()}, 0)

  return run


def table(labels):
  """Audio [2 n d] that holds the classes, video that holds noise."""
  rng = np.random.default_rng(0)
  audio = rng.standard_normal((2, 64, 6)).astype(np.float32) * 0.1
  for side, rows in enumerate(labels):
    for number, row in enumerate(rows):
      audio[side, number, row] += 3
  video = rng.standard_normal((2, 64, 6)).astype(np.float32)
  return {"audio": audio * 100 + 7, "video": video}


def single(rng):
  return [[rng.integers(3, size=1) for _ in range(COUNT)] for _ in range(2)]


def test_what_the_features_hold_is_found(probe):
  labels = single(np.random.default_rng(1))
  found = probe(labels, table(labels))
  assert found["audio/top1"] == 1.0
  assert found["video/top1"] < 0.6
  assert found["av/top1"] > 0.9
  assert found["left_out"] == 0
  assert found == probe(labels, table(labels))


def test_only_the_first_class_of_a_clip_counts(probe):
  labels = single(np.random.default_rng(1))
  twice = [[np.append(row, (row + 1) % 3) for row in rows] for rows in labels]
  found = probe(twice, table(labels), names=("audio",))
  assert found == {"audio/top1": 1.0, "left_out": 0.0}


def test_limits_and_clips_that_do_not_count(probe):
  labels = single(np.random.default_rng(2))
  labels[1][0] = np.array([-1])  # no class
  has = np.ones(64, bool)
  has[[0, 4, 30]] = False
  params = table(labels)
  # Wrong from clip 20 on: neither trained on nor scored.
  params["audio"][:, 20:] = 0
  found = probe(labels, params, has=has, train_limit=20, limit=20)
  assert found["audio/top1"] == 1.0
  assert found["left_out"] == 2


def test_several_labels_give_map(probe):
  rng = np.random.default_rng(3)
  labels = [
    [np.flatnonzero(rng.random(2) < 0.5) for _ in range(COUNT)]
    for _ in range(2)
  ]
  found = probe(labels, table(labels), multilabel=True)
  # The third class has no positive anywhere: it does not count.
  assert found["audio/mAP"] == pytest.approx(1.0)
  assert found["video/mAP"] < 0.8
  assert "audio/top1" not in found


def test_an_av_of_the_method_is_taken(probe):
  class Fused(Pointer):
    def embed(self, params, inputs):
      both = super().embed(params, inputs)
      return {"av": both["audio"], **both}

  labels = single(np.random.default_rng(1))
  params = table(labels)
  found = probe(labels, params, method=Fused)
  assert found["av/top1"] == found["audio/top1"] == 1.0


def test_it_says_when_it_has_not_converged(probe, caplog):
  labels = single(np.random.default_rng(1))
  probe(labels, table(labels), names=("video",), iterations=1)
  assert "not converged after 1 iterations" in caplog.text


def test_what_cannot_be_probed_is_refused(probe):
  labels = single(np.random.default_rng(1))
  params = table(labels)
  with pytest.raises(InputError, match="unknown embedding.*'text'"):
    probe(labels, params, names=("text",))
  one = [[np.array([1])] * COUNT, labels[1]]
  with pytest.raises(InputError, match="holds 1 class in 60 labelled clips"):
    probe(one, params)
  none = [[np.array([-1])] * COUNT, labels[1]]
  with pytest.raises(
    InputError, match="none of 60 clips has audio and a label"
  ):
    probe(none, params)
  params["audio"][1, 3] = np.nan
  with pytest.raises(InputError, match="'audio': 1 of 120 embeddings"):
    probe(labels, params)
