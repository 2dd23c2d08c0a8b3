"""Order, windows, crops, padding, sharding, resumption, broken records."""

import itertools
import pathlib
import threading

import jax
import numpy as np
import pytest
import simplejpeg
import tensorflow_datasets as tfds

from avjax import batch as batch_lib
from avjax import config
from avjax.data import batches as batches_lib
from avjax.data import example, pipeline, records, sampling
from avjax.errors import InputError
from data_prep import av_demo, builder, decode

# ------------------------------------------------------------------ sampling


def rng():
  return np.random.default_rng(0)


@pytest.mark.parametrize(
  "length, span, views, expected",
  [
    # The public code's figures: 16 frames at stride 4 of 250; 8 s of 10 s.
    (250, 64, 4, [0, 62, 124, 186]),
    (1_000, 800, 4, [0, 66, 133, 200]),
    (250, 64, 1, [93]),
    (10, 64, 3, [0, 0, 0]),
  ],
)
def test_views_are_spread_and_one_view_is_the_centre(
  length, span, views, expected
):
  assert sampling.starts(length, span, views, None) == expected


def test_training_reaches_every_start():
  draws = rng()
  found = {sampling.video_starts(40, 16, 2.0, 1, draws)[0] for _ in range(300)}
  assert found == set(range(10))  # 31 frames are spanned: 0..9


def test_short_clip_starts_again():
  numbers = sampling.frame_numbers(2, 6, 2.0, 7)
  np.testing.assert_array_equal(numbers, [2, 4, 6, 1, 3, 5])


def test_stride_counts_at_its_own_rate():
  video = config.data_section().video
  assert sampling.frame_step(video, "video", 12.5) == 2.0
  assert sampling.frame_step(video, "frames10", 1.0) == 4.0
  video.stride = 1
  with pytest.raises(
    InputError, match="25 frames/s; the stored clips have 12.5"
  ):
    sampling.frame_step(video, "video", 12.5)


def test_sound_starts_with_the_frames_as_asked():
  start = sampling.audio_start
  assert start("aligned", 1_000, 400, 300, rng()) == 300
  assert start("aligned", 1_000, 400, 900, rng()) == 600
  assert start("aligned", 300, 400, 200, rng()) == 0
  assert start("wrap", 1_000, 400, 900, rng()) == 900
  drawn = {start("independent", 6, 4, 5, np.random.default_rng(k))
           for k in range(20)}  # fmt: skip
  assert drawn == {0, 1, 2}
  alone = {start("wrap", 6, 4, None, np.random.default_rng(k))
           for k in range(20)}  # fmt: skip
  assert alone == {0, 1, 2}
  with pytest.raises(InputError, match="Did you mean 'aligned'"):
    start("alinged", 6, 4, 0, rng())


def test_sound_is_padded_or_goes_on_at_its_beginning():
  wave, out = np.arange(1, 6, dtype=np.int16), np.full(4, 9, np.int16)
  sampling.cut(wave, 3, out)
  np.testing.assert_array_equal(out, [4, 5, 0, 0])
  sampling.cut(wave, 3, out, wrap=True)
  np.testing.assert_array_equal(out, [4, 5, 1, 2])


def test_crop_boxes():
  box = sampling.crop_box
  assert box(100, 200, resize=100, size=80) == sampling.Crop(10, 90, 60, 140)
  # The short side is scaled to 200: 80 of these are 40 stored pixels.
  assert box(100, 200, resize=200, size=80) == sampling.Crop(30, 70, 80, 120)
  assert box(50, 50, resize=0, size=80) == sampling.Crop(0, 50, 0, 50)
  draws = rng()
  tops = {
    box(100, 200, resize=100, size=80, random=True, rng=draws).top
    for _ in range(500)
  }
  assert tops == set(range(21))
  boxes = [
    box(100, 100, resize=100, size=50, jitter=(0.8, 1.25), rng=draws)
    for _ in range(200)
  ]
  heights = {b.bottom - b.top for b in boxes}
  widths = {b.right - b.left for b in boxes}
  assert min(heights) == min(widths) == 40
  assert max(heights | widths) in (62, 63)
  assert any(b.bottom - b.top != b.right - b.left for b in boxes)


# ---------------------------------------------------------------- data sets


@pytest.fixture
def data(demo_data):
  section = config.data_section()
  section.dir, section.heads = demo_data, ("label", "verb", "noun", "segment")
  section.video.update(num_frames=4, resize=112, size=96)
  section.audio.seconds = 2.5
  return section


def equal(one, other):
  assert one.keys() == other.keys()
  for key, value in one.items():
    np.testing.assert_array_equal(value, other[key], err_msg=key)


def take(batches, count):
  taken = list(itertools.islice(batches, count))
  batches.close()
  return taken


def test_batch_keeps_the_contract(data):
  (batch,) = take(pipeline.train_batches(data, batch_size=8, seed=1), 1)
  batch_lib.check(batch)
  shapes = pipeline.batch_shapes(data, 8)
  assert {
    k: (v.shape, v.dtype) for k, v in batch_lib.arrays(batch).items()
  } == {k: (shape, np.dtype(dtype)) for k, (shape, dtype) in shapes.items()}
  assert batch["label/segment"].shape == (8, 3, 25)
  np.testing.assert_array_equal(batch["label"].sum(-1), 1)
  np.testing.assert_array_equal(batch["label/segment"].sum(-1), 1)
  assert batch["has_audio"].all() and batch["has_video"].all()
  np.testing.assert_array_equal(batch["index"], np.arange(8))


def test_every_clip_comes_once_an_epoch_in_a_new_order(data):
  batches = take(pipeline.train_batches(data, batch_size=16, seed=1), 6)
  ids = [name for batch in batches for name in batch["id"]]
  assert len(set(ids[:48])) == len(set(ids[48:])) == 48
  assert ids[:48] != ids[48:]
  assert ids[:48] != sorted(ids[:48])


def test_threads_and_a_restart_change_nothing(data):
  data.augment.scale_jitter = (0.9, 1.2)
  straight = take(pipeline.train_batches(data, batch_size=8, seed=1), 3)
  data.threads = 1
  (last,) = take(
    pipeline.train_batches(data, batch_size=8, seed=1, start_step=2), 1
  )
  equal(straight[2], last)
  (other,) = take(pipeline.train_batches(data, batch_size=8, seed=2), 1)
  assert other["id"] != straight[0]["id"]


def test_worker_processes_change_nothing(data, demo_data):
  del demo_data
  straight = take(pipeline.train_batches(data, batch_size=8, seed=1), 4)
  data.workers = 2
  workers = take(
    pipeline.train_batches(data, batch_size=8, seed=1, start_step=1), 3
  )
  for one, other in zip(straight[1:], workers, strict=True):
    equal(one, other)


def test_shares_of_two_hosts_make_the_global_batch(data):
  (whole,) = take(pipeline.train_batches(data, batch_size=8, seed=1), 1)
  shares = [
    take(
      pipeline.train_batches(
        data, batch_size=8, seed=1, process_index=k, process_count=2
      ),
      1,
    )[0]
    for k in range(2)
  ]
  for key, value in batch_lib.arrays(whole).items():
    joined = np.concatenate([share[key] for share in shares])
    np.testing.assert_array_equal(joined, value, err_msg=key)
  assert shares[0]["id"] + shares[1]["id"] == whole["id"]


def test_evaluation_is_in_order_and_padded(data):
  batches = list(pipeline.eval_batches(data, split="test", batch_size=10))
  assert len(batches) == 3
  ids = [name for batch in batches for name in batch["id"]]
  valid = np.concatenate([batch["valid"] for batch in batches])
  assert valid.tolist() == [True] * 24 + [False] * 6
  assert ids[:24] == [f"test_{k:05d}" if k != 7 else "-test_00007"
                      for k in range(24)]  # fmt: skip
  assert set(ids[24:]) == {"test_00023"}
  index = np.concatenate([batch["index"] for batch in batches])
  np.testing.assert_array_equal(index, np.arange(30))
  (few,) = pipeline.eval_batches(data, split="test", batch_size=4, limit=3)
  assert few["valid"].tolist() == [True, True, True, False]


def test_views_have_a_dimension_of_their_own(data):
  data.audio.seconds = 1.0
  (many,) = pipeline.eval_batches(
    data, split="test", batch_size=2, limit=2, views=3
  )
  batch_lib.check(many)
  assert many["frames"].shape == (2, 3, 4, 96, 96, 3)
  assert many["waveform"].shape == (2, 3, 16_000)
  record = records.Split(data, "test")[0]
  wave = np.frombuffer(record.blobs("waveform")[0], np.int16)
  start = (len(wave) - 16_000) // 2
  np.testing.assert_array_equal(
    many["waveform"][0, 1], wave[start : start + 16_000]
  )
  # 38 frames, windows of 4 x 2: starts 0, 15, 30, cropped at the centre.
  pictures = [
    simplejpeg.decode_jpeg(f, fastdct=True, fastupsample=True)
    for f in record.blobs("frames")
  ]
  for view, first in enumerate((0, 15, 30)):
    for k in range(4):
      expected = pictures[first + 2 * k][8:104, 8:104]
      np.testing.assert_array_equal(many["frames"][0, view, k], expected)


@pytest.mark.parametrize("modality, gone", [("a", "frames"), ("v", "waveform")])
def test_one_modality_is_read_alone(data, modality, gone):
  data.modality = modality
  (batch,) = pipeline.eval_batches(data, split="test", batch_size=2, limit=2)
  assert gone not in batch
  assert batch["has_audio"].all() == (modality == "a")
  assert batch["has_video"].all() == (modality == "v")


def test_labels_are_the_records_own(data):
  data.multilabel = True
  (batch,) = pipeline.eval_batches(data, split="test", batch_size=24)
  record = records.Split(data, "test")[5]
  assert set(np.flatnonzero(batch["label"][5])) == set(record.integers("label"))
  assert batch["label"].sum() > 24  # some clips have several
  assert batch["label/verb"][5].argmax() == record.integers("verb")[0]
  assert batch["label/segment"][5].argmax(-1).tolist() == record.integers(
    "segment"
  )


def test_balanced_draws_follow_the_weights(data):
  weights = records.Split(data, "train").label_weights()
  column = records.Split(data, "train").column
  counts = np.bincount(column("label"))
  first = column("label")[: column("label_ends")[0]]
  assert weights[0] == pytest.approx(
    sum(1000 / (counts[k] + 0.01) for k in first)
  )
  data.sampling = "balanced"
  batches = batches_lib.Batches(data, "train", batch_size=8, seed=1)
  draws = [batches._number(position, 0) for position in range(5_000)]
  drawn = np.bincount(draws, minlength=48)
  expected = weights / weights.sum() * 5_000
  assert np.abs(drawn - expected).max() < 5 * np.sqrt(expected.max())
  stream = pipeline.train_batches(data, batch_size=8, seed=1)
  (batch,) = take(stream, 1)
  assert batch["id"] == [str(column("id")[k]) for k in draws[:8]]


def test_media_file_gives_what_its_record_gives(data):
  clip = av_demo.example_media(data.dir)
  found = pipeline.batch_of_files([clip], data)
  batch_lib.check(found)
  (stored,) = pipeline.eval_batches(data, split="test", batch_size=1, limit=1)
  np.testing.assert_array_equal(found["waveform"], stored["waveform"])
  difference = found["frames"].astype(int) - stored["frames"]
  assert np.abs(difference).mean() < 3  # JPEG
  assert found["id"] == [str(clip)]


def test_media_file_is_read_within_limits(data):
  clip = av_demo.example_media(data.dir)
  data.files.seconds = 0.5
  with pytest.raises(InputError, match=r"0\.\d+ seconds; the limit is 0.5"):
    pipeline.batch_of_files([clip], data)


def test_too_small_a_split_is_refused_with_both_numbers(data):
  with pytest.raises(InputError, match="holds 48 clips; the batch size is 64"):
    pipeline.train_batches(data, batch_size=64, seed=0)
  assert pipeline.steps_per_epoch(data, 20) == 2
  data.limit = 30
  assert pipeline.num_examples(data) == 30
  assert pipeline.num_examples(data, "test") == 24
  with pytest.raises(InputError, match="Did you mean 'test'"):
    pipeline.num_examples(data, "tset")
  with pytest.raises(InputError, match="batch size 9 .* the 2 processes"):
    pipeline.train_batches(data, batch_size=9, seed=0, process_count=2)


def test_what_was_built_must_fit(data):
  data.audio.rate = 8_000
  with pytest.raises(InputError, match="data.audio.rate is 8000.* 16000"):
    pipeline.train_batches(data, batch_size=8, seed=0)
  data.audio.rate, data.sampling = 16_000, "sorted"
  with pytest.raises(InputError, match="data.sampling is 'sorted'"):
    pipeline.train_batches(data, batch_size=8, seed=0)
  assert len(pipeline.class_names(data, "segment")) == 25


def test_shapes_need_no_built_data_set(tmp_path):
  section = config.data_section()
  section.name, section.dir = "ave", str(tmp_path)
  section.heads = ("segment",)
  assert pipeline.batch_shapes(section, 2)["label/segment"][0] == (2, 10, 29)
  section.name, section.heads = "vggsound", ("verb",)
  with pytest.raises(InputError, match="unknown head of vggsound 'verb'"):
    pipeline.batch_shapes(section, 2)


# ----------------------------------------------------------- broken records


def picture(level):
  return simplejpeg.encode_jpeg(np.full((16, 16, 3), level, np.uint8))


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
  """Eight clips; the frames of number 2 are no JPEG files."""

  class Broken(builder.ClipBuilder, skip_registration=True):
    """Clips without files."""

    name = "acav"
    VERSION = tfds.core.Version("1.0.0")

    def classes(self):
      return {}

    def rows(self):
      return {"train": [builder.Row(f"-{k}", f"{k}.mp4") for k in range(8)]}

    def _results(self, tasks):
      for task in tasks:
        k = int(pathlib.Path(task.path).stem)
        frame = b"no JPEG" if k == 2 else picture(30 * k)
        yield decode.Encoded("", "", (frame,) * 5, seconds=0.4)

  folder = tmp_path_factory.mktemp("broken")
  builder.build(Broken, builder.Options(media=folder), data_dir=folder)
  return str(folder)


@pytest.fixture
def broken_data(broken):
  section = config.data_section()
  section.name, section.dir, section.heads = "acav", broken, ()
  section.video.update(num_frames=2, resize=16, size=16)
  section.audio.seconds = 0.1
  return section


def test_unreadable_clip_is_replaced_and_counted(broken_data):
  skipped = pipeline.Skipped()
  stream = pipeline.train_batches(
    broken_data, batch_size=8, seed=0, skipped=skipped
  )
  batches = take(stream, 3)
  assert skipped.dump() == {"-2": 3}
  for batch in batches:
    batch_lib.check(batch)
    assert "-2" not in batch["id"]
    assert len(batch["id"]) == 8
    assert batch["valid"].all()
    assert not batch["has_audio"].any()
    levels = batch["frames"][:, 0, 0, 0, 0]
    np.testing.assert_allclose(levels, [-30 * int(n) for n in batch["id"]],
                               atol=2)  # fmt: skip
  again = pipeline.Skipped()
  again.load(skipped.dump())
  assert again.dump() == {"-2": 3}


def test_batches_read_ahead_count_when_they_are_taken():
  skipped = pipeline.Skipped()
  skipped.load({"c": 4})
  for failed in ([("c", "corrupt")], [], [("c", "corrupt"), ("d", "corrupt")]):
    skipped.add(failed, 8)
  assert skipped.dump(0) == {"c": 4}
  assert skipped.dump(1) == skipped.dump(2) == {"c": 5}
  assert skipped.dump(3) == skipped.dump() == {"c": 6, "d": 1}


def test_unreadable_clip_never_counts_in_evaluation(broken_data):
  (batch,) = pipeline.eval_batches(broken_data, split="train", batch_size=8)
  assert batch["valid"].tolist() == [k != 2 for k in range(8)]


def test_too_many_unreadable_clips_stop_the_run(broken_data):
  broken_data.limit = 3
  skipped = pipeline.Skipped(max_share=0.1)
  stream = pipeline.train_batches(
    broken_data, batch_size=3, seed=0, skipped=skipped
  )
  with pytest.raises(
    InputError, match="of .* clips cannot be read; at most 10%"
  ):
    list(itertools.islice(stream, 50))
  broken_data.limit = 0
  stream = pipeline.eval_batches(broken_data, split="train", batch_size=8)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(example, "_decode", lambda frame: int("x"))
    with pytest.raises(InputError, match="16 clips of .* cannot be read"):
      next(stream)


def test_record_that_is_cut_short_is_refused():
  good = records.Record(
    b"\x0a\x0c\x0a\x0a\x0a\x01a\x12\x05\x1a\x03\x0a\x01\x07"
  )
  assert good.integers("a") == [7]
  assert good.integers("b") == []
  with pytest.raises(ValueError, match="longer than the record|ends too early"):
    records.Record(b"\x0a\x0c\x0a\x0a\x0a\x01a\x12\x05\x1a")
  with pytest.raises(ValueError, match="another type"):
    good.floats("a")


def test_quick_and_careful_parsing_of_records_agree(data):
  split = records.Split(data, "train")
  record = bytes(split[3]._data)
  found = records._quick_lists(record)
  assert found == records._find_lists(record)
  assert {"id", "frames", "waveform", "label", "captions"} <= found.keys()
  # In two messages, it is as good, only slower to read.
  one = b"\x0a\x0c\x0a\x0a\x0a\x01a\x12\x05\x1a\x03\x0a\x01\x07"
  two = one + one.replace(b"a", b"b")
  assert records._quick_lists(two) is None
  assert records.Record(two).integers("b") == [7]


# ------------------------------------------------------------------ devices


def sharding():
  mesh = jax.make_mesh(
    (8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,)
  )
  return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))


def host(count, fail_at=-1):
  for k in range(count):
    if k == fail_at:
      raise InputError("clip 7 is broken")
    yield {"index": np.arange(8, dtype=np.uint32) + k, "id": [str(k)] * 8}


def test_device_batches_are_global_and_in_order():
  with pipeline.device_batches(host(5), sharding(), 2) as stream:
    found = list(stream)
  assert [ids[0] for _, ids in found] == list("01234")
  array = found[3][0]["index"]
  assert array.shape == (8,)
  assert len(array.sharding.device_set) == 8
  np.testing.assert_array_equal(array, np.arange(8) + 3)
  assert "id" not in found[0][0]


def test_error_of_the_host_reaches_the_caller():
  stream = pipeline.device_batches(host(5, fail_at=2), sharding(), 2)
  assert [next(stream)[1][0] for _ in range(2)] == ["0", "1"]
  with pytest.raises(InputError, match="clip 7 is broken"):
    next(stream)
  with pytest.raises(StopIteration):
    next(stream)


def test_close_ends_the_thread_and_the_host():
  before = threading.active_count()
  closed = []

  def endless():
    try:
      yield from host(10**9)
    finally:
      closed.append(True)

  stream = pipeline.device_batches(endless(), sharding(), 1)
  next(stream)
  stream.close()
  stream.close()
  assert closed == [True]
  assert threading.active_count() == before
