"""Data sets with captions or without labels from files in their own formats.

Grey levels rise by 10 a second, so that a stored picture tells its time.
"""

import json
import wave

import numpy as np
import pytest
import simplejpeg
import tensorflow_datasets as tfds

from avjax.data import demo_clip
from avjax.errors import InputError
from data_prep import acav, audiocaps, builder, clotho, msrvtt
from tests import runs

RATE = 16_000
LONG = 20.48  # seconds; more than twice the ten of a clip


def movie(path, content):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(content)


def tone(seconds, rate=RATE):
  t = np.arange(round(seconds * rate)) / rate
  return np.rint(8_000 * np.sin(2 * np.pi * 440 * t)).astype(np.int16)


def sound(path, seconds=1.0, rate=RATE):
  path.parent.mkdir(parents=True, exist_ok=True)
  with wave.open(str(path), "wb") as out:
    out.setnchannels(1)
    out.setsampwidth(2)
    out.setframerate(rate)
    out.writeframes(tone(seconds, rate).tobytes())


def encode(seconds):
  levels = 10 * np.arange(round(25 * seconds)) // 25
  frames = np.broadcast_to(
    levels[:, None, None, None], (len(levels), 32, 32, 3)
  )
  return demo_clip.encode(frames.astype(np.uint8), tone(seconds))


@pytest.fixture(scope="module")
def short():
  """An MP4 file of one second."""
  return encode(1.0)


@pytest.fixture(scope="module")
def media(short, tmp_path_factory):
  """The media of all data sets, in a folder each."""
  root = tmp_path_factory.mktemp("media")
  long = encode(LONG)
  place = root / "audiocaps"
  movie(place / "-AAAAAAAAAA.mp4", short)
  movie(place / "BBBBBBBBBBB_130.mp4", short)
  sound(place / "wav/Y_CCCCCCCCCC.wav")
  sound(place / "YDDDDDDDDDDD_70.000_80.000.wav")
  movie(place / "EEEEEEEEEEE_0.mp4", b"no media" * 100)
  movie(place / "test/GGGGGGGGGGG.mp4", short)
  movie(place / "test/97151.mp4", short)
  movie(root / "audiocaps_whole/-AAAAAAAAAA.mp4", long)
  place = root / "clotho"
  sound(place / "development/Santa Motor.wav", rate=44_100)
  sound(place / "development/20130327_valparaiso.traffic.02.wav")
  sound(place / "development/caf\N{LATIN SMALL LETTER E WITH ACUTE} '1'.wav")
  sound(place / "development/a_b.wav", 2.0)
  sound(place / "development/-rain.mp3.wav")
  (place / "development/broken.wav").write_bytes(b"RIFF" + b"no sound" * 50)
  sound(place / "evaluation/only here.wav")
  sound(place / "evaluation/Wind.wav")
  place = root / "msrvtt"
  for number in (0, 2, 6513, 7010, 9770):
    movie(place / f"TrainValVideo/video{number}.mp4", short)
  movie(place / "TrainValVideo/video3.mp4", short[: len(short) // 2])
  place = root / "acav"
  movie(place / "shard-000000/-gI3xyMX1Ss_069.mp4", short)
  movie(place / "shard-000000/BBBBBBBBBBB_000.mp4", short)
  movie(place / "CCCCCCCCCCC.mp4", long)
  movie(place / "DDDDDDDDDDD_5.mp4", b"no media" * 100)
  return root


def make(cls, media, out, annotations=None):
  options = builder.Options(media=media, annotations=annotations, workers=0)
  return builder.build(cls, options, data_dir=out)


def clips(place, split):
  source = tfds.builder_from_directory(place).as_data_source(split)
  return {record["id"].decode(): record for record in source}


def captions(record):
  return [text.decode() for text in record["captions"]]


def first_level(record):
  return simplejpeg.decode_jpeg(record["frames"][0]).mean()


def report(place, split):
  """Outcome -> ids; every row has exactly one."""
  entry = json.loads((place / "report.json").read_text())["splits"][split]
  assert entry["rows"] == sum(entry["counts"].values())
  found = {
    "built": list(clips(place, split)) if entry["counts"]["built"] else []
  }
  for name, count in entry["counts"].items():
    if name != "built":
      ids = [e if isinstance(e, str) else e[0] for e in entry[name]]
      found |= {name: ids} if ids else {}
    assert len(found.get(name, [])) == count
  return found


def step(place, name, split, modality="av"):
  """One training step of a pretraining; its batch."""
  config = runs.stage(
    "avmae_vgg",
    f"demo,modality={modality}",
    data__dir=str(place),
    data__name=name,
    data__split=split,
    batch_size=2,
  )
  config.data.video.update(num_frames=2, resize=32, size=32)
  config.data.audio.seconds = 0.5
  batch, loss = runs.first_step(config)
  assert np.isfinite(loss)
  return batch


# --------------------------------------------------------------- AudioCaps

HEADER = "audiocap_id,youtube_id,start_time,caption\n"
TRAIN = (
  "91139,-AAAAAAAAAA,2,A woman talks nearby as water pours\n"
  '91140,BBBBBBBBBBB,130, "Wind blows, a dog barks"\n'
  "91141,_CCCCCCCCCC,30,A bell rings\n"
  "91142,DDDDDDDDDDD,70,Water runs\n"
  "91143,EEEEEEEEEEE,0,Speech\n"
  "91144,FFFFFFFFFFF,10,Speech\n"
  "91141,_CCCCCCCCCC,30,A bell rings\n"
)
# Rows of a clip are not side by side.
TEST = "".join(
  f"{97_151 + 2 * k + n},{name},{10 * n},{name[0]} caf\xe9 {k}\r\n"
  for k in range(5)
  for n, name in enumerate(["HHHHHHHHHHH", "GGGGGGGGGGG"])
)


@pytest.fixture(scope="module")
def audiocaps_tables(tmp_path_factory):
  place = tmp_path_factory.mktemp("audiocaps")
  (place / "train.csv").write_text("\ufeff" + HEADER + TRAIN)
  head = HEADER.replace("\n", "\r\n")
  (place / "test.csv").write_bytes((head + TEST).encode("latin-1"))
  return place


def test_audiocaps(media, audiocaps_tables, tmp_path):
  place = make(
    audiocaps.AudioCaps, media / "audiocaps", tmp_path, audiocaps_tables
  )
  assert report(place, "train") == {
    "built": ["-AAAAAAAAAA", "BBBBBBBBBBB", "_CCCCCCCCCC", "DDDDDDDDDDD"],
    "corrupt": ["EEEEEEEEEEE"],
    "missing file": ["FFFFFFFFFFF"],
    "duplicate": ["_CCCCCCCCCC"],  # its row is there twice, its caption once
  }
  built = clips(place, "train")
  # The files are parts, by their lengths or names: they are not cut.
  for name in ("-AAAAAAAAAA", "BBBBBBBBBBB"):
    assert built[name]["start"] == 0
    assert len(built[name]["frames"]) == 13
  assert captions(built["BBBBBBBBBBB"]) == ["Wind blows, a dog barks"]
  assert captions(built["_CCCCCCCCCC"]) == ["A bell rings"]
  assert not built["_CCCCCCCCCC"]["has_video"]
  assert built["_CCCCCCCCCC"]["waveform"].shape == (RATE,)
  tests = clips(place, "test")
  assert list(tests) == ["HHHHHHHHHHH", "GGGGGGGGGGG"]  # H is 97151.mp4
  for name, record in tests.items():
    assert captions(record) == [f"{name[0]} caf\xe9 {k}" for k in range(5)]
  found = step(tmp_path, "audiocaps", "test")
  assert sorted(found["id"]) == sorted(tests)
  assert found["has_audio"].all() and found["has_video"].all()
  assert found["frames"].shape == (2, 2, 32, 32, 3)
  assert np.abs(found["waveform"]).max() > 4_000


def test_audiocaps_whole_videos_are_cut(media, audiocaps_tables, tmp_path):
  table = audiocaps_tables / "train.csv"
  place = make(audiocaps.AudioCaps, media / "audiocaps_whole", tmp_path, table)
  assert len(report(place, "train")["missing file"]) == 5
  whole = clips(place, "train")["-AAAAAAAAAA"]
  assert (whole["start"], whole["end"]) == (2.0, 12.0)
  assert len(whole["frames"]) == 125
  assert first_level(whole) == pytest.approx(20, abs=3)
  assert whole["source_height"] == 32


def test_audiocaps_video_with_two_starts(media, tmp_path):
  text = "1,BBBBBBBBBBB,130,a\n2,BBBBBBBBBBB,7.5,b\n3,BBBBBBBBBBB,130,c\n"
  path = tmp_path / "val.csv"
  path.write_text(HEADER + text)
  options = builder.Options(media=media / "audiocaps", annotations=path)
  rows = audiocaps.AudioCaps(
    data_dir=tmp_path, config="video", options=options
  ).rows()
  assert [(r.id, r.file, r.captions) for r in rows["validation"]] == [
    ("BBBBBBBBBBB_130", "BBBBBBBBBBB_130.mp4", ("a", "c")),
    ("BBBBBBBBBBB_7.5", "BBBBBBBBBBB_7.5.mp4", ("b",)),
  ]


def test_audiocaps_rows_that_are_there_again_are_counted(media, tmp_path):
  text = "1,GGGGGGGGGGG,0,a\n2,GGGGGGGGGGG,0,a\n" + 2 * "1,GGGGGGGGGGG,0,a\n"
  (tmp_path / "val.csv").write_text(HEADER + text)
  place = make(
    audiocaps.AudioCaps, media / "audiocaps", tmp_path / "o", tmp_path
  )
  found = report(place, "validation")
  assert found == {"built": ["GGGGGGGGGGG"], "duplicate": ["GGGGGGGGGGG"] * 2}
  # Two people may say the same of a clip.
  assert captions(clips(place, "validation")["GGGGGGGGGGG"]) == ["a", "a"]


# ------------------------------------------------------------------ Clotho

NAMES = (
  "Santa Motor.wav",
  "20130327_valparaiso.traffic.02.wav",
  "caf\xe9 '1'.wav",
  "a:b.wav",
  "-rain.mp3.wav",
  "broken.wav",
  "only here.wav",
  "Santa Motor.wav",
)


def clotho_table(names):
  lines = ["file_name," + ",".join(f"caption_{k}" for k in range(1, 6))]
  for name in names:
    lines.append(f'{name},"Rain, {name[:2]}",two,three,four,five')
  return "\r\n".join(lines) + "\r\n"


def test_clotho(media, tmp_path):
  tables = tmp_path / "tables"
  tables.mkdir()
  path = tables / "clotho_captions_development.csv"
  path.write_bytes(clotho_table(NAMES).encode("latin-1"))
  path = tables / "clotho_captions_evaluation.csv"
  path.write_text("\ufeff" + clotho_table(["Wind.wav"]))
  path = tables / "clotho_metadata_development.csv"
  path.write_bytes("file_name,keywords\ncaf\xe9.wav,a;b\n".encode("latin-1"))
  place = make(clotho.Clotho, media / "clotho", tmp_path, tables)
  stems = [name[:-4] for name in NAMES]
  assert report(place, "train") == {
    "built": stems[:5],
    "corrupt": ["broken"],
    # Another split's file of that name is not taken; version 1 has two splits.
    "missing file": ["only here"],
    "duplicate": ["Santa Motor"],
  }
  built = clips(place, "train")
  assert captions(built["Santa Motor"]) == [
    "Rain, Sa", "two", "three", "four", "five",
  ]  # fmt: skip
  assert built["Santa Motor"]["waveform"].shape == (RATE,)  # from 44.1 kHz
  assert built["a:b"]["end"] == 2.0  # unpacked as a_b.wav
  assert list(clips(place, "test")) == ["Wind"]
  found = step(tmp_path, "clotho", "train", "a")
  assert found["waveform"].shape == (2, RATE // 2)


# ----------------------------------------------------------------- MSR-VTT


def videos(split, *numbers):
  """A file of MSR-VTT; the sentences are not in the videos' order."""
  return {
    "info": {"year": "2016"},
    "videos": [
      {
        "category": 9,
        "url": "https://www.youtube.com/watch?v=9lZi22qLlEo",
        "video_id": f"video{number}",
        "start time": 137.72,
        "end time": 149.44,
        "split": "validate" if number == 6513 else split,
        "id": number,
      }
      for number in numbers
    ],
    "sentences": [
      {
        "caption": f"a caf\xe9, {number} {k}",
        "video_id": f"video{number}",
        "sen_id": 20 * number + k,
      }
      for k in range(20)
      for number in reversed(numbers)
    ],
  }


def write_msrvtt(place):
  place.mkdir()
  content = json.dumps(videos("train", 0, 1, 2, 2, 3, 6513))
  (place / "train_val_videodatainfo.json").write_text("\ufeff" + content)
  content = json.dumps(videos("test", 7010, 9770), ensure_ascii=False)
  path = place / "test_videodatainfo.json"
  path.write_bytes(content.encode("latin-1"))
  (place / "MSRVTT_JSFUSION_test.csv").write_text(
    "key,vid_key,video_id,sentence\r\n"
    "ret0,msr9770,video9770,a person is connecting something to system\r\n"
    "ret1,msr9771,video9771,a little girl does gymnastics\r\n"
  )
  return place


def test_msrvtt(media, tmp_path, capsys):
  tables = write_msrvtt(tmp_path / "tables")
  place = make(msrvtt.MsrVtt, media / "msrvtt", tmp_path, tables)
  assert "1 videos of split 'validate' are left out" in capsys.readouterr().err
  assert report(place, "train") == {
    "built": ["video0", "video2"],
    "missing file": ["video1"],
    "duplicate": ["video2"],
    "corrupt": ["video3"],
  }
  assert report(place, "test") == {"built": ["video7010", "video9770"]}
  assert report(place, "test_1ka") == {
    "built": ["video9770"],
    "missing file": ["video9771"],
  }
  # Times of the JSON file belong to the video on YouTube.
  record = clips(place, "train")["video0"]
  assert (record["start"], record["end"]) == (0.0, pytest.approx(1.0, abs=0.1))
  assert captions(record) == [f"a caf\xe9, 0 {k}" for k in range(20)]
  assert len(captions(clips(place, "train")["video2"])) == 40
  assert captions(clips(place, "test_1ka")["video9770"]) == [
    "a person is connecting something to system"
  ]
  assert sorted(step(tmp_path, "msrvtt", "train")["id"]) == [
    "video0",
    "video2",
  ]


# -------------------------------------------------------------------- ACAV

CURATED = (
  'shard-000000,-gI3xyMX1Ss_069.mp4,-gI3xyMX1Ss,"[69, 79]"\n'
  'shard-000000,BBBBBBBBBBB_000.mp4,BBBBBBBBBBB,"[0.5, 10.5]"\n'
  'shard-000000,CCCCCCCCCCC_002.mp4,CCCCCCCCCCC,"[2.0, 12.0]"\n'
  'shard-000001,DDDDDDDDDDD_005.mp4,DDDDDDDDDDD,"[5, 15]"\n'
  'shard-000001,EEEEEEEEEEE_005.mp4,EEEEEEEEEEE,"[5, 15]"\n'
  'shard-000000,-gI3xyMX1Ss_069.mp4,-gI3xyMX1Ss,"[69, 79]"\n'
)
PLAIN = (
  "-gI3xyMX1Ss,69,79\n"
  "https://www.youtube.com/watch?v=BBBBBBBBBBB&t=3,0.5,10.5\n"
  "CCCCCCCCCCC, 2.0, 12.0\n"
)
LINES = "".join(
  json.dumps({"youtube_id": name, "start": start, "end": end}) + "\r\n"
  for name, start, end in [
    ("-gI3xyMX1Ss", 69, 79),
    ("youtu.be/BBBBBBBBBBB", 0.5, 10.5),
    ("CCCCCCCCCCC", "2.0", 12),
  ]
)
ACAV = {
  "output.csv": CURATED,
  "o.csv": "# SHARD_NAME,FILENAME,YOUTUBE_ID,SEGMENT\n" + CURATED,
  "p.csv": "SHARD_NAME,FILENAME,YOUTUBE_ID,SEGMENT\r\n" + CURATED,
  "a.csv": PLAIN,
  "b.csv": "\ufeffyoutube_id,start,end\n" + PLAIN,
  "c.csv": "n,end,youtube_id,start\n1,79,-gI3xyMX1Ss,69\n"
  "2,10.5,BBBBBBBBBBB,0.5\n3,12,CCCCCCCCCCC,2\n",
  "l.jsonl": LINES,
}


@pytest.mark.parametrize("name", ACAV)
def test_acav_lists(name, media, tmp_path):
  path = tmp_path / name
  path.write_text(ACAV[name])
  options = builder.Options(media=media / "acav", annotations=path)
  rows = acav.Acav(data_dir=tmp_path, config="video", options=options).rows()
  found = [(r.id, r.file, r.start, r.end) for r in rows["train"]]
  first = "shard-000000/-gI3xyMX1Ss_069.mp4"
  assert found[0] == ("-gI3xyMX1Ss_69", first, 0.0, 10.0)
  assert found[1][0] == "BBBBBBBBBBB_0.5"
  assert found[2] == ("CCCCCCCCCCC_2", "CCCCCCCCCCC.mp4", 2.0, 12.0)


def test_acav(media, tmp_path):
  (tmp_path / "output.csv").write_text(CURATED)
  place = make(acav.Acav, media / "acav", tmp_path / "data", tmp_path)
  assert report(place, "train") == {
    "built": ["-gI3xyMX1Ss_69", "BBBBBBBBBBB_0.5", "CCCCCCCCCCC_2"],
    "corrupt": ["DDDDDDDDDDD_5"],
    "missing file": ["EEEEEEEEEEE_5"],
    "duplicate": ["-gI3xyMX1Ss_69"],
  }
  whole = clips(place, "train")["CCCCCCCCCCC_2"]
  assert first_level(whole) == pytest.approx(20, abs=3)
  found = step(tmp_path / "data", "acav", "train")
  assert found["has_audio"].all() and found["has_video"].all()


# ------------------------------------------------------------ malformed input

BAD = {
  "id": (
    audiocaps.AudioCaps, "train.csv", HEADER + "1,-4e+30,30,speech\n",
    "train.csv line 2: expected a YouTube id of 11 .*found '-4e",
  ),
  "time": (
    audiocaps.AudioCaps, "test.csv", HEADER + "1,BBBBBBBBBBB,1:30,speech\n",
    "test.csv line 2: expected a number >= 0 as start_time, found '1:30'",
  ),
  "header": (
    audiocaps.AudioCaps, "val.csv", "id,caption\n1,speech\n",
    "val.csv line 1: .* audiocap_id, youtube_id, start_time, found",
  ),
  "name": (
    audiocaps.AudioCaps, "t.csv", HEADER,
    "t.csv: expected a file or folder of train.csv",
  ),
  "captions": (
    clotho.Clotho, "clotho_captions_validation.csv",
    clotho_table([]) + "a.wav,one,two,,four,five\n",
    "validation.csv line 2: expected a text as caption_3",
  ),
  "JSON": (
    msrvtt.MsrVtt, "test_videodatainfo.json", '{"videos": [\n}',
    "test_videodatainfo.json line 2: expected JSON, found",
  ),
  "key": (
    msrvtt.MsrVtt, "test_videodatainfo.json", '{"videos": [], "sentence": []}',
    "key 'sentences'. Did you mean 'sentence'",
  ),
  "video": (
    msrvtt.MsrVtt, "test_videodatainfo.json",
    '{"videos": [{"video_id": 7}], "sentences": []}',
    r"videos\[0\]: expected a text as video_id, found 7",
  ),
  "segment": (
    acav.Acav, "output.csv", 's,f.mp4,BBBBBBBBBBB,"[69]"\n',
    r"output.csv line 1: expected \[start, end\] as SEGMENT",
  ),
  "end": (
    acav.Acav, "x.csv", "BBBBBBBBBBB,20,10\n",
    "x.csv line 1: .* found 'start 20 and end 10'",
  ),
  "line": (
    acav.Acav, "x.jsonl", '{"youtube_id": "BBBBBBBBBBB", "start": 2}\n',
    "x.jsonl line 1: expected an object with youtube_id, start, end",
  ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_malformed_rows_are_named(name, tmp_path):
  cls, file, text, words = BAD[name]
  path = tmp_path / file
  path.write_text(text)
  with pytest.raises(InputError, match=words):
    make(cls, tmp_path, tmp_path / "data", path)


@pytest.mark.parametrize(
  "cls", [audiocaps.AudioCaps, clotho.Clotho, msrvtt.MsrVtt, acav.Acav]
)
def test_missing_annotations_are_named(cls, tmp_path):
  with pytest.raises(InputError, match="expected a file or folder of"):
    make(cls, tmp_path, tmp_path / "data")
