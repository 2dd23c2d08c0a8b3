"""Tokens, the shipped vocabulary, captions in batches, excluded clips."""

import json
import pickle

import numpy as np
import pytest

from avjax import batch as batch_lib
from avjax import config
from avjax.data import demo_clip, demo_vocabulary, text
from avjax.errors import InputError

PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "do", "##g", "bark", "##s",
          "cafe", "[", "]", "sep", "dec"]  # fmt: skip


@pytest.fixture
def vocabulary(tmp_path):
  path = tmp_path / "vocab.txt"
  path.write_text("\n".join(PIECES) + "\n")
  return str(path)


# ------------------------------------------------------------------- tokens


def test_ids_are_berts(vocabulary):
  t = text.Tokenizer(vocabulary)
  assert (t.pad, t.unk, t.cls, t.sep, t.dec, t.size) == (0, 1, 2, 3, 14, 15)
  ids, mask = t.encode(["A dog barks", "Café", "", "[SEP] x"], 7)
  expected = [
    [2, 4, 5, 6, 7, 8, 3],
    [2, 9, 3, 0, 0, 0, 0],
    [2, 3, 0, 0, 0, 0, 0],
    [2, 10, 12, 11, 1, 3, 0],  # no special token, but a word
  ]
  np.testing.assert_array_equal(ids, expected)
  assert ids.dtype == np.int32
  np.testing.assert_array_equal(mask.sum(1), [7, 3, 2, 6])
  np.testing.assert_array_equal(mask, ids != t.pad)


def test_long_text_is_cut_and_still_ends(vocabulary):
  ids, mask = text.Tokenizer(vocabulary).encode(["a dog barks"], 4)
  np.testing.assert_array_equal(ids, [[2, 4, 5, 3]])
  assert mask.all()
  with pytest.raises(InputError, match="data.text.length is 2; at least 3"):
    text.Tokenizer(vocabulary).encode(["a"], 2)


def test_ids_become_text_again(vocabulary):
  t = text.Tokenizer(vocabulary)
  ids, _ = t.encode(["A dog barks"], 12)
  assert t.decode(ids[0]) == "a dog barks"
  assert t.decode([t.dec, 4, 5, 6, t.sep, 7]) == "a dog"
  assert t.decode([t.cls, 4, t.unk]) == "a [UNK]"
  assert t.decode([]) == ""
  with pytest.raises(InputError, match=r"token 15 is not in 0..14"):
    t.decode([4, 15])


def test_case_is_kept_on_request(vocabulary):
  ids, _ = text.Tokenizer(vocabulary, lower=False).encode(["A a Café"], 5)
  np.testing.assert_array_equal(ids, [[2, 1, 4, 1, 3]])


def test_tokenizer_json_gives_the_same(vocabulary, tmp_path):
  plain = text.Tokenizer(vocabulary)
  stored = json.loads(plain._model.to_str())
  del stored["model"]["vocab"][text.DEC]
  path = tmp_path / "tokenizer.json"
  path.write_text(json.dumps(stored))
  other = text.Tokenizer(str(path))
  sent = pickle.loads(pickle.dumps(other))
  texts = ["a dog barks", "[DEC] [SEP] a", "Café zoo"]
  for t in (other, sent, pickle.loads(pickle.dumps(plain))):
    assert (t.size, t.dec) == (15, 14)
    for one, two in zip(
      t.encode(texts, 8), plain.encode(texts, 8), strict=True
    ):
      np.testing.assert_array_equal(one, two)


def test_dec_that_is_there_is_not_added(tmp_path):
  path = tmp_path / "vocab.txt"
  path.write_text("\n".join([*PIECES, text.DEC]))
  assert text.Tokenizer(str(path)).size == 15


@pytest.mark.parametrize(
  "name, content, words",
  [
    ("vocab.txt", "[PAD]\n[UNK]\na", r"has no \[CLS\], \[SEP\]"),
    ("vocab.txt", "[PAD]\n[UNK]\n[CLS]\n[SEP]\na\na", "piece 'a' twice"),
    ("tokenizer.json", "{}", "is no tokenizer.json"),
  ],
)
def test_broken_vocabulary_is_told(tmp_path, name, content, words):
  path = tmp_path / name
  path.write_text(content)
  with pytest.raises(InputError, match=words):
    text.Tokenizer(str(path))


def test_missing_vocabulary_is_told(tmp_path):
  with pytest.raises(InputError, match="Did you mean 'av_demo'"):
    text.Tokenizer("avdemo")
  with pytest.raises(InputError, match=r"vocab\.txt is not there"):
    text.Tokenizer(str(tmp_path / "vocab.txt"))


def test_model_and_tokenizer_must_agree():
  section = config.base_config()
  text.check(section)  # no text
  with pytest.raises(InputError, match="data.text.vocabulary is empty"):
    text.size(section)
  section.data.text.vocabulary = "av_demo"
  section.model.vocabulary = text.size(section)
  text.check(section)
  section.model.vocabulary = 30_523
  with pytest.raises(InputError, match="is 30523; the vocabulary 'av_demo' ha"):
    text.check(section)


# ------------------------------------------------- the vocabulary of av_demo


def test_demo_vocabulary_is_what_its_program_makes():
  stored = text.find("av_demo").read_text().splitlines()
  assert stored == demo_vocabulary.pieces()


def test_demo_captions_are_whole_words():
  t = text.Tokenizer("av_demo")
  longest = 0
  for split in demo_clip.SPLITS:
    for number in range(240):
      plan = demo_clip.plan_clip(split, number, 0)
      for caption in demo_clip._captions(plan):
        pieces = t.pieces(caption)
        longest = max(longest, len(pieces) + 2)
        assert not [p for p in pieces if p == "[UNK]" or p[:2] == "##"]
  assert 40 < longest <= 48  # a length of 48 cuts none
  names = ", ".join(demo_clip.CLASSES)
  assert not [p for p in t.pieces(names) if p == "[UNK]" or p[:2] == "##"]


def test_demo_vocabulary_spells_any_word():
  t = text.Tokenizer("av_demo")
  (ids,), _ = t.encode(["Zyzzyva (1) is an ax~!"], 32)
  assert t.unk not in ids
  assert t.decode(ids) == "zyzzyva ( 1 ) is an ax ~!"


# ------------------------------------------------------------------ batches


def test_batch_may_hold_several_captions():
  for shape in ((2, 8), (2, 5, 8)):
    batch_lib.check(
      {"text": np.zeros(shape, np.int32), "text_mask": np.zeros(shape, bool)}
    )
  with pytest.raises(InputError, match=r"'text'.*expected \[b l\]"):
    batch_lib.check({"text": np.zeros(2, np.int32)})
