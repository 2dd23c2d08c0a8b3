"""python -m data_prep.features: files that are taken, features it makes."""

import types

import jax
import numpy as np
import pytest
import simplejpeg

from avjax.data import audio, records
from avjax.data.features import Features
from avjax.errors import InputError
from avjax.nn import convnext
from avjax.weights import formats
from data_prep import feature_nets, features, stats
from tests import public_weights


@pytest.fixture
def arguments(tmp_path):
  """Flags of the command, some of them replaced."""

  def make(**change):
    values = {
      "output": str(tmp_path / "out"), "dataset": None, "split": None,
      "data_dir": "", "variant": "video", "audio_model": "",
      "video_model": "", "import_audio": "", "import_video": "",
      "made_by": "the authors", "tokens": 30, "dtype": "float16",
      "audio_batch": 4, "video_batch": 9, "threads": 1, "limit": 0,
      "retry": False,
    }  # fmt: skip
    assert set(change) <= set(values)
    return types.SimpleNamespace(**{**values, **change})

  return make


def table(lines):
  return {line[:22].strip(): line[22:].split() for line in lines}


# --- Published files ----------------------------------------------------------


@pytest.fixture
def files(tmp_path):
  """A folder as it is published, with what may be wrong in one."""
  folder = tmp_path / "files"
  folder.mkdir()
  rng = np.random.default_rng(0)
  good = {
    "-a_000010": rng.standard_normal((2, 3)).astype(np.float32),
    "b_000030": rng.standard_normal((31, 3)).astype(np.float16),
  }
  bad = {
    "flat_000000": np.zeros(3, np.float32),
    "huge_000000": np.full((2, 3), 1e6, np.float32),
    "nan_000000": np.full((2, 3), np.nan, np.float32),
    "none_000000": np.zeros((0, 3), np.float32),
    "number_000000": np.zeros((2, 3), np.int32),
    "pickle_000000": np.array([[{}]], object),
    "wide_000000": np.zeros((2, 4), np.float32),
  }
  for name, array in (good | bad).items():
    np.save(folder / f"{name}.npy", array)
  (folder / "empty_000000.npy").write_bytes(b"")
  whole = (folder / "b_000030.npy").read_bytes()
  (folder / "cut_000000.npy").write_bytes(whole[:-1])
  (folder / "readme.txt").write_text("no features")
  return folder, good


def test_published_files_are_taken_and_bad_ones_listed(files, arguments):
  folder, good = files
  lines = features.run(arguments(import_audio=str(folder)))
  found = Features(lines[-1], "audio")
  assert found.values.shape == (11, 30, 3)
  assert found.values.dtype == np.float16
  assert found.source["model"] == "the authors"
  (first, second) = found.rows(list(good))
  a, b = good.values()
  np.testing.assert_array_equal(found.values[first, :2], a.astype(np.float16))
  np.testing.assert_array_equal(found.values[second], b[:30])
  assert found.lengths[[first, second]].tolist() == [2, 30]
  words = {
    "flat": r"shape (3,); expected [n, 3]", "huge": "not finite",
    "nan": "not finite", "none": "(0, 3)", "number": "int32",
    "pickle": "object", "wide": "(2, 4); expected [n, 3]", "empty": "",
    "cut": "",
  }  # fmt: skip
  assert len(found.failed) == len(words)
  for name, text in words.items():
    assert text in found.failed[f"{name}_000000"]
  report = table(lines)
  assert report["stored"] == ["2"] and report["failed"] == ["9"]
  assert any("4 more in audio.json" in line for line in lines)


def test_import_goes_on_with_new_files_and_retries(files, arguments, tmp_path):
  folder, good = files
  features.run(arguments(import_video=str(folder), dtype="float32"))
  np.save(folder / "wide_000000.npy", np.ones((1, 3), np.float32))
  np.save(folder / "zz_000000.npy", np.ones((1, 3), np.float32))
  values = arguments(import_video=str(folder), dtype="float32")
  report = table(features.run(values))
  assert report["done before"] == ["11"] and report["stored"] == ["4"]
  values.retry = True
  assert table(features.run(values))["stored"] == ["5"]
  found = Features(values.output, "video")
  row = found.rows(["-a_000010"])[0]
  np.testing.assert_array_equal(found.values[row, :2], good["-a_000010"])
  with pytest.raises(InputError, match="other form .*dtype: 'float32' there"):
    features.run(arguments(import_video=str(folder)))


def test_wrong_flags_are_refused(files, arguments, tmp_path):
  folder = str(files[0])
  empty = tmp_path / "empty"
  empty.mkdir()
  (empty / "x.npy").write_bytes(b"no array")
  for change, words in (
    ({}, "give --dataset and --split, or --import_audio"),
    ({"dataset": "av_demo", "import_audio": folder}, "give --dataset"),
    ({"dataset": "av_demo"}, "name --audio_model and --video_model"),
    (
      {"dataset": "av_demo", "audio_model": "none", "video_model": "none"},
      "one of the two may be none",
    ),
    (
      {"dataset": "av_demo", "audio_model": "x", "video_model": "y"},
      "needs --split",
    ),
    ({"import_audio": str(tmp_path / "gone")}, "gone"),
    ({"import_audio": str(empty)}, "none of 1 files .*holds features: "),
  ):
    with pytest.raises(InputError, match=words):
      features.run(arguments(**change))


# --- Networks -----------------------------------------------------------------


def test_three_frames_a_second_are_those_of_ffmpeg():
  numbers = feature_nets.spaced(125, 12.5, 30)
  assert len(numbers) == 30
  assert numbers[:5] == [2, 6, 10, 14, 18] and numbers[-1] == 122
  at_25 = feature_nets.spaced(250, 25.0, 30)
  assert at_25[:5] == [4, 12, 20, 29, 37] and at_25[-1] == 245
  assert feature_nets.spaced(10, 1.0, 30) == [k // 3 for k in range(30)]
  assert feature_nets.spaced(250, 12.5, 30) == numbers  # 20 s: the first 10
  assert len(feature_nets.spaced(25, 12.5, 30)) == 6
  assert feature_nets.spaced(1, 12.5, 30) == [0]
  assert feature_nets.spaced(0, 12.5, 30) == []


def test_the_short_side_is_scaled():
  tall = np.zeros((455, 256, 3), np.uint8)
  assert feature_nets.resized(tall).shape == (398, 224, 3)
  whole = np.zeros((224, 398, 3), np.uint8)
  assert feature_nets.resized(whole) is whole


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
  """Files of two tiny ConvNeXts under their public names, and parameters."""
  folder = tmp_path_factory.mktemp("weights")
  made = {}
  for kind, channels, classes in (("video", 3, 5), ("audio", 1, 309)):
    state, params = public_weights.convnext(channels, classes)
    formats.write(folder / f"{kind}.npz", state)
    made[kind] = str(folder / f"{kind}.npz"), params
  return made


def test_features_of_a_built_split(demo_data, weights, arguments):
  values = arguments(
    dataset="av_demo",
    split=["train"],
    data_dir=demo_data,
    audio_model=weights["audio"][0],
    video_model=weights["video"][0],
    limit=4,
    dtype="float32",
  )
  lines = features.run(values)
  assert table(lines)["stored"] == ["4", "4"]
  _, split = stats.open_split("av_demo", "train", data_dir=demo_data)
  record = split[1]
  heard, seen = (Features(lines[-1], m) for m in ("audio", "video"))
  assert heard.clips[1] == record.text("id")
  expected = seen_by_hand(record, weights["video"][1])
  assert seen.lengths[1] == len(expected)
  np.testing.assert_allclose(
    seen.values[1, : len(expected)], expected, atol=1e-4, rtol=1e-4
  )
  assert heard.lengths[1] == 30
  expected = heard_by_hand(record, weights["audio"][1])
  np.testing.assert_allclose(heard.values[1], expected, atol=1e-4, rtol=1e-4)
  assert heard.source["frames"] == 990 and heard.source["mean"] == -5.081
  assert seen.source["weights"] == "video.npz"
  before = heard.values.copy()
  again = features.run(values)
  assert table(again)["done before"] == ["4", "4"]
  np.testing.assert_array_equal(Features(lines[-1], "audio").values, before)
  values.video_model = weights["audio"][0]
  with pytest.raises(InputError, match="hears sound; one that sees pictures"):
    features.run(values)


def seen_by_hand(record, params):
  frames = record.blobs("frames")
  rate = record.floats("frame_rate")[0]
  count = round(len(frames) / rate * 3)
  rounded = np.floor(np.arange(len(frames)) / rate * 3 + 0.5)
  numbers = [np.flatnonzero(rounded <= k)[-1] for k in range(count)]
  pictures = np.stack(
    [
      feature_nets.resized(simplejpeg.decode_jpeg(frames[k], "RGB"))
      for k in numbers
    ]
  )
  values = (pictures / 255 - feature_nets.MEAN) / feature_nets.STD
  return jax.jit(convnext.features)(params, values.astype(np.float32))


def heard_by_hand(record, params):
  wave = np.frombuffer(record.blobs("waveform")[0], np.int16) / 32_768
  config = stats.config.data_section()
  config.fbank.update(window="hanning", edges="snip")
  wave = (wave - wave.mean()).astype(np.float32)
  raw = audio.fbank(wave, config.fbank, 16_000, np)[:990]
  padded = np.zeros((990, 128), np.float32)
  padded[: len(raw)] = raw
  normalised = (padded + 5.081) / 4.4849
  return jax.jit(convnext.features)(params, normalised[None])[0]


def test_damaged_clips_are_listed(
  demo_data, weights, arguments, monkeypatch, tmp_path
):
  whole = records.Split.__getitem__

  def damaged(split, number):
    if number == 0:
      raise ValueError("a record ends too early")
    return whole(split, number)

  monkeypatch.setattr(records.Split, "__getitem__", damaged)
  lines = features.run(
    arguments(
      dataset="av_demo",
      split=["train", "test"],
      data_dir=demo_data,
      variant="frames10",
      audio_model="none",
      video_model=weights["video"][0],
      limit=2,
    )
  )
  report = table(lines)
  assert report["stored"] == ["2"] and report["failed"] == ["2"]
  found = Features(lines[-1], "video")
  assert set(found.failed.values()) == {"a record ends too early"}
