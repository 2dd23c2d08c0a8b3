"""Batches: the same as a plain loop makes, in memory that is used again."""

import itertools

import cv2
import grain
import jax
import numpy as np
import pytest
import simplejpeg

from avjax import config
from avjax.data import buffers, order, pipeline, records, sampling
from tests.test_pipeline import equal, sharding, take


@pytest.fixture
def data(demo_data):
  section = config.data_section()
  section.dir, section.heads = demo_data, ()
  section.video.update(num_frames=4, resize=112, size=96)
  section.audio.seconds = 2.5
  return section


# ------------------------------------------------- the same, clip by clip


def plain_row(data, position, number, seed):
  """An example as the data set's definition has it, step by step."""
  record = records.Split(data, "train")[number]
  rng = np.random.Generator(np.random.Philox(key=[seed, position]))
  video, audio = data.video, data.audio
  frames = [
    simplejpeg.decode_jpeg(f, fastdct=True, fastupsample=True)
    for f in record.blobs("frames")
  ]
  rate = float(record.floats("frame_rate")[0])
  step = sampling.frame_step(video, data.variant, rate)
  (start,) = sampling.video_starts(len(frames), video.num_frames, step, 1, rng)
  height, width = frames[0].shape[:2]
  box = sampling.crop_box(
    height, width, resize=video.resize, size=video.size,
    jitter=data.augment.scale_jitter, random=data.augment.random_crop, rng=rng,
  )  # fmt: skip
  rows = slice(box.top, box.bottom), slice(box.left, box.right)
  numbers = sampling.frame_numbers(start, video.num_frames, step, len(frames))
  size = (video.size, video.size)
  pictures = [
    cv2.resize(frames[k][rows], size, interpolation=cv2.INTER_LINEAR)
    for k in numbers
  ]
  wave = np.frombuffer(record.blobs("waveform")[0], np.int16)
  count, time = (
    round(audio.seconds * audio.rate),
    round(start / rate * audio.rate),
  )
  begin = sampling.audio_start(audio.start, len(wave), count, time, rng)
  if audio.start == "wrap":
    sound, samples = np.resize(np.roll(wave, -begin), count), count
  else:
    part = wave[begin : begin + count]
    sound, samples = np.pad(part, (0, count - len(part))), len(part)
  return {
    "id": record.text("id"),
    "frames": np.stack(pictures),
    "waveform": sound,
    "samples": samples,
    "index": position,
  }


@pytest.mark.parametrize("case", ["video", "wrap", "frames10", "balanced"])
def test_batches_are_what_a_plain_loop_makes(data, case):
  seed = 5
  data.augment.update(scale_jitter=(0.9, 1.2), random_crop=True)
  if case == "frames10":
    data.variant = case
    data.video.update(num_frames=1, stride=1)
    data.augment.update(scale_jitter=(1.0, 1.0), random_crop=False)
  data.audio.start = "wrap" if case == "wrap" else "aligned"
  data.audio.seconds = 3.5 if case == "frames10" else 1.5
  split, order = records.Split(data, "train"), None
  if case == "balanced":
    data.sampling = case
    sums = np.cumsum(split.label_weights())
    order = [
      np.searchsorted(
        sums,
        np.random.Generator(
          np.random.Philox(key=[seed, k], counter=1 << 96)
        ).random() * sums[-1],
        side="right",
      )
      for k in range(56)
    ]  # fmt: skip
  else:
    order = grain.MapDataset.range(48).seed(seed).shuffle().repeat()
  # Beyond the first epoch of 48 clips.
  stream = pipeline.train_batches(data, batch_size=8, seed=seed, start_step=5)
  for step, batch in enumerate(take(stream, 2), start=5):
    for row in (0, 3, 7):
      position = 8 * step + row
      number = int(order[position])
      for key, value in plain_row(data, position, number, seed).items():
        np.testing.assert_array_equal(batch[key][row], value, err_msg=key)


# ------------------------------------------------------------------- memory


def test_memory_of_batches_is_used_again_only_when_nobody_holds_it():
  made = buffers.Buffers({"a": ((1 << 20,), np.uint8), "b": ((4,), np.uint8)})

  def address(array):
    return array.__array_interface__["data"][0]

  first = made.take()
  places = {address(first["a"])}
  view = first["a"][3:7]  # a view alone holds it
  del first
  second = made.take()
  assert address(second["a"]) not in places
  places.add(address(second["a"]))
  second["a"][:] = 7
  # Where it begins at a multiple of 64 bytes, JAX need not copy it.
  whole = slice(-address(second["a"]) % 64, None)
  on_device = jax.device_put(second["a"][whole], jax.devices()[0])
  del second, view
  third, fourth = made.take(), made.take()
  third["a"][:], fourth["a"][:] = 1, 2
  assert address(third["a"]) in places
  # In its memory, copied or still on its way: it stays what it was.
  assert (np.asarray(on_device) == 7).all()
  kept = [made.take() for _ in range(2 * buffers.KEPT)]
  assert len({address(batch["a"]) for batch in kept}) == len(kept)


def test_what_a_consumer_keeps_never_changes(data):
  data.video.num_frames = 8  # large enough to be used again
  seen, copies = [], []
  stream = pipeline.train_batches(data, batch_size=16, seed=3)
  with pipeline.device_batches(stream, sharding(), 2) as batches:
    for step, (batch, _) in enumerate(itertools.islice(batches, 10)):
      copies.append({key: np.array(batch[key]) for key in batch})
      seen.append({k: batch[k][2:5] if step % 2 else batch[k] for k in batch})
      if step % 3 == 0:
        seen[step] = copies[step] = {}  # others may have the memory
  for step, (one, other) in enumerate(zip(seen, copies, strict=True)):
    part = slice(2, 5) if step % 2 else slice(None)
    equal(one, {key: value[part] for key, value in other.items()})


# -------------------------------------------------------------------- order


@pytest.mark.parametrize("count", [1, 2, 48, 999, 20_000])
def test_order_is_grains(count):
  for seed in (0, 42, (1 << 32) - 1):
    expected = grain.MapDataset.range(count).seed(seed).shuffle().repeat()
    found = order.Order(count, seed)
    positions = [*range(8), count - 1, count, 7 * count + 3, 10**9]
    assert [found[k] for k in positions] == [
      int(expected[k]) for k in positions
    ]
    assert found._quick == (1 < count <= order.LARGEST)


def test_order_is_a_permutation_of_each_epoch():
  found = order.Order(300, 7)
  first = [found[k] for k in range(300)]
  second = [found[k] for k in range(300, 600)]
  assert sorted(first) == sorted(second) == list(range(300))
  assert first != second


def test_order_is_grains_own_where_its_shuffle_has_changed(monkeypatch):
  monkeypatch.setattr(order, "permutation", lambda n, seed: np.arange(n))
  found, grains = order.Order(50, 3), grain.MapDataset.range(50).seed(3)
  expected = grains.shuffle().repeat()
  assert [found[k] for k in range(60)] == [int(expected[k]) for k in range(60)]
