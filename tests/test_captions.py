"""Captions of a tiny method: what is written, compared and drawn."""

import csv

import numpy as np
import pytest

from avjax import evaluators, report
from avjax.data import records, text
from avjax.errors import InputError
from avjax.evaluators import captions
from tests import captioned, runs

TRUE = [["a bell rings", "a bell"], ["a dog"], [], ["a drum booms"]]


def evaluate(tmp_path, params, true=TRUE, *, config=None, has=(), **options):
  made = config or captioned.config()
  batches = list(captioned.batches(true, size=3, **dict(has)))
  pictures = []
  context = captioned.context(made, batches, tmp_path, pictures)
  section = captioned.section("captions", **{"pictures": 0, **options})
  evaluator = evaluators.make(context, section)
  # Names of the clips, which come from a built split otherwise.
  evaluator.built = Ids(len(true))
  return evaluator, evaluator.run(params, 3), pictures


class Ids:
  def __init__(self, count):
    self.count = count

  def column(self, name):
    return np.array([f"clip_{k}" for k in range(self.count)])


def test_every_clip_is_captioned_by_itself(tmp_path):
  params = captioned.params(np.random.default_rng(0), 6)
  has = {"has_video": [True, False, True, True]}
  evaluator, found, _ = evaluate(tmp_path, params, has=has)
  assert found["clips"] == 2 and found["left_out"] == 2
  with (tmp_path / "tables" / "test_captions.csv").open() as file:
    rows = list(csv.reader(file))
  assert rows[0] == ["id", "greedy", "beam", "true"]
  assert [row[0] for row in rows[1:]] == ["clip_0", "clip_3"]
  assert rows[1][3:] == TRUE[0] and rows[2][3:] == TRUE[3]
  # Clip 3 by hand, token by token.
  method, tokens = captioned.Tables(None), evaluator.tokenizer
  seen, state = method.caption_start(params, params["tokens"][3:4], 7)
  token, ids = np.array([tokens.dec]), []
  while len(ids) < captioned.LENGTH - 1 and tokens.sep not in ids:
    logits, state = method.caption_step(params, seen, state, token, len(ids))
    logits = np.array(logits[0])
    logits[[tokens.pad, tokens.unk, tokens.cls, tokens.dec]] = -np.inf
    token = logits.argmax(keepdims=True)
    ids.append(int(token[0]))
  assert rows[2][1] == tokens.decode(ids)
  assert found["beam_score"] >= found["greedy_score"] - 1e-6
  assert evaluator._step._cache_size() == 1


def test_words_in_common():
  assert captions.overlap("a bell rings", "A bell, a drum.") == 4 / 7
  assert captions.overlap("", "a") == captions.overlap("", "") == 0
  near = captions._closeness(["a bell", "a dog"], [["a bell", "x"], ["x y"]])
  assert near == 0.5
  assert captions._moved([["1"], ["2"], ["3"]]) == [["2"], ["3"], ["1"]]


def test_a_caption_that_is_right(tmp_path):
  """The next word follows from the clip and the place alone."""
  tokenizer = text.tokenizer(captioned.config().data)
  ids, _ = tokenizer.encode([texts[0] for texts in TRUE[:2]], captioned.LENGTH)

  class Knows(captioned.Tables):
    def caption_start(self, params, tokens, length):
      return tokens[:, 0, 0].astype(int), tokens[:, 0, :0]

    def caption_step(self, params, clip, state, token, position):
      wanted = params["ids"][clip, position + 1]
      place = np.arange(tokenizer.size)
      return 9.0 * (wanted[:, None] == place), state

  params = captioned.params(np.random.default_rng(0), 3)
  params["tokens"] = np.arange(3.0, dtype=np.float32)[:, None, None] % 2
  params["ids"] = ids
  batches = list(captioned.batches(TRUE[:2], size=2))
  context = captioned.context(
    captioned.config(), batches, tmp_path, method=Knows
  )
  evaluator = evaluators.make(context, captioned.section("captions"))
  made = evaluator.write(params)
  assert made.made == {s: ["a bell rings", "a dog"] for s in ("greedy", "beam")}
  assert made.ended["beam"].all()
  evaluator.built, evaluator.section.pictures = Ids(2), 0
  found = evaluator.run(params, 0)
  assert found["greedy_words"] == found["greedy_ended"] == 1
  assert found["greedy_others"] == pytest.approx(0.45)
  assert found["greedy_different"] == 1


def test_what_cannot_be_captioned_is_refused(tmp_path):
  params = captioned.params(np.random.default_rng(0), 6)
  none = {k: x for k, x in params.items() if k != "tokens"}
  with pytest.raises(InputError, match="Tables has no tokens"):
    evaluate(tmp_path, none)
  with pytest.raises(InputError, match="no clip has a caption and the moda"):
    evaluate(tmp_path, params, [[]])
  with pytest.raises(InputError, match="unknown mode of retrieval 'x'"):
    evaluate(tmp_path, params, mode="x")
  sound = captioned.config(modality="a")
  assert evaluate(tmp_path, params, config=sound)[0].mode == "a"


def test_the_picture_and_the_report(demo_data, tmp_path):
  made = runs.stage("cavmae_audioset", data__dir=demo_data)
  made.data.heads = ()
  made.data.text.update(vocabulary="av_demo", length=captioned.LENGTH)
  params = captioned.params(np.random.default_rng(0), 6)
  batches = list(captioned.batches(TRUE, size=3))
  pictures = []
  context = captioned.context(made, batches, tmp_path, pictures)
  section = captioned.section("captions", pictures=2)
  evaluators.make(context, section).run(params, 3)
  [(name, image)] = pictures
  assert name == "test_captions"
  assert 0.3 < (image == 255).all(axis=-1).mean() < 0.95
  report.write(context.workdir, made, {}, {})
  written = context.workdir.report.read_text()
  split = records.Split(made.data, "test").column("id")
  assert f"| {split[0]} | a bell rings | " in written
  assert f"| {split[3]} | a drum booms | " in written
