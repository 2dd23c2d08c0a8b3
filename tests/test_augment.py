"""Literal checks of each augmentation and of `prepare` as a whole."""

import colorsys
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from avjax import batch as contract
from avjax.config import data_section
from avjax.data import audio, augment
from avjax.errors import InputError

DATA = pathlib.Path(__file__).parent / "data"
KEY = jax.random.key(7)


def data(**augmentations):
  section = data_section()
  section.audio.seconds = 0.1
  section.augment.update(augmentations)
  return section


def batch(size=8):
  rng = np.random.default_rng(0)
  return {
    "frames": rng.integers(0, 256, (size, 2, 4, 4, 3)).astype(np.uint8),
    "waveform": rng.integers(-9000, 9000, (size, 1600)).astype(np.int16),
    "label": np.eye(size, dtype=np.float32),
    "has_audio": np.ones(size, bool),
    "has_video": np.ones(size, bool),
    "index": np.arange(100, 100 + size, dtype=np.uint32),
  }


EVERYTHING = {
  "flip": 0.5,
  "colour": 0.8,
  "grey": 0.3,
  "freq_masks": 2,
  "freq_size": 30,
  "time_masks": 1,
  "time_size": 5,
  "time_shift": True,
}


@functools.cache
def compiled(options):
  section = data(**dict(options))
  return jax.jit(lambda b, k: augment.prepare(b, section, k, True))


def run(values, section, train=True):
  step = jax.jit(lambda b, k: augment.prepare(b, section, k, train))
  return step(values, KEY)


def train(values, key=KEY, **options):
  """Training inputs; one compilation per set of options and batch size."""
  return compiled(tuple(sorted(options.items())))(values, key)


# ---------------------------------------------------------------- prepare


def test_evaluation_only_normalises():
  section = data(mixup=0.5, **EVERYTHING)
  section.video.mean, section.video.std = (0.5, 0.4, 0.3), (0.5, 0.2, 0.1)
  section.fbank.mean, section.fbank.std = -5.0, 4.0
  values = batch()
  inputs = run(values, section, train=False)
  contract.check(inputs, contract.INPUTS)
  scaled = values["frames"] / 255
  np.testing.assert_allclose(
    inputs["frames"],
    (scaled - [0.5, 0.4, 0.3]) / [0.5, 0.2, 0.1],
    atol=1e-5,
  )
  mel = audio.fbank(values["waveform"], section.fbank, 16_000, np)
  np.testing.assert_allclose(inputs["fbank"], (mel + 5) / 4, atol=1e-3)
  assert inputs["fbank"].shape == (8, 10, 128)
  assert "waveform" not in inputs
  assert "mix/audio" not in inputs


def test_default_mean_and_std_give_minus_one_to_one():
  values = {"frames": np.array([0, 255, 51], np.uint8).reshape(1, 1, 1, 1, 3)}
  inputs = run(values, data(), train=False)
  np.testing.assert_allclose(inputs["frames"].ravel(), [-1, 1, -0.6], atol=1e-6)


def test_precomputed_fbank_is_taken_as_is():
  mel = np.full((2, 10, 128), 3.0, np.float32)
  section = data()
  section.fbank.mean = 9.0
  values = {**batch(2), "fbank": mel}
  np.testing.assert_array_equal(run(values, section, False)["fbank"], mel)


def test_training_does_not_depend_on_place_in_the_batch():
  values = batch()
  order = np.array([3, 0, 7, 5, 1, 2, 6, 4])
  inputs = train(values, **EVERYTHING)
  moved = train({k: v[order] for k, v in values.items()}, **EVERYTHING)
  for name in ("frames", "fbank"):
    np.testing.assert_allclose(
      moved[name], np.asarray(inputs[name])[order], atol=1e-5
    )


def test_training_does_not_depend_on_the_number_of_devices():
  options = {"mixup": 0.5, "mixup_per_modality": True, **EVERYTHING}
  values = batch(16)
  mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
  sharded = jax.device_put(values, NamedSharding(mesh, PartitionSpec("data")))
  inputs, spread = train(values, **options), train(sharded, **options)
  contract.check(inputs, contract.INPUTS)
  assert len(spread["frames"].sharding.device_set) == 8
  for name in ("frames", "fbank", "mix/audio", "mix/video"):
    np.testing.assert_allclose(spread[name], inputs[name], atol=1e-4)


def test_examples_get_different_draws_and_steps_too():
  values = batch(32)
  values["frames"][:] = np.arange(4, dtype=np.uint8)[:, None]
  first = np.asarray(train(values, flip=0.5)["frames"])[:, 0, 0, 0, 0]
  assert 6 < (first > -1).sum() < 26
  other = train(values, jax.random.key(8), flip=0.5)["frames"]
  assert (np.asarray(other)[:, 0, 0, 0, 0] != first).any()


def test_one_augmentation_does_not_change_the_draws_of_another():
  values = batch(8)
  values["frames"][:] = np.arange(4, dtype=np.uint8)[:, None] * 40
  plain = np.asarray(train(values, flip=0.5)["frames"])
  with_grey = np.asarray(train(values, flip=0.5, grey=1.0)["frames"])
  np.testing.assert_allclose(plain, with_grey, atol=1e-3)


@pytest.mark.parametrize(
  "change, words",
  [
    ({"frames": np.zeros((2, 1, 2, 4, 4, 3), np.uint8)}, "fold views"),
    ({"frames": np.zeros((2, 2, 4, 4, 3), np.float32)}, "expected uint8"),
    ({"waveform": np.zeros((2, 2, 1600), np.int16)}, "2 dimensions"),
  ],
)
def test_wrong_rank_or_type_is_refused(change, words):
  with pytest.raises(InputError, match=words):
    augment.prepare({**batch(2), **change}, data(), KEY, False)


def test_training_without_index_is_refused():
  values = batch(2)
  del values["index"]
  with pytest.raises(InputError, match="index"):
    augment.prepare(values, data(), KEY, True)


# ---------------------------------------------------------------- frames


def test_flip_mirrors_the_chosen_clip_only():
  frames = np.arange(3, dtype=np.uint8)[None, None, None, :, None]
  frames = jnp.asarray(np.broadcast_to(frames, (2, 2, 1, 3, 3)))
  flipped = augment.flip(frames, jnp.array([True, False]))
  assert flipped[0, 1, 0, :, 0].tolist() == [2, 1, 0]
  assert flipped[1, 1, 0, :, 0].tolist() == [0, 1, 2]


def pixels(*colours):
  return jnp.asarray(colours, jnp.float32).reshape(1, 1, 1, -1, 3)


COLOURS = [(0.9, 0.5, 0.1), (0.2, 0.3, 0.25), (0.4, 0.4, 0.4), (0.1, 0.2, 0.8)]


def test_hue_turns_red_to_green_and_keeps_grey():
  turned = augment.adjust_hue(
    pixels((1, 0, 0), (0.5, 0.5, 0.5)), jnp.array([1 / 3])
  )
  np.testing.assert_allclose(
    turned[0, 0, 0], [[0, 1, 0], [0.5, 0.5, 0.5]], atol=1e-6
  )


@pytest.mark.parametrize("turn", [-0.2, 0.13])
def test_hue_agrees_with_colorsys(turn):
  expected = []
  for colour in COLOURS:
    h, s, v = colorsys.rgb_to_hsv(*colour)
    expected.append(colorsys.hsv_to_rgb((h + turn) % 1, s, v))
  turned = augment.adjust_hue(pixels(*COLOURS), jnp.array([turn]))
  np.testing.assert_allclose(turned[0, 0, 0], expected, atol=1e-6)


@pytest.mark.parametrize("factor", [0.6, 1.4])
def test_saturation_agrees_with_colorsys(factor):
  expected = []
  for colour in COLOURS:
    h, s, v = colorsys.rgb_to_hsv(*colour)
    expected.append(colorsys.hsv_to_rgb(h, min(1, s * factor), v))
  changed = augment.adjust_saturation(pixels(*COLOURS), jnp.array([factor]))
  np.testing.assert_allclose(changed[0, 0, 0], expected, atol=1e-6)


def test_jitter_brightness_contrast_and_clip():
  none = {
    "brightness": jnp.zeros(1),
    "saturation": jnp.ones(1),
    "contrast": jnp.ones(1),
    "hue": jnp.zeros(1),
  }
  dark_light = pixels((0.2, 0.2, 0.2), (0.8, 0.8, 0.8))

  def levels(**change):
    changed = augment.colour_jitter(dark_light, **{**none, **change})
    return changed[0, 0, 0, :, 0].tolist()

  assert levels() == pytest.approx([0.2, 0.8])
  assert levels(brightness=jnp.array([0.1])) == pytest.approx([0.3, 0.9])
  # The mean is .5: .5 -+ .3 * 1.4.
  assert levels(contrast=jnp.array([1.4])) == pytest.approx([0.08, 0.92])
  assert levels(contrast=jnp.array([2.0])) == pytest.approx([0.0, 1.0])


def test_jitter_is_the_same_for_all_frames_of_a_clip():
  values = batch(4)
  values["frames"][:, 1] = values["frames"][:, 0]
  frames = np.asarray(train(values, colour=1.0)["frames"])
  np.testing.assert_allclose(frames[:, 0], frames[:, 1], atol=1e-6)
  plain = np.asarray(train(values)["frames"])
  assert (np.abs(frames - plain).max(axis=(1, 2, 3, 4)) > 0.05).all()


def test_grey_is_luma():
  changed = augment.grey(
    jnp.concatenate([pixels((1, 0.5, 0))] * 2), jnp.array([True, False])
  )
  np.testing.assert_allclose(changed[0, 0, 0, 0], [0.5924] * 3, atol=1e-6)
  np.testing.assert_allclose(changed[1, 0, 0, 0], [1, 0.5, 0])


# ---------------------------------------------------------------- sound


def test_time_shift_rolls_towards_later_times():
  values = jnp.arange(4.0).reshape(1, 4, 1).repeat(2, axis=0)
  shifted = augment.time_shift(values, jnp.array([1, 0]))
  assert shifted[0, :, 0].tolist() == [3, 0, 1, 2]
  assert shifted[1, :, 0].tolist() == [0, 1, 2, 3]


def test_spans_have_their_width_and_place():
  def removed(width, start, length=6, size=4):
    mask = augment.spans(jnp.array([width]), jnp.array([start]), length, size)
    return np.flatnonzero(mask[0]).tolist()

  assert removed([0.5], [0.0]) == [0, 1]  # floor(.5 * 4) = 2 wide
  assert removed([0.5], [0.999]) == [4, 5]  # the last of five places
  assert removed([0.0], [0.5]) == []
  assert removed([0.999, 0.25], [0.0, 0.999]) == [0, 1, 2, 5]
  assert removed([0.999], [0.999], length=3, size=48) == [0, 1, 2]


def test_masked_cells_are_zero_after_normalisation():
  section = data(freq_masks=1, freq_size=128, time_masks=1, time_size=10)
  section.fbank.mean = -100.0
  mel = np.asarray(run(batch(16), section)["fbank"])
  masked = mel == 0
  whole_bins, whole_frames = masked.all(axis=1), masked.all(axis=2)
  rebuilt = whole_bins[:, None, :] | whole_frames[:, :, None]
  np.testing.assert_array_equal(rebuilt, masked)
  assert 20 < whole_bins.sum(axis=1).mean() < 110
  assert 1 < whole_frames.sum(axis=1).mean() < 9


# ---------------------------------------------------------------- mixup


def test_partner_is_the_neighbour():
  assert augment.partner(jnp.arange(6)).tolist() == [1, 0, 3, 2, 5, 4]


def test_odd_batches_are_refused():
  with pytest.raises(InputError, match="batch of 3"):
    train(batch(3), mixup=0.5)


def golden_inputs():
  rng = np.random.default_rng(77)
  rgb = rng.uniform(-1, 1, (2, 4, 32, 32, 3)).astype(np.float32)
  return rgb, rng.standard_normal((2, 80, 32, 1)).astype(np.float32)


@pytest.mark.parametrize("per_modality", [0, 1])
def test_golden_mixup(per_modality):
  golden = np.load(DATA / "avmae_tiny_mbt.npz")
  name = f"mixup/mixmod{per_modality}"
  weights = golden[f"{name}/lambda"]
  inputs = zip(("rgb", "spectrogram"), golden_inputs(), strict=True)
  for position, (modality, values) in enumerate(inputs):
    weight = jnp.full(2, weights[position * per_modality])
    mixed = augment.mixup(jnp.asarray(values), weight)
    np.testing.assert_allclose(
      mixed.reshape(2, -1)[:, ::97],
      golden[f"{name}/input_{modality}_sample"],
      atol=1e-5,
    )


def test_one_weight_or_one_per_modality():
  shared = train(batch(4), mixup=0.5)
  assert len(set(np.asarray(shared["mix/audio"]))) == 1
  np.testing.assert_array_equal(shared["mix/audio"], shared["mix/video"])
  apart = train(batch(4), mixup=0.5, mixup_per_modality=True)
  assert apart["mix/audio"][0] != apart["mix/video"][0]
  weight = float(apart["mix/video"][0])
  plain = train(batch(4))["frames"]
  np.testing.assert_allclose(
    apart["frames"][0],
    weight * plain[0] + (1 - weight) * plain[1],
    atol=1e-5,
  )


def test_a_clip_whose_partner_lacks_sound_keeps_its_own():
  values = batch(4)
  values["has_audio"] = np.array([True, False, True, True])
  inputs = train(values, mixup=0.5)
  assert inputs["mix/audio"][:2].tolist() == [1, 1]
  assert inputs["mix/audio"][2] < 1
  assert inputs["mix/video"][0] < 1
  np.testing.assert_array_equal(inputs["has_audio"], values["has_audio"])
  plain = train(values)["fbank"]
  np.testing.assert_allclose(inputs["fbank"][:2], plain[:2], atol=1e-5)
