"""CAV-MAE's audio chain, mixup, frame choice, averages and sampling."""

import itertools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avjax import averaging, config, losses
from avjax import batch as contract
from avjax.data import audio, augment, pipeline, records, sampling
from avjax.errors import InputError
from avjax.evaluators import classification
from data_prep import av_demo
from tests import runs

DATA = pathlib.Path(__file__).parent / "data"
KEY = jax.random.key(7)
RATE = 16_000
MEAN, STD = -5.081, 4.4849
LENGTH = 6_560  # 40 frames and a bit
FRAMES = 44
FILL = 1.1329  # of 0 in the raw log-mel


def data(**augmentations):
  section = config.data_section()
  section.fbank.update(window="hanning", edges="snip", remove_mean=True)
  section.fbank.update(mean=MEAN, std=STD, frames=FRAMES)
  section.augment.update(augmentations)
  return section


def batch(size=4, samples=LENGTH):
  """Waveforms with a mean, zero after their true length."""
  rng = np.random.default_rng(0)
  wave = rng.integers(-5_000, 9_000, (size, LENGTH)).astype(np.int16)
  samples = np.broadcast_to(np.asarray(samples, np.int32), (size,)).copy()
  wave[np.arange(LENGTH) >= samples[:, None]] = 0
  return {
    "waveform": wave,
    "samples": samples,
    "frames": rng.integers(0, 256, (size, 1, 2, 2, 3)).astype(np.uint8),
    "has_audio": np.ones(size, bool),
    "has_video": np.ones(size, bool),
    "index": np.arange(100, 100 + size, dtype=np.uint32),
  }


def prepare(values, section, train=True, key=KEY):
  run = jax.jit(lambda b, k: augment.prepare(b, section, k, train))
  return {name: np.asarray(v) for name, v in run(values, key).items()}


def mel(wave):
  """The chain on the host, for a waveform of its true length."""
  values = audio.fbank(wave.astype(np.float32), data().fbank, RATE, np)
  padded = np.zeros((FRAMES, 128), np.float32)
  padded[: len(values)] = values
  return (padded - MEAN) / STD


# ------------------------------------------------------------------- log-mel


def test_padding_is_zero_before_normalisation():
  values = batch(3, samples=[3_200, LENGTH, 399])
  inputs = prepare(values, data(), train=False)
  contract.check(inputs, contract.INPUTS)
  fbank = inputs["fbank"]
  assert fbank.shape == (3, FRAMES, 128)
  # 1 + (3200 - 400) // 160 = 18 frames, 1 + (6560 - 400) // 160 = 39, none.
  for row, true in enumerate((18, 39, 0)):
    np.testing.assert_allclose(fbank[row, true:], FILL, atol=5e-5)
    assert not np.isclose(fbank[row, :true], FILL, atol=5e-5).all(-1).any()
  # The bin that holds nothing: silence, which is not padding.
  np.testing.assert_allclose(fbank[0, :18, 3], -2.4218, atol=1e-4)
  wave = values["waveform"][0, :3_200] / 32768
  np.testing.assert_allclose(fbank[0], mel(wave - wave.mean()), atol=1e-4)


def test_longer_sound_is_cut():
  section = data()
  whole = prepare(batch(2), section, train=False)["fbank"]
  section.fbank.frames = 20
  cut = prepare(batch(2), section, train=False)["fbank"]
  np.testing.assert_allclose(cut, whole[:, :20], atol=1e-5)


def test_golden_frames_of_ten_seconds_in_1024():
  t = np.arange(160_000) / RATE
  hiss = np.random.default_rng(0).standard_normal(160_000)
  wave = 0.3 * np.sin(2 * np.pi * (200 * t + 150 * t**2)) + 0.05 * hiss
  wave = np.pad(wave.astype(np.float32), (0, 164_080 - 160_000))[None]
  section = data().fbank
  section.frames = 1_024
  samples = jnp.array([160_000], jnp.int32)

  @jax.jit
  def chain(wave):
    wave = audio.remove_mean(wave, samples)
    values = audio.fbank(wave, section, RATE)
    return audio.fit_frames(values, samples, section, RATE)

  found = np.asarray(chain(wave))[0]
  golden = np.load(DATA / "fbank_kaldi.npz")["frames_every_25"]
  error = np.abs(found[:998:25] - golden)
  assert error.mean() <= 1e-4
  assert error.max() <= 1e-3
  assert found.shape == (1_024, 128)
  assert (found[998:] == 0).all() and (found[997] != 0).all()


def test_mean_is_that_of_the_true_length():
  wave = jnp.array([[3.0, 5.0, 7.0, 0.0, 0.0]])
  found = audio.remove_mean(wave, jnp.array([3], jnp.int32))
  np.testing.assert_allclose(found, [[-2, 0, 2, 0, 0]])
  silent = audio.remove_mean(wave * 0, jnp.array([0], jnp.int32))
  np.testing.assert_array_equal(silent, np.zeros((1, 5)))


# ------------------------------------------------------------ augmentations


def test_masked_cells_are_zero_in_the_raw_log_mel():
  section = data(freq_masks=1, freq_size=48, time_masks=1, time_size=30)
  section.augment.mask_value = "raw"
  plain = prepare(batch(16), section, train=False)["fbank"][:, :39]
  found = prepare(batch(16), section)["fbank"][:, :39]
  masked = found == np.float32(-MEAN / STD)
  np.testing.assert_allclose(found[~masked], plain[~masked], atol=1e-4)
  bins, times = masked.all(axis=1), masked.all(axis=2)
  np.testing.assert_array_equal(masked, bins[:, None] | times[:, :, None])
  assert 8 < bins.sum(axis=1).mean() < 40
  assert bins.sum(axis=1).max() < 48


def test_spans_start_by_torchaudios_rule():
  """width = floor(U 48), start = floor(U (128 - U 48)), as published."""
  draws = np.random.default_rng(1).random((500, 2)).astype(np.float32)
  width, start = jnp.asarray(draws[:, :1]), jnp.asarray(draws[:, 1:])
  masks = np.asarray(augment.spans(width, start, 128, 48, True))
  for mask, (u, v) in zip(masks, draws, strict=True):
    first = int(np.float32(v) * (128 - np.float32(u) * 48))
    expected = list(range(first, first + int(np.float32(u) * 48)))
    assert np.flatnonzero(mask).tolist() == expected
  assert not masks[:, -1].any()
  # The other rule reaches the last place.
  ours = np.asarray(augment.spans(width, jnp.full((500, 1), 0.999), 128, 48))
  assert ours[:, -1].any()


def test_noise_is_uniform_with_a_size_for_each_clip():
  values = batch(64)
  plain = prepare(values, data())["fbank"]
  noise = prepare(values, data(noise=0.1))["fbank"] - plain
  assert noise.min() > -1e-5 and noise.max() < 0.1
  largest = noise.reshape(64, -1).max(axis=1)
  assert largest.min() < 0.01 and 0.04 < largest.mean() < 0.06
  means = noise.reshape(64, -1).mean(axis=1)
  np.testing.assert_allclose(means, largest / 2, atol=2e-3)


def test_roll_turns_padding_too():
  values = batch(64)
  plain = prepare(values, data())["fbank"]
  found = prepare(values, data(roll=FRAMES))["fbank"]
  shifts = []
  for a, b in zip(plain, found, strict=True):
    match = [k for k in range(FRAMES) if np.allclose(np.roll(a, k, 0), b)]
    assert len(match) == 1
    shifts += match
  assert len(set(shifts)) > 25
  near = prepare(values, data(roll=2))["fbank"]
  rolled = {
    next(k for k in range(-2, 2) if np.allclose(np.roll(a, k, 0), b))
    for a, b in zip(plain, near, strict=True)
  }
  assert rolled == {-2, -1, 0, 1}


# -------------------------------------------------------------------- mixup

MIX = {"mixup": 10.0, "mixup_probability": 0.5, "mixup_waveform": True}


def test_waveforms_are_mixed_without_their_means():
  values = batch(4, samples=[3_200, LENGTH, LENGTH, 4_000])
  section = data(**MIX)
  section.augment.mixup_probability = 1.0
  inputs = prepare(values, section)
  weights = inputs["mix/audio"]
  assert len(set(weights.tolist())) == 4
  pictures = prepare(values, data())["frames"]
  for row, other in enumerate((1, 0, 3, 2)):
    true, weight = values["samples"][row], weights[row]
    waves = []
    for k in (row, other):
      own = values["waveform"][k, : values["samples"][k]] / 32768
      part = np.zeros(true)
      part[: len(own)] = (own - own.mean())[:true]
      waves.append(part)
    mixed = weight * waves[0] + (1 - weight) * waves[1]
    expected = mel(mixed - mixed.mean())
    np.testing.assert_allclose(inputs["fbank"][row], expected, atol=1e-3)
    np.testing.assert_allclose(
      inputs["frames"][row],
      weight * pictures[row] + (1 - weight) * pictures[other],
      atol=1e-5,
    )


def test_each_example_draws_whether_and_how_much():
  small = {**batch(2_000), "waveform": np.ones((2_000, 400), np.int16)}
  small["samples"][:] = 400
  inputs = prepare(small, data(**MIX))
  weights = inputs["mix/audio"]
  np.testing.assert_array_equal(weights, inputs["mix/video"])
  mixed = weights[weights < 1]
  assert 900 < len(mixed) < 1_100
  assert len(np.unique(mixed)) > 900
  assert mixed.mean() == pytest.approx(0.5, abs=0.02)
  assert mixed.std() == pytest.approx(0.109, abs=0.01)  # Beta(10, 10)
  # One clip of a pair may be mixed and the other not.
  pairs = (weights < 1).reshape(-1, 2)
  assert (pairs[:, 0] != pairs[:, 1]).any()
  labels = jnp.eye(2)[jnp.arange(2_000) % 2]
  labels = losses.mix_labels(labels, jnp.asarray(weights))
  np.testing.assert_allclose(labels[0], [weights[0], 1 - weights[0]], atol=1e-6)
  np.testing.assert_allclose(labels[1], [1 - weights[1], weights[1]], atol=1e-6)


def test_a_clip_is_mixed_in_all_modalities_or_in_none():
  values = batch(4)
  values["has_audio"] = np.array([True, False, True, True])
  section = data(**{**MIX, "mixup_probability": 1.0})
  inputs = prepare(values, section)
  for name in ("mix/audio", "mix/video"):
    assert inputs[name][:2].tolist() == [1, 1]
    assert (inputs[name][2:] < 1).all()


EVERYTHING = {
  **MIX,
  "freq_masks": 1,
  "freq_size": 48,
  "time_masks": 1,
  "time_size": 20,
  "mask_value": "raw",
  "noise": 0.1,
  "roll": FRAMES,
}


def test_draws_follow_the_examples_and_nothing_is_compiled_again():
  section = data(**EVERYTHING)
  run = jax.jit(lambda b, k: augment.prepare(b, section, k, True))
  values = batch(8, samples=[3_200, 5_000, LENGTH, 700] * 2)
  inputs = run(values, KEY)
  contract.check(inputs, contract.INPUTS)
  # Pairs move as pairs; who is whose partner stays.
  order = np.array([6, 7, 1, 0, 4, 5, 3, 2])
  moved = run({k: v[order] for k, v in values.items()}, KEY)
  for name in ("fbank", "frames", "mix/audio"):
    np.testing.assert_allclose(
      moved[name], np.asarray(inputs[name])[order], atol=1e-4
    )
  other = run({**values, "samples": values["samples"] // 2}, KEY)
  assert np.isfinite(other["fbank"]).all()
  assert run._cache_size() == 1


@pytest.mark.parametrize(
  "fbank, options, words",
  [
    ({"edges": "same"}, {}, "frames=44 goes with edges='snip', not 'same'"),
    ({"frames": -1}, {}, "frames=-1 is negative"),
    ({"remove_mean": False}, MIX, "set data.fbank.remove_mean"),
    ({}, {"mask_value": "rwa"}, "Did you mean 'raw'"),
    ({}, {"roll": 5, "time_shift": True}, "roll=5 and time_shift"),
    ({}, {"roll": -5}, "roll=-5 must be 0 or more"),
    ({}, {"noise": -0.1}, "noise=-0.1"),
    ({}, {"mixup_probability": 1.5}, "mixup_probability=1.5 is not"),
    ({}, {"mixup_probability": 0.0}, "mixup=0.0 turns mixup off"),
    ({}, {**MIX, "mixup_per_modality": True}, "mixup_per_modality"),
  ],
)
def test_contradictions_are_refused_before_training(fbank, options, words):
  section = data(**options)
  section.fbank.update(fbank)
  with pytest.raises(InputError, match=words):
    augment.prepare(batch(2), section, KEY, False)


def test_waveforms_that_are_not_there_cannot_be_mixed():
  values = {**batch(2), "fbank": np.zeros((2, FRAMES, 128), np.float32)}
  with pytest.raises(InputError, match="mixup_waveform needs waveforms"):
    augment.prepare(values, data(**MIX), KEY, True)


def test_configs_saved_before_get_neutral_values():
  plain = config.plain(config.base_config())
  del plain["data"]["fbank"]["frames"], plain["data"]["augment"]["roll"]
  for saved in (plain, {"stages": ["one"], "one": plain}):
    found = config.from_plain(saved)
    section = (found.one if "one" in saved else found).data
    assert section.fbank.frames == section.augment.roll == 0
    assert section.fbank.num_mels == 128


# ------------------------------------------------------------- frame choice


def test_frame_five_of_ten():
  starts = sampling.video_starts
  assert starts(10, 1, 1.0, 1, None, late=True) == [5]
  assert starts(10, 1, 1.0, 1, None) == [4]  # AV-MAE's, unchanged
  assert starts(10, 1, 1.0, 10, None, late=True) == list(range(10))
  rng = np.random.default_rng(0)
  drawn = [starts(10, 1, 1.0, 1, rng)[0] for _ in range(500)]
  assert sorted(set(drawn)) == list(range(10))


@pytest.fixture(scope="module")
def frames10(demo_data):
  section = data()
  section.variant, section.heads = "frames10", ("label",)
  section.dir = demo_data
  section.demo.update(runs.DEMO)
  section.dir = str(av_demo.ensure_demo(section))
  section.video.update(num_frames=1, stride=1, resize=64, size=64)
  section.augment.random_crop = False
  section.audio.seconds = 4.0
  return section


def test_ten_views_have_one_sound(frames10):
  (one,) = pipeline.eval_batches(frames10, split="test", batch_size=2, limit=2)
  (ten,) = pipeline.eval_batches(
    frames10, split="test", batch_size=2, limit=2, views=10
  )
  contract.check(ten)
  assert ten["frames"].shape == (2, 10, 1, 64, 64, 3)
  np.testing.assert_array_equal(ten["frames"][:, 5], one["frames"])
  assert any((ten["frames"][:, k] != one["frames"]).any() for k in range(10))
  for batch_ in (one, ten):
    assert batch_["waveform"].shape == (2, 64_000)
    record = records.Split(frames10, "test")[0]
    true = len(record.blobs("waveform")[0]) // 2
    assert batch_["samples"][0] == true < 64_000
    assert (batch_["waveform"][0, true:] == 0).all()
  arrays = jax.tree.map(jnp.asarray, contract.arrays(ten))
  flat, views = classification.fold_views(arrays)
  assert views == 10
  assert flat["samples"].shape == (20,) and flat["waveform"].shape[0] == 20
  np.testing.assert_array_equal(flat["waveform"][3], ten["waveform"][0])


def test_training_takes_any_frame_of_a_clip(frames10):
  stream = pipeline.train_batches(frames10, batch_size=48, seed=1)
  epochs = list(itertools.islice(stream, 3))
  stream.close()
  seen = {}
  for epoch in epochs:
    for name, frame in zip(epoch["id"], epoch["frames"], strict=True):
      seen.setdefault(name, set()).add(frame.tobytes())
  assert np.mean([len(kinds) for kinds in seen.values()]) > 2


# ------------------------------------------------------------------ averages


def test_probabilities_are_averaged():
  logits = jnp.array([[[4.0, 0.0]], [[0.0, 1.0]], [[0.0, 1.0]]])  # [v b k]
  softmax = jax.nn.softmax(logits).mean(axis=0)
  found = classification.mean_probabilities(logits, False)
  np.testing.assert_allclose(jax.nn.softmax(found), softmax, atol=1e-6)
  sigmoid = jax.nn.sigmoid(logits).mean(axis=0)
  found = classification.mean_probabilities(logits, True)
  np.testing.assert_allclose(jax.nn.sigmoid(found), sigmoid, atol=1e-6)
  # Logits vote for the first class, probabilities for the second.
  votes = jnp.array([[[9.0, 0.0]], [[0.0, 2.0]], [[0.0, 2.0]]])
  assert classification.mean_logits(votes, False).argmax() == 0
  assert classification.mean_probabilities(votes, False).argmax() == 1
  one = classification.mean_probabilities(votes[:1], True)
  np.testing.assert_allclose(one, votes[0], atol=1e-5)
  assert config.eval_section("classification").average == "logits"


# ------------------------------------------------------------------ sampling


def test_weights_of_balanced_sampling():
  split = object.__new__(records.Split)
  split.folder, split.name, split._count = pathlib.Path(), "train", 4
  split._columns = {
    "label": np.array([0, 0, 1, 0, 2]),  # clips: {0}, {0, 1}, {0}, {2}
    "label_ends": np.array([1, 3, 4, 5]),
  }
  # 1000 / 3.01 = 332.2259, 1000 / 1.01 = 990.0990.
  expected = [332.2259, 1_322.3249, 332.2259, 990.0990]
  np.testing.assert_allclose(split.label_weights(), expected, atol=1e-4)


def test_balanced_epochs_are_as_long_and_go_on_where_they_stopped(frames10):
  section = frames10.copy_and_resolve_references()
  section.sampling = "balanced"
  assert pipeline.steps_per_epoch(section, 20) == 2  # of 48 clips
  ids = []
  for start in (0, 1):
    stream = pipeline.train_batches(
      section, batch_size=24, seed=3, start_step=start
    )
    ids.append([part["id"] for part in itertools.islice(stream, 3 - start)])
    stream.close()
  assert ids[0][1:] == ids[1]
  assert len(set(sum(ids[0], []))) < 48  # with replacement


def test_epochs_are_averaged_from_the_first_to_the_last():
  section = config.base_config().optimizer
  section.average, section.average_from = "epochs", 3
  state = averaging.init(section, {"w": jnp.float32(0)})
  for step in range(1, 21):  # epochs of 4 steps; w is the step
    state = averaging.update(section, state, {"w": jnp.float32(step)}, step, 4)
  assert state["mean"]["w"] == pytest.approx((12 + 16 + 20) / 3)
