"""The filterbank against Kaldi's numbers, on the host and the device."""

import pathlib

import jax
import jax.numpy as jnp
import kaldi_native_fbank as knf
import numpy as np
import pytest

from avjax.config import data_section
from avjax.data import audio
from avjax.errors import InputError

DATA = pathlib.Path(__file__).parent / "data"
RATE = 16_000
MELS = 80  # kaldi-native-fbank refuses the empty triangles of 128
MODULES = pytest.mark.parametrize("xp", [np, jnp], ids=["host", "device"])


def section(**changes):
  fbank = data_section().fbank
  fbank.window, fbank.edges = "hanning", "snip"
  fbank.update(changes)
  return fbank


def noise(seconds=2.0, level=0.1):
  rng = np.random.default_rng(3)
  samples = rng.standard_normal(int(seconds * RATE)) * level
  return samples.astype(np.float32)


def chirp(seconds=2.0):
  t = np.arange(int(seconds * RATE)) / RATE
  phase = 2 * np.pi * (200 * t + 150 * t**2)
  return (0.3 * np.sin(phase)).astype(np.float32)


def voiced(seconds=2.0):
  """A pulse train through two resonances with pauses: as speech is."""
  t = np.arange(int(seconds * RATE)) / RATE
  pitch = np.cumsum(120 + 20 * np.sin(2 * np.pi * 2 * t)) / RATE
  tone = sum(
    np.exp(-(((120 * k - 700) / 400) ** 2)) * np.sin(2 * np.pi * k * pitch)
    for k in range(1, 40)
  )
  gate = np.sin(2 * np.pi * 1.5 * t) > -0.3
  hiss = np.random.default_rng(5).standard_normal(t.size)
  return (0.1 * tone * gate + 0.003 * hiss).astype(np.float32)


def kaldi(waveform, window="hanning"):
  options = knf.FbankOptions()
  options.frame_opts.samp_freq = RATE
  options.frame_opts.dither = 0.0
  options.frame_opts.window_type = window
  options.frame_opts.snip_edges = True
  options.mel_opts.num_bins = MELS
  options.htk_compat = True
  online = knf.OnlineFbank(options)
  online.accept_waveform(RATE, waveform.tolist())
  online.input_finished()
  frames = range(online.num_frames_ready)
  return np.stack([online.get_frame(i) for i in frames])


@MODULES
def test_golden_kaldi_frames(xp):
  t = np.arange(160_000) / RATE
  hiss = np.random.default_rng(0).standard_normal(160_000)
  wave = 0.3 * np.sin(2 * np.pi * (200 * t + 150 * t**2)) + 0.05 * hiss
  wave = wave.astype(np.float32)
  wave = wave - wave.mean()
  ours = np.asarray(audio.fbank(wave, section(), RATE, xp))
  assert ours.shape == (998, 128)
  golden = np.load(DATA / "fbank_kaldi.npz")["frames_every_25"]
  error = np.abs(ours[::25] - golden)
  assert error.mean() <= 1e-4
  assert error.max() <= 1e-3


# Near-silent bins of a pure tone differ by 1e-2 among references themselves.
@MODULES
@pytest.mark.parametrize(
  "signal, worst", [(noise, 1e-3), (voiced, 1e-3), (chirp, 2e-2)]
)
@pytest.mark.parametrize("window", ["hanning", "hamming"])
def test_agrees_with_kaldi_native_fbank(xp, signal, worst, window):
  wave = signal()
  fbank = section(window=window, num_mels=MELS)
  ours = np.asarray(audio.fbank(wave, fbank, RATE, xp))
  error = np.abs(ours - kaldi(wave, window))
  assert error.mean() <= 1e-4
  assert error.max() <= worst


@MODULES
def test_int16_is_divided_by_32768(xp):
  samples = (noise() * 32768).round().astype(np.int16)
  floats = samples.astype(np.float32) / 32768
  np.testing.assert_array_equal(
    audio.fbank(samples, section(), RATE, xp),
    audio.fbank(floats, section(), RATE, xp),
  )


@MODULES
def test_silence_is_the_log_floor(xp):
  values = audio.fbank(np.zeros(4000, np.int16), section(), RATE, xp)
  np.testing.assert_allclose(values, np.log(1.1920929e-07), rtol=1e-6)


@pytest.mark.parametrize(
  "seconds, edges, frames",
  [(10, "snip", 998), (10, "same", 1000), (8, "same", 800), (3, "same", 300)],
)
def test_number_of_frames(seconds, edges, frames):
  shape = jax.eval_shape(
    lambda x: audio.fbank(x, section(edges=edges), RATE),
    jax.ShapeDtypeStruct((2, seconds * RATE), jnp.int16),
  )
  assert shape.shape == (2, frames, 128)
  assert audio.num_frames(seconds * RATE, section(edges=edges), RATE) == frames


@MODULES
def test_same_pads_the_tail_with_zeros(xp):
  wave = noise(1.0)
  same = audio.fbank(wave, section(edges="same"), RATE, xp)
  padded = np.concatenate([wave, np.zeros(240, np.float32)])
  snip = audio.fbank(padded, section(), RATE, xp)
  np.testing.assert_allclose(same, snip, atol=1e-6)


def test_host_and_device_agree_on_a_batch():
  wave = np.stack([noise(), voiced()])
  host = audio.fbank(wave, section(), RATE, np)
  device = jax.jit(lambda x: audio.fbank(x, section(), RATE))(wave)
  np.testing.assert_allclose(host, device, atol=1e-3)
  assert host.dtype == device.dtype == np.float32


def test_without_mean_removal_a_constant_is_heard():
  constant = np.full(4000, 0.5, np.float32)
  with_dc = audio.fbank(constant, section(remove_dc=False), RATE, np)
  without = audio.fbank(constant, section(), RATE, np)
  assert with_dc.max() > -5
  assert without.max() < -15


def test_mel_triangles():
  mel = audio.mel_matrix(16_000, 512, 128, 20.0, 8000.0)
  assert mel.shape == (256, 128)
  # 1000 Hz is bin 32: mel 999.99, between the peaks of triangles 43 and 44.
  assert set(np.flatnonzero(mel[32])) == {43, 44}
  # Inside the band neighbouring triangles sum to one.
  np.testing.assert_allclose(mel[5:250].sum(axis=1), 1.0, atol=1e-9)
  assert mel[0].sum() == 0


def test_normalise():
  values = np.full((2, 3), 4.0, np.float32)
  np.testing.assert_allclose(
    audio.normalise(values, section(mean=2.0, std=4.0)), 0.5
  )


@pytest.mark.parametrize(
  "changes, samples, words",
  [
    ({}, 399, "waveform of 399 samples .* needs 400"),
    ({"edges": "same"}, 159, "waveform of 159 samples"),
    ({"window": "haning"}, 400, "Did you mean 'hanning'"),
    ({"edges": "smae"}, 400, "Did you mean 'same'"),
    ({"high_hz": 9000.0}, 400, "20.0..9000.0 Hz .* 0..8000"),
    ({"hop_ms": 0.01}, 400, "every 0 at 16000 Hz"),
  ],
)
def test_bad_input_is_refused(changes, samples, words):
  wave = np.zeros(samples, np.float32)
  with pytest.raises(InputError, match=words):
    audio.fbank(wave, section(**changes), RATE, np)


def test_other_integers_are_refused():
  with pytest.raises(InputError, match="int32; expected int16"):
    audio.fbank(np.zeros(4000, np.int32), section(), RATE, np)
