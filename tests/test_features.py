"""Stored features: their files, batches of them, what prepare does."""

import itertools
import json
import pickle

import jax
import numpy as np
import pytest

from avjax import batch as contract
from avjax import config, experiment
from avjax.data import augment, clip_rows, features, pipeline, records
from avjax.data.features import Features, Writer
from avjax.errors import InputError

SOURCE = {"model": "convnext.pth"}
N, D = 4, 3


def writer(folder, clips, modality="audio", **change):
  options = {"tokens": N, "width": D, "dtype": "float16", "source": SOURCE}
  return Writer(folder, modality, clips=clips, **{**options, **change})


def tokens(count, first=1.0):
  return first + np.arange(count * D, dtype=np.float32).reshape(count, D) / 8


@pytest.fixture
def stored(tmp_path):
  """Of -a two tokens, of b more than there is room; c failed; d is missing."""
  with writer(tmp_path, ["-a", "b", "c", "d"]) as made:
    made.write(["b", "-a"], [tokens(6), tokens(2, 5.0)])
    made.fail("c", "no sound")
  return tmp_path


# --- Files --------------------------------------------------------------------


def test_features_are_read_as_they_were_written(stored):
  found = Features(stored, "audio")
  assert found.values.dtype == np.float16 and found.values.shape == (4, N, D)
  assert found.lengths.tolist() == [2, 4, 0, 0]
  assert found.failed == {"c": "no sound"} and found.source == SOURCE
  column = features.Column(found, ["d", "b", "-a", "x"])
  packed = pickle.dumps(column)
  assert b"-a" not in packed  # workers get rows, not names
  for one in (column, pickle.loads(packed)):
    out = np.full((3, D), 9, np.float32)
    assert one.read(2, out)
    np.testing.assert_array_equal(out, [*tokens(2, 5.0), [0] * D])
    assert one.read(1, out)
    np.testing.assert_array_equal(out, tokens(3))
    for absent in (0, 3):
      assert not one.read(absent, out) and not out.any()


def test_every_finite_float16_is_widened_exactly():
  bits = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
  half = bits[np.isfinite(bits)][None]
  out = np.empty(half.shape, np.float32)
  features.widen(half, out)
  np.testing.assert_array_equal(
    out.view(np.int32), half.astype(np.float32).view(np.int32)
  )


@pytest.mark.parametrize("in_place", [True, False])
def test_the_file_grows_and_keeps_what_it_holds(stored, in_place):
  path = stored / "audio.npy"
  if not in_place:  # as another program may have written it
    np.save(path, np.asfortranarray(np.load(path)))
  before = path.stat().st_ino
  with writer(stored, ["new", "d"]) as more:
    assert more.clips == ["-a", "b", "c", "d", "new"]
    assert more.missing() == ["d", "new"]
    more.write(["new"], [tokens(1)])
  assert (path.stat().st_ino == before) == in_place
  found = Features(stored, "audio")
  assert np.load(path).shape == (5, N, D)
  assert found.lengths.tolist() == [2, 4, 0, 0, 1]
  np.testing.assert_array_equal(found.values[1], tokens(4))
  np.testing.assert_array_equal(found.values[4, :1], tokens(1))


def test_only_what_is_saved_counts(stored):
  stopped = writer(stored, ["d"])
  stopped.write(["d"], [tokens(2)])
  stopped.close()
  again = writer(stored, ["d"])
  assert again.missing() == ["d"]
  again.close()


def test_growth_that_was_cut_short_does_no_harm(stored):
  before = (stored / "audio.json").read_bytes()
  writer(stored, ["x", "y"]).close()
  (stored / "audio.json").write_bytes(before)
  assert Features(stored, "audio").lengths.tolist() == [2, 4, 0, 0]
  with writer(stored, ["y"]) as more:
    assert more.missing() == ["y"]
  np.testing.assert_array_equal(Features(stored, "audio").values[1], tokens(4))


@pytest.mark.parametrize(
  "change, words",
  [
    ({"tokens": 5}, r"other form \(shape: \(4, 3\) there, \(5, 3\) now"),
    ({"dtype": "float32"}, "dtype: 'float16' there, 'float32' now"),
    ({"dtype": "float64"}, "unknown dtype 'float64'"),
    ({"source": {"model": "b"}}, "other source.*'convnext.pth' there"),
  ],
)
def test_features_of_two_kinds_are_not_mixed(stored, change, words):
  before = (stored / "audio.npy").read_bytes()
  with pytest.raises(InputError, match=words):
    writer(stored, ["new"], **change)
  assert (stored / "audio.npy").read_bytes() == before
  writer(stored, ["-a"]).close()  # the lock was given back


def test_only_whole_features_are_written(stored):
  with writer(stored, ["d"]) as made:
    for bad, words in (
      (tokens(2) * np.nan, "not all finite"),
      (tokens(2) * 1e6, "not all finite"),  # in float16
      (tokens(0), r"shape \(0, 3\)"),
      (np.ones((2, 5), np.float32), r"\(2, 5\); the width is 3"),
    ):
      with pytest.raises(ValueError, match=words):
        made.write(["d"], [bad])
    with pytest.raises(InputError, match="writes audio features"):
      writer(stored, ["d"])
    assert made.missing() == ["d"]


def test_a_full_disk_is_said_in_words(stored, monkeypatch):
  def full(*_):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(clip_rows, "_reserve", full)
  with pytest.raises(InputError, match="No space left"):
    writer(stored, ["new"])
  assert Features(stored, "audio").clips == ["-a", "b", "c", "d"]


DAMAGES = {
  "no JSON": (lambda f: (f / "audio.json").unlink(), "data_prep.features"),
  "no lengths": (lambda f: (f / "audio_lengths.npy").unlink(), "audio_lengths"),
  "few lengths": (
    lambda f: np.save(f / "audio_lengths.npy", np.zeros(3, np.int16)),
    r"\(3,\).*\(4,\)",
  ),
  "rank": (
    lambda f: np.save(f / "audio.npy", np.zeros((4, 3), np.float16)),
    r"\(4, 3\).*float16 or float32 of shape \(4, 0, 0\)",
  ),
  "pickle": (
    lambda f: np.save(f / "audio.npy", np.array([{}], object)),
    "audio.npy",
  ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files_are_refused_in_words(stored, damage):
  apply, words = DAMAGES[damage]
  apply(stored)
  with pytest.raises(InputError, match=words):
    Features(stored, "audio")


# --- Batches ------------------------------------------------------------------


def told(number, count=N):
  """Tokens that tell the clip."""
  return np.full((count, D), number + 1, np.float32)


@pytest.fixture(scope="module")
def built(demo_data, tmp_path_factory):
  """A config's section, and the clips' numbers by id.

  Clip 0 has no features, clip 1 no audio, clip 2 two tokens of each.
  """
  data = config.data_section()
  data.update(dir=demo_data, threads=1, feature_frames=N, feature_width=D)
  data.features = str(tmp_path_factory.mktemp("features"))
  ids = records.Split(data, "train").column("id").tolist()
  for modality in contract.MODALITIES:
    with writer(data.features, ids[::-1], modality) as made:
      for number, name in enumerate(ids):
        if number > (modality == "audio"):
          made.write([name], [told(number, 2 if number == 2 else 9)])
  return data, {name: number for number, name in enumerate(ids)}


def changed(data, **change):
  data = data.copy_and_resolve_references()
  data.update(change)
  return data


@pytest.mark.parametrize("workers", [0, 1])
def test_a_batch_holds_the_features_of_its_clips(built, workers, monkeypatch):
  data, numbers = built
  if not workers:  # nothing of the media is read

    def refuse(*_):
      raise AssertionError("a record is read")

    monkeypatch.setattr(records.Split, "__getitem__", refuse)
  labels = records.Split(data, "train").labels()
  shapes = pipeline.batch_shapes(data, 12)
  batches = pipeline.train_batches(
    changed(data, workers=workers), batch_size=12, seed=1
  )
  seen = set()
  for batch in itertools.islice(batches, 3):
    contract.check(batch)
    arrays = contract.arrays(batch)
    assert {k: (v.shape, v.dtype) for k, v in arrays.items()} == shapes
    for row, name in enumerate(batch["id"]):
      number = numbers[name]
      expected = told(number)
      expected[2 if number == 2 else N :] = 0
      np.testing.assert_array_equal(batch["features/video"][row], expected)
      sound = expected * (number != 1)
      np.testing.assert_array_equal(batch["features/audio"][row], sound)
      assert batch["has_audio"][row] == (number != 1)
      assert batch["has_video"][row]
      assert batch["label"][row].argmax() == labels[number][0]
      seen.add(number)
  batches.close()
  assert 0 not in seen  # another stood in for it
  assert len(seen) > 20


def test_evaluation_says_which_clips_have_none(built, tmp_path):
  data, numbers = built
  (batch,) = pipeline.eval_batches(data, split="train", batch_size=len(numbers))
  assert batch["valid"].tolist() == [False] + [True] * (len(numbers) - 1)
  (batch,) = pipeline.eval_batches(
    changed(data, modality="v", heads=("label", "verb")),
    split="train",
    batch_size=len(numbers),
  )
  assert "features/audio" not in batch and not batch["has_audio"].any()
  assert (batch["label/verb"].sum(1) == 1).all()  # from the records
  with pytest.raises(InputError, match="have one view"):
    next(pipeline.eval_batches(data, split="test", batch_size=8, views=2))
  with pytest.raises(InputError, match="reads no media files"):
    pipeline.batch_of_files([tmp_path / "a.mp4"], data)


def test_features_of_another_data_set_are_refused(built, tmp_path):
  data, numbers = built
  name = next(iter(numbers))
  for modality in contract.MODALITIES:
    with writer(tmp_path, ["x", "y"], modality) as made:
      made.write(["x", "y"], [tokens(4)] * 2)
  words = f"{tmp_path} has features of 0 of the {len(numbers)} clips.*{name}"
  with pytest.raises(InputError, match=words):
    next(
      pipeline.train_batches(
        changed(data, features=str(tmp_path)), batch_size=8, seed=1
      )
    )
  with pytest.raises(InputError, match="width 3; data.feature_width is 5"):
    next(
      pipeline.train_batches(
        changed(data, feature_width=5), batch_size=8, seed=1
      )
    )


def test_a_part_of_the_clips_may_lack_features(built, tmp_path, caplog):
  data, numbers = built
  ids = list(numbers)
  half = len(ids) // 2
  for modality in contract.MODALITIES:
    with writer(tmp_path, ids[:half], modality) as made:
      made.write(ids[:half], [tokens(4)] * half)
  data = changed(data, features=str(tmp_path))
  features.Reader(data, records.Split(data, "train"))
  assert f"of {half} of the {len(ids)} clips" in caplog.text


# --- prepare ------------------------------------------------------------------


def batch(size=16, n=6, d=8):
  rng = np.random.default_rng(0)
  values = rng.standard_normal((2, size, n, d)).astype(np.float32)
  values[0, 2, 4:] = 0
  return {
    "features/audio": values[0],
    "features/video": values[1],
    "has_audio": np.arange(size) != 5,
    "has_video": np.ones(size, bool),
    "index": np.arange(100, 100 + size, dtype=np.uint32),
  }


def unit(x):
  return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def prepared(values, train=True, key=7, **options):
  section = config.data_section()
  section.features = "somewhere"
  section.augment.update(options)
  step = jax.jit(lambda b, k: augment.prepare(b, section, k, train))
  return jax.device_get(step(values, jax.random.key(key)))


UAVM = {"mixup": 10.0, "mixup_probability": 0.5, "roll": 3}


def test_tokens_are_of_length_one_and_zero_tokens_stay():
  values = batch()
  inputs = prepared(values, train=False, **UAVM)
  contract.check(inputs, contract.INPUTS)
  for m in contract.MODALITIES:
    expected = unit(values[f"features/{m}"])
    np.testing.assert_allclose(inputs[f"features/{m}"], expected, atol=1e-6)
  assert not inputs["features/audio"][2, 4:].any()
  assert "mix/audio" not in inputs


def test_features_are_mixed_then_rolled_both_alike():
  values = batch()
  inputs = prepared(values, **UAVM)
  weight = inputs["mix/audio"]
  np.testing.assert_array_equal(weight, inputs["mix/video"])
  assert weight[4] == weight[5] == 1  # one of the two has no audio
  assert 0 < (weight < 1).sum() < len(weight)
  own = weight[:, None, None]
  shifts = set()
  for row in range(len(weight)):
    fits = []
    for m in contract.MODALITIES:
      x = unit(values[f"features/{m}"])
      other = x.reshape(-1, 2, *x.shape[1:])[:, ::-1].reshape(x.shape)
      mixed = (own * x + (1 - own) * other)[row]
      fits.append(
        {
          shift
          for shift in range(-3, 3)
          if np.allclose(
            np.roll(mixed, shift, 0), inputs[f"features/{m}"][row], atol=1e-6
          )
        }
      )
    (shift,) = set.intersection(*fits)
    shifts.add(shift)
  assert len(shifts) > 3
  order = np.arange(16).reshape(-1, 2)[::-1].ravel()  # pairs stay pairs
  moved = prepared({k: v[order] for k, v in values.items()}, **UAVM)
  for key, value in moved.items():
    np.testing.assert_allclose(value, inputs[key][order], atol=1e-6)


def test_shifts_reach_from_minus_roll_to_roll_minus_one():
  values = batch(size=256, n=30, d=1)
  values["features/audio"] = np.zeros((256, 30, 1), np.float32)
  values["features/audio"][:, 0] = 1
  inputs = prepared(values, roll=15)
  places = inputs["features/audio"][..., 0].argmax(1)
  shifts = (places + 15) % 30 - 15
  assert set(shifts.tolist()) == set(range(-15, 15))


def test_options_of_media_are_refused():
  for option in ({"noise": 0.1}, {"freq_masks": 1}, {"flip": 0.5}):
    (name,) = option
    with pytest.raises(InputError, match=f"augment.{name} acts on frames or"):
      prepared(batch(), **option)


def test_a_batch_of_noise_has_the_same_shapes(tmp_path):
  data = config.data_section()
  data.update(features="nowhere", feature_frames=N, feature_width=D)
  whole = config.base_config()
  whole.data = data
  mesh = experiment.parallel.make_mesh({"data": 1, "fsdp": 1, "tensor": 1})
  shapes = experiment.shapes_of_batch(whole, 8, mesh)
  assert shapes["features/audio"].shape == (8, N, D)
  assert "frames" not in shapes and "waveform" not in shapes
  from data_prep import synthetic

  made = Features(synthetic.features(tmp_path, data, 4), "video")
  assert made.values.shape == (4, N, D) and made.done().all()
  said = json.loads(made.path.with_suffix(".json").read_text())
  assert said["clips"][0] == synthetic.clip_id(0)
