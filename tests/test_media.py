"""Files of every awkward sort, written by PyAV, read by `read_clip`."""

import fractions

import av
import numpy as np
import pytest

from avjax.data import media
from avjax.errors import InputError

RATE = 16_000


def picture(k, height=48, width=64):
  """Grey level 4 k (64 of them), with a red corner at the top left."""
  pixels = np.full((height, width, 3), 4 * k % 256, np.uint8)
  pixels[:16, :16] = (255, 0, 0)
  return pixels


def write_file(
  path,
  *,
  times=None,
  size=(48, 64),
  layout="mono",
  rate=RATE,
  seconds=2.0,
  video=True,
  audio=True,
  rotation=0,
  gop=12,
  aspect=1,
):
  """Writes frames at `times` (default 25/s) and a 440 Hz tone."""
  times = np.arange(0, seconds, 1 / 25) if times is None else times
  with av.open(f"file:{path}", "w", format=None) as out:
    if video:
      stream = out.add_stream("libx264", rate=25)
      stream.height, stream.width = size
      stream.pix_fmt = "yuv420p"
      stream.options = {"preset": "ultrafast", "crf": "10"}
      stream.codec_context.gop_size = gop
      stream.codec_context.time_base = fractions.Fraction(1, 1_000)
      stream.codec_context.sample_aspect_ratio = fractions.Fraction(aspect)
      if rotation:
        stream.set_display_rotation(rotation)
    if audio:
      sound = out.add_stream("aac", rate=rate, layout=layout)
    if video:
      for k, time in enumerate(times):
        frame = av.VideoFrame.from_ndarray(picture(k, *size))
        frame.pts = round(time * 1_000)
        frame.time_base = fractions.Fraction(1, 1_000)
        out.mux(stream.encode(frame))
      out.mux(stream.encode(None))
    if audio:
      channels = sound.codec_context.layout.nb_channels
      t = np.arange(round(seconds * rate)) / rate
      tone = 0.5 * np.sin(2 * np.pi * 440 * t).astype(np.float32)
      samples = np.zeros((channels, len(t)), np.float32)
      samples[0] = tone  # the other channels are silent
      frame = av.AudioFrame.from_ndarray(samples, "fltp", layout)
      frame.sample_rate, frame.pts = rate, 0
      out.mux(sound.encode(frame))
      out.mux(sound.encode(None))
  return path


def levels(frames):
  """Which `picture` each frame is."""
  return np.rint(frames[:, 20:40, 20:40].mean(axis=(1, 2, 3)) / 4).astype(int)


def test_frames_and_samples_of_a_plain_file(tmp_path):
  clip = media.read_clip(write_file(tmp_path / "-a.mp4"))
  assert clip.frames.shape == (25, 48, 64, 3)
  np.testing.assert_array_equal(levels(clip.frames), np.arange(0, 50, 2))
  assert clip.seconds == pytest.approx(2.0, abs=0.1)
  assert (clip.height, clip.width, clip.frame_rate) == (48, 64, 25)
  assert abs(len(clip.waveform) - 2 * RATE) < 0.1 * RATE
  spectrum = np.abs(np.fft.rfft(clip.waveform[:RATE].astype(float)))
  assert spectrum.argmax() == 440
  assert not clip.damaged


def test_part_of_a_file_is_the_same_as_the_cut_whole(tmp_path):
  path = write_file(tmp_path / "a.mp4", seconds=4.0, gop=10)
  whole = media.read_clip(path)
  part = media.read_clip(path, start=2.0, end=3.0)
  np.testing.assert_array_equal(levels(part.frames), np.arange(50, 75, 2) % 64)
  assert part.seconds == pytest.approx(1.0)
  assert len(part.waveform) == RATE
  cut = whole.waveform[2 * RATE : 3 * RATE].astype(int)
  assert np.abs(part.waveform - cut).max() < 300


def test_end_beyond_the_file_gives_what_there_is(tmp_path):
  path = write_file(tmp_path / "a.mp4")
  clip = media.read_clip(path, start=1.0, end=9.0)
  assert len(clip.frames) == 13
  assert clip.seconds == pytest.approx(1.0, abs=0.1)
  with pytest.raises(media.Unreadable, match="holds nothing in") as error:
    media.read_clip(path, start=5.0)
  assert error.value.reason == "too short"


def test_variable_frame_rate_takes_the_nearest_frame(tmp_path):
  times = [0.0, 0.1, 0.12, 0.5, 0.9, 1.0]
  path = write_file(tmp_path / "a.mp4", times=times, audio=False)
  clip = media.read_clip(path, end=1.0, frame_rate=10.0)
  np.testing.assert_array_equal(
    levels(clip.frames), [0, 1, 2, 2, 3, 3, 3, 3, 4, 4]
  )


@pytest.mark.parametrize(
  "rotation, corner",
  [(90, "bottom left"), (180, "bottom right"), (270, "top right")],
)
def test_rotated_picture_is_set_upright(tmp_path, rotation, corner):
  path = write_file(tmp_path / "a.mp4", rotation=rotation, audio=False)
  clip = media.read_clip(path, end=0.2)
  height, width = (48, 64) if rotation == 180 else (64, 48)
  assert clip.frames.shape[1:3] == (height, width)
  assert (clip.height, clip.width) == (height, width)
  red = clip.frames[0, :, :, 0].astype(int) - clip.frames[0, :, :, 1]
  y, x = np.argwhere(red > 150).mean(axis=0)
  assert corner.split()[0] == ("top" if y < height / 2 else "bottom")
  assert corner.split()[1] == ("left" if x < width / 2 else "right")


def test_short_side_is_reduced_never_enlarged(tmp_path):
  path = write_file(tmp_path / "a.mp4", size=(96, 128), audio=False)
  assert media.read_clip(path, short_side=48).frames.shape[1:3] == (48, 64)
  assert media.read_clip(path, short_side=500).frames.shape[1:3] == (96, 128)
  assert media.read_clip(path, short_side=0).frames.shape[1:3] == (96, 128)


@pytest.mark.parametrize("layout, share", [("stereo", 1 / 2), ("5.1", 1 / 6)])
def test_channels_are_averaged(tmp_path, layout, share):
  path = write_file(tmp_path / "a.mp4", layout=layout, rate=48_000, video=False)
  clip = media.read_clip(path)
  assert clip.frames is None
  assert clip.audio_rate == 48_000
  peak = np.abs(clip.waveform[RATE // 2 : RATE].astype(int)).max()
  assert peak == pytest.approx(0.5 * share * 32_768, rel=0.05)


def test_missing_tracks_are_none(tmp_path):
  path = write_file(tmp_path / "a.mp4", audio=False)
  clip = media.read_clip(path)
  assert clip.waveform is None
  assert clip.audio_rate == 0
  with pytest.raises(media.Unreadable, match="none of the tracks 'a'"):
    media.read_clip(path, tracks="a")


def test_one_track_may_be_left_alone(tmp_path):
  path = write_file(tmp_path / "a.mp4")
  assert media.read_clip(path, tracks="a").frames is None
  assert media.read_clip(path, tracks="v").waveform is None


def test_file_with_a_damaged_middle_keeps_its_length(tmp_path):
  path = write_file(tmp_path / "a.mkv", seconds=4.0)
  data = bytearray(path.read_bytes())
  middle = slice(len(data) * 40 // 100, len(data) * 60 // 100)
  size = middle.stop - middle.start
  data[middle] = np.random.default_rng(0).bytes(size)
  path.write_bytes(data)
  clip = media.read_clip(path)
  assert clip.damaged
  assert len(clip.frames) == 50
  assert levels(clip.frames)[-1] == 98 % 64
  assert len(clip.waveform) == pytest.approx(4 * RATE, rel=0.05)


def test_truncated_file_gives_its_beginning(tmp_path):
  path = write_file(tmp_path / "a.mkv", seconds=4.0)
  data = path.read_bytes()
  path.write_bytes(data[: len(data) // 2])
  clip = media.read_clip(path)
  assert 1.0 < clip.seconds < 3.0
  assert levels(clip.frames)[5] == 10


@pytest.mark.parametrize("data", [b"", b"no media" * 100])
def test_unreadable_file_is_named(tmp_path, data):
  path = tmp_path / "a.mp4"
  path.write_bytes(data)
  with pytest.raises(media.Unreadable, match="a.mp4 cannot be read") as error:
    media.read_clip(path)
  assert error.value.reason == "corrupt"


def test_mp4_without_its_index_is_corrupt(tmp_path):
  path = write_file(tmp_path / "a.mp4")
  path.write_bytes(path.read_bytes()[:-3_000])
  with pytest.raises(media.Unreadable, match="a.mp4"):
    media.read_clip(path)


def test_missing_file_is_named(tmp_path):
  with pytest.raises(media.Unreadable, match="b.mp4 is not a file") as error:
    media.read_clip(tmp_path / "b.mp4")
  assert error.value.reason == "missing file"


@pytest.mark.parametrize(
  "limits, words",
  [
    (media.Limits(seconds=1.0), "seconds; the limit is 1"),
    (media.Limits(pixels=100), "3072 pixels; the limit is 100"),
    (media.Limits(frames=5), "6 frames; the limit is 5"),
    (
      media.Limits(gigabytes=1e-4),
      "0.00010\\d* gigabytes; the limit is 0.0001",
    ),
  ],
)
def test_limits_are_refused_with_both_numbers(tmp_path, limits, words):
  path = write_file(tmp_path / "a.mp4")
  with pytest.raises(InputError, match=words):
    media.read_clip(path, limits=limits)
  if limits.seconds == 1.0:
    assert len(media.read_clip(path, end=0.9, limits=limits).frames) == 12


def test_size_in_square_pixels_is_limited(tmp_path):
  """A small picture may be stretched to a huge one."""
  path = write_file(tmp_path / "a.mp4", aspect=40, audio=False)
  limits = media.Limits(pixels=100_000)
  with pytest.raises(InputError, match="122880 pixels; the limit is 100000"):
    media.read_clip(path, limits=limits)
  flat = fractions.Fraction(1, 40)
  path = write_file(tmp_path / "b.mp4", aspect=flat, audio=False)
  assert media.read_clip(path).frames.shape == (25, 48, 2, 3)
  path = write_file(tmp_path / "c.mp4", aspect=2, audio=False)
  frames = media.read_clip(path, limits=limits).frames
  assert frames.shape == (25, 48, 128, 3)


def test_frames_that_stand_still_are_held_once(tmp_path):
  """A grid finer than the file repeats frames; each is stored all the same."""
  path = write_file(tmp_path / "a.mp4", times=[0.0, 1.0], audio=False)
  limits = media.Limits(gigabytes=20 * 48 * 64 * 3 / 1e9)
  words = "0.00019\\d* gigabytes; the limit is 0.00018"
  with pytest.raises(InputError, match=words):
    media.read_clip(path, frame_rate=25.0, limits=limits)


def test_end_must_follow_start(tmp_path):
  with pytest.raises(InputError, match="start 2.0 s is not before end 1.0 s"):
    media.read_clip(tmp_path / "a.mp4", start=2.0, end=1.0)
