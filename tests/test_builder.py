"""A tiny data set is built from awkward files, read back, and reported."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import simplejpeg
import tensorflow_datasets as tfds
from scipy.io import wavfile

from avjax import config
from avjax.data.media import Limits
from avjax.errors import InputError
from data_prep import av_demo, builder, decode, stored
from tests.test_media import write_file

ROOT = pathlib.Path(__file__).parent.parent


class Tiny(builder.ClipBuilder, skip_registration=True):
  """A few files, every outcome among them."""

  name = "vggsound"
  VERSION = tfds.core.Version("1.0.0")

  def classes(self):
    return {
      "label": ("dog", "cat"),
      "verb": ("run",),
      "noun": ("dog",),
      "segment": ("dog", "cat", "background"),
    }

  def rows(self):
    box = (0.0, 0.25, 0.5, 1.0)
    thing = stored.Thing(0.5, "dog", box, sounding=True)
    full = builder.Row(
      "-full",
      "a.mp4",
      start=0.5,
      end=1.5,
      labels=("cat", "dog"),
      verb="run",
      noun="dog",
      segments=("background", "cat"),
      captions=("a cat", "ein Hund \N{DOG FACE}"),
      event=(0.25, 0.75),
      things=(stored.Thing(0.0, "cat", box), thing),
    )
    return {
      "train": [
        full,
        builder.Row("gone", "gone.mp4"),
        builder.Row("silent", "silent.mp4", labels=("dog",)),
        builder.Row("blind", "blind.mp4", labels=("dog",)),
        builder.Row("broken", "broken.mp4"),
        builder.Row("late", "a.mp4", start=30.0, end=31.0),
        builder.Row("short", "a.mp4", start=0.0, end=0.05),
        builder.Row("-full", "a.mp4"),
        builder.Row("damaged", "damaged.mkv"),
      ],
      "test": [builder.Row("gone too", "gone.mp4")],
    }


@pytest.fixture(scope="module")
def media(tmp_path_factory):
  folder = tmp_path_factory.mktemp("media")
  write_file(folder / "a.mp4")
  write_file(folder / "silent.mp4", audio=False)
  write_file(folder / "blind.mp4", video=False)
  (folder / "broken.mp4").write_bytes(b"no media" * 100)
  path = write_file(folder / "damaged.mkv", seconds=4.0)
  data = path.read_bytes()
  path.write_bytes(data[: len(data) * 2 // 5] + data[len(data) * 3 // 5 :])
  return folder


@pytest.fixture(scope="module")
def built(media, tmp_path_factory):
  options = builder.Options(media=media, workers=0, settings={"note": "x"})
  return builder.build(
    Tiny, options, data_dir=tmp_path_factory.mktemp("data") / "-out"
  )


def read(folder):
  source = tfds.builder_from_directory(folder).as_data_source("train")
  return {record["id"].decode(): record for record in source}


def test_every_row_has_one_outcome(built):
  report = json.loads((built / "report.json").read_text())
  train = report["splits"]["train"]
  assert train["rows"] == 9
  assert train["counts"] == {
    "built": 4,
    "missing file": 1,
    "no audio": 0,
    "no video": 0,
    "corrupt": 1,
    "too short": 2,
    "duplicate": 1,
  }
  assert train["duplicate"] == ["-full"]
  assert [name for name, _ in train["too short"]] == ["late", "short"]
  assert train["missing file"][0][0] == "gone"
  assert "broken.mp4 cannot be read" in train["corrupt"][0][1]
  assert train["built without sound"] == ["silent"]
  assert train["built without pictures"] == ["blind"]
  assert [name for name, _ in train["built though damaged"]] == ["damaged"]
  assert report["splits"]["test"]["counts"]["missing file"] == 1


def test_clip_is_read_back_by_tfds_alone(built):
  info = tfds.builder_from_directory(built).info
  assert list(info.splits) == ["train"]  # nothing of `test` could be built
  assert info.metadata["classes"]["segment"] == ["dog", "cat", "background"]
  assert info.metadata["settings"] == {"note": "x"}
  clips = read(built)
  assert list(clips) == ["-full", "silent", "blind", "damaged"]
  clip = clips["-full"]
  assert len(clip["frames"]) == 13  # 0.96 s is the last of 12.5 a second
  assert simplejpeg.decode_jpeg(clip["frames"][3]).shape == (48, 64, 3)
  assert clip["frame_rate"] == 12.5
  assert clip["waveform"].shape == (16_000,)
  assert clip["waveform"].dtype == np.int16
  assert list(clip["label"]) == [1, 0]
  assert (clip["verb"], clip["noun"]) == (0, 0)
  assert list(clip["segment"]) == [2, 1]
  assert [c.decode() for c in clip["captions"]] == [
    "a cat",
    "ein Hund \N{DOG FACE}",
  ]
  assert (clip["start"], clip["end"]) == (0.5, 1.5)
  np.testing.assert_allclose(clip["event"], [0.25, 0.75])
  assert (clip["source_height"], clip["source_width"]) == (48, 64)


def test_objects_belong_to_the_nearest_stored_frame(built):
  objects = read(built)["-full"]["objects"]
  assert list(objects["frame"]) == list(range(13))
  # Times 0 and 0.5 s: the border lies at 0.25 s, between frames 3 and 4.
  names = [name.decode() for name in objects["name"]]
  assert names == ["cat"] * 4 + ["dog"] * 9
  assert list(objects["sounding"]) == [False] * 4 + [True] * 9
  np.testing.assert_allclose(objects["box"][0], [0.0, 0.25, 0.5, 1.0])


def test_missing_tracks_and_labels_are_stated(built):
  clips = read(built)
  assert not clips["silent"]["has_audio"] and clips["silent"]["has_video"]
  assert len(clips["silent"]["waveform"]) == 0
  assert clips["blind"]["has_audio"] and not clips["blind"]["has_video"]
  assert len(clips["blind"]["frames"]) == 0
  assert (clips["blind"]["verb"], clips["blind"]["noun"]) == (-1, -1)
  assert list(clips["damaged"]["label"]) == []
  np.testing.assert_array_equal(clips["blind"]["event"], [-1, -1])


def test_clips_may_be_refused_and_workers_change_nothing(
  built, media, tmp_path, monkeypatch
):
  encode_all = decode.encode_all

  def two_workers(tasks, workers):
    del workers
    return encode_all(tasks, workers=2)

  monkeypatch.setattr(decode, "encode_all", two_workers)
  refuse = ("no audio", "no video", "damaged")
  folder = builder.build(
    Tiny, builder.Options(media=media, refuse=refuse), data_dir=tmp_path
  )
  counts = json.loads((folder / "report.json").read_text())["splits"]["train"][
    "counts"
  ]
  assert counts["built"] == 1
  assert (counts["no audio"], counts["no video"]) == (1, 1)
  assert counts["corrupt"] == 2
  one, other = read(built)["-full"], read(folder)["-full"]
  assert one["frames"] == other["frames"]
  np.testing.assert_array_equal(one["waveform"], other["waveform"])


def test_crashed_worker_costs_one_clip(media, monkeypatch):
  task = decode.Task(str(media / "a.mp4"), end=0.2)
  device = decode.Task("/dev/stdin", end=0.2)
  start = decode._Pool._start
  crashes = iter([True, False])

  def unlucky(pool):
    process = start(pool)
    if next(crashes):
      process.kill()
    return process

  monkeypatch.setattr(decode._Pool, "_start", unlucky)
  first, second, third = decode.encode_all([task, task, device], workers=1)
  assert first.problem == "corrupt"
  assert "crashed" in first.message
  assert second.problem == ""
  assert len(second.frames) == 3
  assert third.problem == "missing file"


def test_frames10_are_spread_over_the_clip(media):
  task = decode.Task(
    str(media / "a.mp4"), variant="frames10", short_side=24, audio_rate=8_000
  )
  result = decode.encode(task)
  assert len(result.frames) == 10
  assert result.frame_rate == pytest.approx(5.0)
  assert simplejpeg.decode_jpeg(result.frames[0]).shape == (24, 32, 3)


@pytest.mark.parametrize(
  "row, words",
  [
    (builder.Row("x", "../a.mp4"), "'x': '../a.mp4' is not inside"),
    (builder.Row("x", "/etc/hosts"), "is not inside"),
    (builder.Row("x", "a.mp4", labels=("dgo",)), "of clip 'x' 'dgo'.*'dog'"),
    (builder.Row("x", "gone.mp4"), "no clip .* 1 missing file"),
  ],
)
def test_bad_rows_are_named_and_leave_nothing(media, tmp_path, row, words):
  class One(Tiny, skip_registration=True):
    """One row."""

    def rows(self):
      return {"train": [row]}

  with pytest.raises(InputError, match=words):
    builder.build(One, builder.Options(media=media), data_dir=tmp_path)
  assert list(tmp_path.iterdir()) == []


def test_built_set_is_not_replaced_by_accident(built, media):
  options = builder.Options(media=media)
  with pytest.raises(
    InputError, match="exists, built with other options.*note.*pass --overwrite"
  ):
    builder.build(Tiny, options, data_dir=built.parents[2])


def test_limits_say_which_clip_and_both_numbers(media, tmp_path):
  limits = Limits(seconds=0.3)
  with pytest.raises(
    InputError, match=r"no clip .*'-full': .*a.mp4: 0.\d+ seconds; .* is 0.3"
  ):
    builder.build(
      Tiny, builder.Options(media=media, limits=limits), data_dir=tmp_path
    )


@pytest.mark.parametrize(
  "option, words",
  [
    ({"quality": 101}, "quality=101 is not in 1..100"),
    ({"short_side": 0}, "short_side=0 is not in"),
    ({"channels": "frist"}, "Did you mean 'first'"),
  ],
)
def test_options_out_of_range(media, option, words):
  with pytest.raises(InputError, match=words):
    builder.Options(media=media, **option)


def test_first_channel_and_frame_rate(tmp_path):
  rate = 16_000
  left = (6_000 * np.sin(np.arange(rate) * 0.2)).astype(np.int16)
  stereo = np.stack([left, np.zeros_like(left)], axis=1)
  wavfile.write(tmp_path / "a.wav", rate, stereo)
  task = decode.Task(str(tmp_path / "a.wav"))
  first = decode.encode(dataclasses.replace(task, channels="first")).waveform
  mean = decode.encode(task).waveform
  np.testing.assert_array_equal(first, left)
  np.testing.assert_allclose(mean, left / 2, atol=1)


def test_frames_are_stored_at_the_asked_rate(media):
  task = decode.Task(str(media / "a.mp4"), end=1.0, frame_rate=5.0)
  result = decode.encode(task)
  assert (len(result.frames), result.frame_rate) == (5, 5.0)


def test_unknown_reason_to_refuse(media):
  with pytest.raises(InputError, match="Did you mean 'damaged'"):
    builder.Options(media=media, refuse=("damage",))


def test_demo_sizes_are_kept_apart(demo_data):
  section = config.data_section()
  section.dir = demo_data
  section.demo.update(clips_per_class=2, test_per_class=1, seed=3)
  assert str(av_demo.ensure_demo(section)) == demo_data
  classes = tfds.builder_from_directory(
    pathlib.Path(demo_data) / "av_demo/video/1.0.0"
  ).info.metadata["classes"]
  assert len(classes["label"]) == 24
  assert classes["segment"][-1] == "background"
  assert av_demo.example_media(demo_data).suffix == ".mp4"


def test_command_builds_from_media_without_tensorflow(tmp_path, demo_data):
  media = next(pathlib.Path(demo_data).glob("files_*"))
  code = (
    "import sys; from data_prep import build; from absl import app\n"
    "def main(argv):\n  build.run(argv)\n"
    "  assert not {'tensorflow', 'torch', 'jax'} & set(sys.modules)\n"
    "app.run(main)"
  )
  command = [sys.executable, "-c", code, "--dataset=av_demo"]
  done = subprocess.run(
    [
      *command,
      f"--media={media}",
      f"--annotations={media / 'annotations.jsonl'}",
      f"--data_dir={tmp_path}",
      "--workers=1",
    ],
    capture_output=True,
    text=True,
    env={**os.environ, "PYTHONPATH": str(ROOT)},
    check=False,
  )
  assert done.returncode == 0, done.stderr
  assert done.stdout.strip() == str(tmp_path / "av_demo/video/1.0.0")
  assert "72 built" in done.stderr


def test_command_refuses_an_unknown_data_set():
  done = subprocess.run(
    [sys.executable, "-m", "data_prep.build", "--dataset=av_dmo"],
    capture_output=True,
    text=True,
    cwd=ROOT,
    check=False,
  )
  assert done.returncode == 2
  assert "Did you mean 'av_demo'" in done.stderr
  assert "Traceback" not in done.stderr
