"""Tokens, the shipped vocabulary, captions in batches, excluded clips."""

import functools
import json
import pickle

import numpy as np
import pytest
import simplejpeg
import tensorflow_datasets as tfds

from avjax import batch as batch_lib
from avjax import config, experiment
from avjax.data import (
  clip_text,
  demo_clip,
  demo_vocabulary,
  id_list,
  pipeline,
  records,
  text,
)
from avjax.errors import InputError
from data_prep import builder, decode
from tests import runs

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


def section(demo_data, **options):
  """`config.data` of small inputs with text."""
  data = config.data_section()
  data.dir, data.modality = demo_data, "v"
  data.video.update(num_frames=1, resize=16, size=16)
  data.text.update({"vocabulary": "av_demo", "length": 48, **options})
  return data


def stored_captions(data, split):
  stored = records.Split(data, split)
  return {
    stored[k].text("id"): [str(b, "utf-8") for b in stored[k].blobs("captions")]
    for k in range(len(stored))
  }


def tokens(captions, length=48):
  return text.Tokenizer("av_demo").encode(captions, length)


def test_training_batch_holds_the_clips_caption(demo_data):
  data = section(demo_data)
  captions = stored_captions(data, "train")
  stream = pipeline.train_batches(data, batch_size=8, seed=1)
  batch = next(stream)
  stream.close()
  batch_lib.check(batch)
  ids, mask = tokens([captions[name][0] for name in batch["id"]])
  np.testing.assert_array_equal(batch["text"], ids)
  np.testing.assert_array_equal(batch["text_mask"], mask)
  shapes = pipeline.batch_shapes(data, 8)
  assert shapes["text"] == ((8, 48), np.int32)
  assert {k: v.shape for k, v in batch_lib.arrays(batch).items()} == {
    k: shape for k, (shape, _) in shapes.items()
  }


def test_text_changes_nothing_else(demo_data):
  data = section(demo_data)
  data.augment.scale_jitter = (0.9, 1.2)
  data.split = "test"  # several captions: one is drawn
  found = next(pipeline.train_batches(data, batch_size=8, seed=1))
  data.text.vocabulary = ""
  without = next(pipeline.train_batches(data, batch_size=8, seed=1))
  assert set(found) - set(without) == {"text", "text_mask"}
  for key, value in without.items():
    np.testing.assert_array_equal(found[key], value)


def test_one_caption_is_drawn_a_clip_and_epoch(demo_data):
  data = section(demo_data)
  data.split, captions = "test", stored_captions(section(demo_data), "test")
  own = {name: tokens(texts)[0].tolist() for name, texts in captions.items()}
  stream = pipeline.train_batches(data, batch_size=24, seed=1)
  batches = [next(stream) for _ in range(12)]
  stream.close()
  drawn = {name: [] for name in own}
  for batch in batches:
    for name, ids in zip(batch["id"], batch["text"].tolist(), strict=True):
      drawn[name].append(own[name].index(ids))
  counts = np.bincount(np.concatenate(list(drawn.values())), minlength=5)
  assert len(counts) == 5 and counts.min() > 0.5 * counts.mean()
  assert min(len(set(numbers)) for numbers in drawn.values()) > 1
  # Neither restart, hosts nor workers change a draw.
  again = functools.partial(
    pipeline.train_batches, data, batch_size=24, seed=1, start_step=11
  )
  shares = [
    next(again(process_index=k, process_count=2))["text"] for k in range(2)
  ]
  np.testing.assert_array_equal(np.concatenate(shares), batches[11]["text"])
  data.workers = 1
  np.testing.assert_array_equal(next(again())["text"], batches[11]["text"])


def test_evaluation_holds_all_captions(demo_data):
  data = section(demo_data)
  captions = stored_captions(data, "test")
  (batch,) = pipeline.eval_batches(
    data, split="test", batch_size=24, captions=6
  )
  batch_lib.check(batch)
  assert batch["text"].shape == (24, 6, 48)
  for row, name in enumerate(batch["id"]):
    ids, mask = tokens(captions[name])
    np.testing.assert_array_equal(batch["text"][row, :5], ids)
    np.testing.assert_array_equal(batch["text_mask"][row, :5], mask)
  assert not batch["text_mask"][:, 5].any()
  assert not batch["text"][:, 5].any()
  (none,) = pipeline.eval_batches(data, split="test", batch_size=24)
  assert "text" not in none


def test_no_caption_is_lost_silently(demo_data):
  data = section(demo_data)
  with pytest.raises(InputError, match=r"has 5 captions; captions=4 of"):
    next(pipeline.eval_batches(data, split="test", batch_size=8, captions=4))
  with pytest.raises(InputError, match="captions=-1 of an evaluation"):
    pipeline.eval_batches(data, split="test", batch_size=8, captions=-1)
  data.text.vocabulary = ""
  with pytest.raises(InputError, match="data.text.vocabulary is empty"):
    pipeline.eval_batches(data, split="test", batch_size=8, captions=4)


def test_labels_become_text(demo_data):
  data = section(demo_data, source="labels")
  data.heads = ()
  (batch,) = pipeline.eval_batches(
    data, split="test", batch_size=24, captions=1
  )
  stored = records.Split(data, "test")
  names = pipeline.class_names(data)
  texts = [", ".join(names[k] for k in row) for row in stored.labels()]
  assert any(", " in one for one in texts)
  np.testing.assert_array_equal(batch["text"][:, 0], tokens(texts)[0])
  made = text.Tokenizer("av_demo").decode(batch["text"][5, 0])
  assert made == texts[5]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
  """Eight clips, of which numbers 4 to 7 of `some` have a caption."""

  class Plain(builder.ClipBuilder, skip_registration=True):
    """Clips without files."""

    name = "audioset"
    VERSION = tfds.core.Version("1.0.0")

    def classes(self):
      return {"label": ("Dog", "Siren")}

    def rows(self):
      return {
        "none": [self.row(k, ()) for k in range(8)],
        "some": [self.row(k, ("a dog",) * (k > 3)) for k in range(8)],
      }

    def row(self, k, captions):
      labels = ("Dog", "Siren")[: k % 3]
      return builder.Row(f"-{k}", f"{k}.mp4", captions=captions, labels=labels)

    def _results(self, tasks):
      picture = simplejpeg.encode_jpeg(np.zeros((16, 16, 3), np.uint8))
      for _ in tasks:
        yield decode.Encoded("", "", (picture,) * 5, seconds=0.4)

  folder = tmp_path_factory.mktemp("plain")
  builder.build(Plain, builder.Options(media=folder), data_dir=folder)
  return str(folder)


def plain_section(plain, split):
  data = section(plain)
  data.name, data.split, data.heads = "audioset", split, ()
  return data


def test_clip_without_text_has_an_empty_mask(plain):
  data = plain_section(plain, "some")
  batch = next(pipeline.train_batches(data, batch_size=8, seed=0))
  expected = [int(name[1:]) > 3 for name in batch["id"]]
  assert batch["text_mask"].any(1).tolist() == expected
  assert batch["valid"].all()
  data.text.source = "labels"
  (batch,) = pipeline.eval_batches(data, split="some", batch_size=8, captions=1)
  expected = [k % 3 > 0 for k in range(8)]
  assert batch["text_mask"].any((1, 2)).tolist() == expected


def test_missing_texts_are_told(plain):
  data = plain_section(plain, "none")
  with pytest.raises(InputError, match="no captions .*'labels' makes texts"):
    pipeline.train_batches(data, batch_size=8, seed=0)
  data.text.source = "lables"
  with pytest.raises(InputError, match="Did you mean 'labels'"):
    pipeline.train_batches(data, batch_size=8, seed=0)
  data.text.source, data.features = "captions", "somewhere"
  with pytest.raises(InputError, match="set data.text.source to 'labels'"):
    clip_text.Captions(data, records.Split(data, "none"))


def test_synthetic_batch_holds_tokens():
  """Benchmarks look ids up in a table: none may lie outside."""
  stage = runs.stage("cavmae_vgg")
  stage.data.text.vocabulary = "av_demo"
  setup = experiment.build(stage, steps_per_epoch=4)
  assert setup.batch_shapes["text"].shape[1:] == (32,)
  with stage.unlocked():
    stage.model.vocabulary = 314
  ids = np.asarray(experiment.synthetic_batch(setup)["text"])
  assert ids.min() > 0
  assert ids.max() in range(200, 314)


# ----------------------------------------------------------- excluded clips


@pytest.mark.parametrize(
  "content",
  [
    "-a_30\nb_7\n",
    "\ufeff# by hand, 2\r\n-a_30\r\n\r\nb_7\r\n",
    "video_id,label\n-a_30,dog\nb_7,cat\n",
    "audiocap_id,youtube_id,start_time,caption\n9,-a,30,x\n8,b,7,y\n",
    "# YTID, start\n-a, 30, 40\nb, 7, 17\n",
  ],
)
def test_lists_of_ids_have_many_forms(tmp_path, content):
  path = tmp_path / "ids.csv"
  path.write_bytes(content.encode())
  assert id_list.read(path) == ["-a_30", "b_7"]


def test_lists_without_ids_are_refused(tmp_path):
  path = tmp_path / "ids.csv"
  with pytest.raises(InputError, match="ids.csv cannot be read"):
    id_list.read(path)
  path.write_text("id,label\n")
  with pytest.raises(InputError, match="ids.csv holds no id"):
    id_list.read(path)


def test_ids_name_clips_and_videos():
  ids = ["v", "x_7", "w_000030", "w_000040", "u_000030", "t_000030", "s"]
  listed = ["v_30", "x_7", "w_30", "t", "q", "r_1", "u_31"]
  out, unknown = id_list.named(ids, listed)
  assert [name for name, o in zip(ids, out, strict=True) if o] == [
    "v", "x_7", "w_000030", "t_000030",
  ]  # fmt: skip
  assert unknown == 3  # q, r_1 and u_31


def test_excluded_clips_never_come(demo_data, tmp_path, caplog):
  data = section(demo_data)
  data.heads = ("label",)
  whole = records.Split(data, "train")
  ids = whole.column("id").tolist()
  gone = [*ids[::5], "nobody"]
  path = tmp_path / "exclude.txt"
  path.write_text("\n".join(gone))
  data.exclude = str(path)
  count = len(ids) - len(gone) + 1
  assert pipeline.num_examples(data) == count
  assert pipeline.steps_per_epoch(data, 8) == count // 8
  with caplog.at_level("INFO", "absl"):
    stream = pipeline.train_batches(data, batch_size=count, seed=1)
  assert (
    f"{len(gone) - 1} of the 48 clips of split 'train'" in caplog.text
    and f"1 of the {len(gone)} ids are of no clip there" in caplog.text
  )
  batch = next(stream)
  stream.close()
  assert sorted(batch["id"]) == sorted(set(ids) - set(gone))
  labels = dict(zip(ids, (row[0] for row in whole.labels()), strict=True))
  found = dict(zip(batch["id"], batch["label"].argmax(1), strict=True))
  assert found == {name: labels[name] for name in found}
  # Evaluation is of the whole split.
  assert pipeline.num_examples(data, "train") == 48


def test_columns_follow_what_is_excluded(demo_data, tmp_path):
  data = section(demo_data)
  whole = records.Split(data, "train")
  path = tmp_path / "exclude.txt"
  path.write_text("\n".join(whole.column("id")[:7]))
  part = records.Split(data, "train", exclude=str(path))
  sent = pickle.loads(pickle.dumps(part))
  for split in (part, sent):
    assert len(split) == 41
    assert split[0].text("id") == split.column("id")[0]
    for number, labels in enumerate(split.labels()):
      np.testing.assert_array_equal(labels, whole.labels_of(number + 7))
      np.testing.assert_array_equal(labels, split.labels_of(number))
  assert len(part.label_weights()) == 41
  assert len(records.Split(data, "train", 5, exclude=str(path))) == 5
  path.write_text("\n".join(whole.column("id")))
  with pytest.raises(InputError, match="48 of the 48 clips .* are left out"):
    records.Split(data, "train", exclude=str(path))


@pytest.mark.parametrize("sampling", ["balanced", "mixture"])
def test_no_order_brings_excluded_clips(demo_data, tmp_path, sampling):
  data = section(demo_data)
  ids = records.Split(data, "train").column("id").tolist()
  path = tmp_path / "exclude.txt"
  path.write_text("\n".join(ids[:40]))
  data.exclude = str(path)
  if sampling == "balanced":
    data.sampling = sampling
  else:
    data.mixture = ("av_demo:train:1", "av_demo:test:1")
  batch = next(pipeline.train_batches(data, batch_size=8, seed=1))
  assert not set(ids[:40]) & set(batch["id"])
