"""Labelled data sets are built from lists in their published formats."""

import json

import numpy as np
import pytest
import tensorflow_datasets as tfds

from avjax import train
from avjax.errors import InputError
from data_prep import (
  audioset,
  ave,
  builder,
  epic_kitchens,
  tables,
  vggsound,
)
from tests import runs
from tests.published_tables import (
  EPIC,
  EPIC_HEADER,
  HEADER,
  class_table,
  encode,
  write,
)

RATE = 16_000
COUNTS = {"built": 4, "missing file": 1, "corrupt": 1}


@pytest.fixture(scope="module")
def mp4():
  """A file of 2 s."""
  return encode(2.0)


def build(kind, folder, annotations, **kwargs):
  options = builder.Options(
    media=folder / "media",
    annotations=folder / annotations,
    workers=0,
    **kwargs,
  )
  return builder.build(kind, options, data_dir=folder / "built")


def read(place, split):
  """The clips of a split by id, and the counts of its outcomes above 0."""
  source = tfds.builder_from_directory(place).as_data_source(split)
  report = json.loads((place / "report.json").read_text())["splits"][split]
  counts = {name: n for name, n in report["counts"].items() if n}
  assert sum(counts.values()) == report["rows"]
  return {clip["id"].decode(): clip for clip in source}, counts


def names(place, clip, head="label"):
  classes = tfds.builder_from_directory(place).info.metadata["classes"][head]
  return [classes[k] for k in np.atleast_1d(clip[head])]


def tiny(name, folder, split, **overrides):
  """A config of test size that reads what was built."""
  data = name.split("_")[1]
  data = {"vgg": "vggsound", "epic": "epic_kitchens"}.get(data, data)
  return runs.stage(
    name,
    data__dir=str(folder / "built"),
    data__name=data,
    data__split=split,
    batch_size=2,
    **overrides,
  )


# --- VGGSound ---

VGGSOUND = (
  "\ufeff---g-f_I2yQ,1,people marching,train\r\n"
  '-0ab_cd-efg,30,"female speech, woman speaking",train\r\n'
  "\r\n"
  "aaaaaaaaaaa,40,air horn,train\r\n"
  "bbbbbbbbbbb,50,zebra braying,train\r\n"
  "ccccccccccc,60,hail,train\r\n"
  "aaaaaaaaaaa,40,air horn,train\r\n"
  "aaaaaaaaaaa,70,thunder,train\r\n"
  "ddddddddddd,7,skiing,test\r\n"
)


@pytest.fixture(scope="module")
def vgg(tmp_path_factory, mp4):
  folder = write(
    tmp_path_factory.mktemp("vggsound"),
    {
      "vggsound.csv": VGGSOUND,
      "media/---g-f_I2yQ_000001.mp4": mp4,
      "media/train/woman/-0ab_cd-efg_30.MP4": mp4,
      "media/aaaaaaaaaaa_40_50.mp4": mp4,
      "media/aaaaaaaaaaa_000070_000080.mp4": mp4,
      "media/bbbbbbbbbbb.mp4": b"no video" * 99,
      "media/test/ddddddddddd.mp4": mp4,
    },
  )
  return folder, build(vggsound.VggSound, folder, "vggsound.csv")


def test_vggsound(vgg):
  _, place = vgg
  clips, counts = read(place, "train")
  assert {k: names(place, clip) for k, clip in clips.items()} == {
    "---g-f_I2yQ_000001": ["people marching"],
    "-0ab_cd-efg_000030": ["female speech, woman speaking"],
    "aaaaaaaaaaa_000040": ["air horn"],
    "aaaaaaaaaaa_000070": ["thunder"],
  }
  assert counts == {**COUNTS, "duplicate": 1}
  clip = clips["-0ab_cd-efg_000030"]
  assert clip["start"] == 0 and clip["end"] == pytest.approx(2.0, abs=0.1)
  assert len(clip["frames"]) == 25 and clip["has_audio"]
  clips, counts = read(place, "test")
  assert list(clips) == ["ddddddddddd_000007"] and counts == {"built": 1}
  report = json.loads((place / "report.json").read_text())
  missing = report["splits"]["train"]["missing file"][0]
  assert "ccccccccccc_000060.mp4" in missing[1]


def test_vggsound_trains(vgg, tmp_path):
  folder, _ = vgg
  config = tiny("avmae_vgg_finetune", folder, "train")
  scores = train.train_and_evaluate(runs.plain(config), tmp_path)
  assert np.isfinite(list(scores.values())).all()


def test_vggsound_lists_of_file_names(tmp_path, mp4):
  folder = write(
    tmp_path,
    {
      "lists/train.csv": "-_aaaa_bb_c_000300.mp4,hail\r\n",
      "lists/test.csv": '-bbbbbbbbbb_000007.mp4,"bee, wasp, etc. buzzing"\r\n',
      "media/-_aaaa_bb_c_000300.mp4": mp4,
      "media/-bbbbbbbbbb.webm": mp4,
    },
  )
  rows = vggsound.VggSound(
    options=builder.Options(folder / "media", folder / "lists"),
    data_dir=folder,
    config="video",
  ).rows()
  assert [(r.id, r.file, r.labels) for r in rows["train"]] == [
    ("-_aaaa_bb_c_000300", "-_aaaa_bb_c_000300.mp4", ("hail",))
  ]
  assert [(r.id, r.file, r.labels) for r in rows["test"]] == [
    ("-bbbbbbbbbb_000007", "-bbbbbbbbbb.webm", ("bee, wasp, etc. buzzing",))
  ]


def test_published_lists_of_classes():
  sounds = tables.class_list("vggsound")
  assert (
    len(sounds["names"]) == 309
    and sounds["names"][0] == "air conditioning noise"
  )
  assert sounds["names"] == sorted(sounds["names"])
  assert sorted(sounds["cavmae"]) == list(range(309))
  first, last = sounds["cavmae"][0], sounds["cavmae"][308]
  assert sounds["names"][first] == "ambulance siren"
  assert sounds["names"][last] == "air horn"
  events = tables.class_list("audioset")
  assert len(set(events["names"])) == len(set(events["mids"])) == 527
  assert (events["names"][0], events["mids"][0]) == ("Speech", "/m/09x0r")
  assert events["names"][526] == "Field recording"
  seconds = tables.class_list("ave")
  assert len(set(seconds["names"])) == 28 and "ECCV 2018" in seconds["source"]
  assert seconds["names"][0] == "Church bell"
  assert seconds["names"][27] == "Mandolin"


# --- AudioSet ---

BALANCED = (
  '--PJHxphWEs, 30.000, 40.000, "/m/09x0r,/t/dd00088"\r\n'
  '-aaaaaaaaaa, 0.000, 8.000, "/m/05zppz"\r\n'
  "bbbbbbbbbbb,20,30,/m/0jbk\r\n"
  'ccccccccccc, 10.000, 20.000, "/m/068hy"\r\n'
  'ddddddddddd, 10.000, 20.000, "/m/068hy"\r\n'
  'eeeeeeeeeee, 0.000, 10.000, "/m/068hy,/m/0jbk"\r\n'
)


@pytest.fixture(scope="module")
def events(tmp_path_factory, mp4):
  folder = write(
    tmp_path_factory.mktemp("audioset"),
    {
      "lists/balanced_train_segments.csv": "\ufeff" + HEADER + BALANCED,
      "lists/eval_segments.csv": HEADER
      + 'fffffffffff, 30.000, 40.000, "/m/06hps"\r\n',
      "lists/unbalanced_train_segments.csv": HEADER
      + '-ggggggggg_, 30.000, 40.000, "/m/06hps,/m/0dbvp"\r\n',
      "media/--PJHxphWEs_30000_40000.mp4": mp4,
      "media/-aaaaaaaaaa.mp4": mp4,
      "media/Ybbbbbbbbbbb.mkv": mp4,
      "media/ccccccccccc_10.mp4": b"",
      "media/deep/eeeeeeeeeee_000000_000010.mp4": mp4,
      "media/fffffffffff.mp4": mp4,
      "media/-ggggggggg_.mp4": mp4,
    },
  )
  return folder, build(audioset.AudioSet, folder, "lists")


def test_audioset(events):
  _, place = events
  clips, counts = read(place, "train_20k")
  assert counts == COUNTS
  assert {k: names(place, clip) for k, clip in clips.items()} == {
    "--PJHxphWEs": ["Speech", "Gush"],
    "-aaaaaaaaaa": ["Male speech, man speaking"],
    "bbbbbbbbbbb": ["Animal"],
    "eeeeeeeeeee": ["Domestic animals, pets", "Animal"],
  }
  assert list(read(place, "eval")[0]) == ["fffffffffff"]
  assert list(read(place, "train_500k")[0]) == ["-ggggggggg_"]
  clips, counts = read(place, "train_2m")
  assert "-ggggggggg_" in clips and "--PJHxphWEs" in clips
  assert counts == {**COUNTS, "built": 5}


def test_audioset_trains(events):
  config = tiny("avmae_audioset_finetune", events[0], "train_20k")
  batch, loss = runs.first_step(config)
  assert np.isfinite(loss)
  assert batch["label"].shape == (2, 527)
  assert set(batch["label"].sum(1)) <= {1, 2}


def test_audioset_choice_of_500k(tmp_path):
  segments = "aaaaaaaaaaa, 0, 10, /m/09x0r\nbbbbbbbbbbb, 0, 10, /m/0jbk\n"
  write(
    tmp_path,
    {
      "unbalanced_train_segments.csv": segments,
      "train_500k.csv": "bbbbbbbbbbb\n",
    },
  )
  files = tables.sources(tmp_path, audioset.FILES)
  read = audioset._segments(files)
  assert [e.video for e, _ in read["train_500k"]] == ["bbbbbbbbbbb"]
  assert len(read["train_2m"]) == 2
  write(tmp_path, {"train_500k.csv": "ccccccccccc\n"})
  with pytest.raises(
    InputError, match="train_500k.csv line 1: .*'ccccccccccc'"
  ):
    audioset._segments(files)


def test_selection_keeps_rare_classes():
  labels = [("common",)] * 90 + [("rare", "common")] * 6 + [("third",)] * 4
  chosen = audioset.select(labels, 20)
  assert len(set(chosen)) == 20 and chosen == sorted(chosen)
  assert chosen == audioset.select(labels, 20) != audioset.select(labels, 20, 1)
  taken = [labels[k] for k in chosen]
  assert taken.count(("rare", "common")) == 6
  assert taken.count(("third",)) == 4
  assert audioset.select(labels, 1_000) == list(range(100))


# --- AVE ---

AVE = (
  "Category&VideoID&Quality&StartTime&EndTime\r\n"
  "Church bell&-RUhOCu3LN&good&0&2\r\n"
  "Frying (food)&-RUhOCu3LN&good&1&10\r\n"
  "Male speech, man speaking&aaaaaaaaaaa&good&3&9\r\n"
  "Mandolin&bbbbbbbbbbb&good&0&0\r\n"
  "Flute&ccccccccccc&good&0&10\r\n"
  "Flute&ddddddddddd&good&0&10\r\n"
)


@pytest.fixture(scope="module")
def localisation(tmp_path_factory, mp4):
  folder = write(
    tmp_path_factory.mktemp("ave"),
    {
      "trainSet.txt": "\ufeff" + AVE,
      "valSet.txt": "Church bell&eeeeeeeeeee&good&0&10\n" * 2,
      "media/AVE/-RUhOCu3LN.mp4": mp4,
      "media/AVE/aaaaaaaaaaa.mp4": mp4,
      "media/AVE/bbbbbbbbbbb.mp4": mp4,
      "media/AVE/ccccccccccc.mp4": b"\0" * 500,
      "media/AVE/eeeeeeeeeee.mp4": mp4,
    },
  )
  return folder, build(ave.Ave, folder, ".")


def test_ave(localisation):
  _, place = localisation
  clips, counts = read(place, "train")
  assert counts == COUNTS
  found = {k: names(place, clip, "segment") for k, clip in clips.items()}
  assert found == {
    "-RUhOCu3LN": ["Church bell"] * 2 + ["background"] * 8,
    "-RUhOCu3LN:2": ["background"] + ["Frying (food)"] * 9,
    "aaaaaaaaaaa": ["background"] * 3
    + ["Male speech, man speaking"] * 6
    + ["background"],
    "bbbbbbbbbbb": ["background"] * 10,
  }
  assert list(clips["aaaaaaaaaaa"]["event"]) == [3, 9]
  assert list(clips["bbbbbbbbbbb"]["event"]) == [-1, -1]
  assert clips["bbbbbbbbbbb"]["segment"][0] == 28
  assert read(place, "validation")[1] == {"built": 1, "duplicate": 1}


def test_ave_trains(localisation):
  config = tiny("avmae_ave_finetune", localisation[0], "train")
  config.data.audio.seconds = 10.0
  config.data.video.num_frames = 20
  batch, loss = runs.first_step(config)
  assert batch["label/segment"].shape == (2, 10, 29)
  assert np.isfinite(loss)


# --- Epic Kitchens ---


@pytest.fixture(scope="module")
def kitchens(tmp_path_factory, mp4):
  folder = write(
    tmp_path_factory.mktemp("epic"),
    {
      "EPIC_100_train.csv": "\ufeff" + EPIC_HEADER + EPIC,
      "EPIC_100_validation.csv": (EPIC_HEADER + EPIC).encode("latin-1"),
      "EPIC_100_verb_classes.csv": class_table("v", 97),
      "EPIC_100_noun_classes.csv": class_table("n", 300),
      "media/P01/videos/P01_11.MP4": encode(4.0),
      "media/P02/P02_01.mp4": mp4,
      "media/P02_102.MP4": mp4,
      "media/P03_02.MP4": b"\xff" * 100,
    },
  )
  return folder, build(epic_kitchens.EpicKitchens, folder, "EPIC_100_train.csv")


def test_epic_kitchens(kitchens):
  folder, place = kitchens
  clips, counts = read(place, "train")
  assert counts == {**COUNTS, "too short": 1}
  found = {
    k: (*names(place, clip, "verb"), *names(place, clip, "noun"))
    for k, clip in clips.items()
  }
  assert found == {
    "P01_11_0": ("v0", "n2"),
    "P01_11_1": ("v1", "n299"),
    "P02_01_0": ("v96", "n0"),
    "P02_102_3": ("v3", "n0"),
  }
  clip = clips["P01_11_1"]
  assert clip["start"] == pytest.approx(1.5)
  assert clip["end"] == pytest.approx(2.7, abs=0.05)
  assert len(clip["waveform"]) == pytest.approx(1.2 * RATE, abs=200)
  assert [text.decode() for text in clip["captions"]] == ["put paper in bin"]
  assert clips["P02_102_3"]["captions"][0].decode() == "sauté"
  options = builder.Options(
    folder / "media", folder / "EPIC_100_validation.csv"
  )
  rows = epic_kitchens.EpicKitchens(
    options=options, data_dir=folder, config="video"
  ).rows()
  assert list(rows) == ["validation"]
  assert rows["validation"][4].captions == ("sauté",)
  assert rows["validation"][5].file == "P03/P03_01.MP4"  # missing


def test_epic_kitchens_trains(kitchens):
  config = tiny("avmae_epic_finetune", kitchens[0], "train")
  batch, loss = runs.first_step(config)
  assert np.isfinite(loss)
  assert batch["label/noun"].shape == (2, 300)
  assert batch["label/verb"].shape == (2, 97)


def test_pretraining_configs_train(vgg, events):
  """Both are of one shape, so one is compiled."""
  for config in (
    tiny("avmae_vgg", vgg[0], "train"),
    tiny("avmae_audioset", events[0], "train_2m"),
  ):
    batch, loss = runs.first_step(config)
    assert "label" not in batch
    assert np.isfinite(loss)
