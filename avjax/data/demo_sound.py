"""The sounds of `av_demo`: eighteen synthetic voices, noises and the mix.

A voice is a function `(rng, onsets, length) -> [s]` at `RATE`: `onsets` are
seconds from the start of the event at which something happens (a string is
plucked, a bell struck, an engine revved), `length` is the event in samples.
The pictures move at the same onsets.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float, Int16

RATE = 16_000
FADE = 0.03  # seconds at the end of an event
LEVEL = 0.09  # root mean square of a main sound before its gain

Voice = Callable[[np.random.Generator, np.ndarray, int], np.ndarray]


def _seconds(length: int) -> np.ndarray:
  return np.arange(length) / RATE


def _spans(onsets: np.ndarray, length: int) -> list[tuple[int, int]]:
  """Sample range from each onset to the next one (the last: to the end)."""
  starts = np.minimum(np.round(onsets * RATE).astype(int), length - 1)
  ends = [*starts[1:].tolist(), length]
  return list(zip(starts.tolist(), ends, strict=True))


def _since(onsets: np.ndarray, length: int) -> np.ndarray:
  """Seconds since the latest onset; before the first one it counts from 0."""
  t = _seconds(length)
  k = np.searchsorted(onsets, t, side="right") - 1
  return t - np.where(k >= 0, onsets[np.maximum(k, 0)], 0.0)


def _cycle(onsets: np.ndarray, length: int) -> np.ndarray:
  """Phase that grows by 1 from onset to onset."""
  step = float(np.mean(np.diff(onsets))) if len(onsets) > 1 else 0.8
  t = np.concatenate([[onsets[0] - step], onsets, [onsets[-1] + step]])
  n = np.arange(len(t), dtype=float)
  late = np.maximum(_seconds(length) - t[-1], 0) / step
  return np.interp(_seconds(length), t, n) + late


def _harmonics(hertz: np.ndarray, amplitudes: Sequence[float]) -> np.ndarray:
  """Sum over k of amplitudes[k-1] * sin(k * phase), by Horner's rule."""
  z = np.exp(2j * np.pi * np.cumsum(hertz) / RATE)
  total = np.zeros_like(z)
  for amplitude in reversed(amplitudes):
    total = (total + amplitude) * z
  return total.imag


def _recursive(b: Sequence[float], a: Sequence[float], x: np.ndarray):
  """The filter of these coefficients, applied to x [s]."""
  from scipy import signal  # Takes a second, and few runs draw clips.

  return signal.lfilter(b, a, x)


def _band(x: np.ndarray, low: float, high: float, order: int = 2) -> np.ndarray:
  """Band-pass; low = 0 makes it a low-pass."""
  from scipy import signal  # As above.

  if low <= 0:
    sos = signal.butter(order, high, "low", fs=RATE, output="sos")
  else:
    sos = signal.butter(order, [low, high], "band", fs=RATE, output="sos")
  return signal.sosfilt(sos, x)


def _resonances(x: np.ndarray, hertz: Sequence[float], width: float):
  """Sum of two-pole resonators with unit gain at their centres."""
  total = np.zeros_like(x)
  radius = np.exp(-np.pi * width / RATE)
  for f in hertz:
    a = [1.0, -2 * radius * np.cos(2 * np.pi * f / RATE), radius**2]
    total += _recursive([1 - radius, 0, radius - 1], a, x)
  return total


def _attack_decay(t: np.ndarray, attack: float, decay: float) -> np.ndarray:
  """Linear rise over `attack` seconds, then an exponential fall."""
  return np.minimum(t / attack, 1.0) * np.exp(
    -np.maximum(t - attack, 0) / decay
  )


SCALE = 2.0 ** (np.array([0, 2, 4, 7, 9, 12]) / 12)  # major pentatonic


def _tune(rng: np.random.Generator, low: float, high: float, count: int):
  """`count` notes of a pentatonic scale with its root in low..high Hz."""
  root = low * (high / low) ** rng.random()
  return root * rng.choice(SCALE, size=count)


# --- Instruments.


def _string(rng: np.random.Generator, hertz: float, length: int, damp: float):
  """Karplus-Strong: a noise burst in a delay line with a mean-of-two loop."""
  period = max(int(round(RATE / hertz)), 2)
  line = rng.uniform(-1, 1, period)
  line = 0.5 * (line + np.roll(line, 1))
  count = -(-length // period)
  out = np.empty((count, period))
  last = 0.0
  for row in out:
    row[:] = line
    fed = np.concatenate([[last], line[:-1]])
    last = line[-1]
    line = damp * 0.5 * (line + fed)
  return out.reshape(-1)[:length]


def plucked(rng, onsets, length):
  """Strummed strings: a chord of three Karplus-Strong strings an onset."""
  out = np.zeros(length)
  roots = _tune(rng, 98.0, 196.0, len(onsets))
  for (start, end), root in zip(_spans(onsets, length), roots, strict=True):
    for k, ratio in enumerate((1.0, 1.5, 2.52)):
      begin = start + int(0.012 * k * RATE)
      if begin < end:
        note = _string(rng, root * ratio, end - begin, 0.992)
        out[begin:end] += note
  return out


def bowed(rng, onsets, length):
  """Sawtooth with vibrato through the resonances of a wooden body."""
  t, since = _seconds(length), _since(onsets, length)
  hertz = np.empty(length)
  notes = _tune(rng, 262.0, 440.0, len(onsets))
  hertz[:] = notes[0]
  for (start, end), note in zip(_spans(onsets, length), notes, strict=True):
    hertz[start:end] = note
  vibrato = 1 + 0.008 * np.sin(2 * np.pi * rng.uniform(5, 6.5) * t)
  saw = _harmonics(hertz * vibrato, [1 / k for k in range(1, 15)])
  saw += 0.08 * rng.standard_normal(length)
  tone = 0.5 * saw + _resonances(saw, (480.0, 1150.0, 2700.0), 250.0)
  return tone * np.minimum(0.25 + since / 0.08, 1.0)


def pipe(rng, onsets, length):
  """A blown pipe: few harmonics, breath noise, tremolo, soft onsets."""
  t, since = _seconds(length), _since(onsets, length)
  out = np.empty(length)
  notes = _tune(rng, 392.0, 740.0, len(onsets))
  out[:] = notes[0]
  for (start, end), note in zip(_spans(onsets, length), notes, strict=True):
    out[start:end] = note
  tremolo = 1 + 0.2 * np.sin(2 * np.pi * rng.uniform(4, 6) * t)
  tone = _harmonics(out, (1.0, 0.25, 0.12, 0.03)) * tremolo
  breath = _band(rng.standard_normal(length), 700.0, 3000.0)
  return (tone + 0.12 * breath) * np.minimum(since / 0.06, 1.0)


def kick(rng, onsets, length):
  """A large membrane: a sine that falls in pitch, and a click."""
  top = rng.uniform(120, 190)
  out = np.zeros(length)
  for start, end in _spans(onsets, length):
    t = _seconds(end - start)
    hertz = 45 + (top - 45) * np.exp(-t / 0.05)
    out[start:end] = _harmonics(hertz, (1.0, 0.3)) * np.exp(-t / 0.16)
    out[start:end] += 0.3 * np.exp(-t / 0.004) * rng.standard_normal(len(t))
  return out


def snare(rng, onsets, length):
  """Two membrane modes and the rattle of the wires."""
  since = _since(onsets, length)
  hertz = rng.uniform(170, 240)
  wires = _band(rng.standard_normal(length), 1200.0, 7000.0)
  tone = np.sin(2 * np.pi * hertz * since)
  tone += 0.6 * np.sin(2 * np.pi * 1.6 * hertz * since)
  hit = since < np.where(_seconds(length) >= onsets[0], np.inf, 0)
  decay = rng.uniform(0.07, 0.12)
  return hit * (
    wires * np.exp(-since / decay) + 0.7 * tone * np.exp(-since / 0.06)
  )


def chime(rng, onsets, length):
  """Struck metal: inharmonic partials, the high ones dying first."""
  partials = np.array([0.5, 1.0, 1.2, 1.5, 2.0, 2.74, 3.76, 5.4])
  gains = np.array([0.4, 1.0, 0.6, 0.3, 0.7, 0.5, 0.3, 0.2])
  out = np.zeros(length)
  strikes = np.zeros((2, length))
  which = rng.integers(0, 2, len(onsets))
  starts = [start for start, _ in _spans(onsets, length)]
  strikes[which, starts] = rng.uniform(0.7, 1.0, len(onsets))
  low = 420 * 2.2 ** rng.random()
  for strike, root in zip(strikes, (low, low * 1.335), strict=True):
    for ratio, gain in zip(partials, gains, strict=True):
      f = root * ratio
      if f < 7600 and strike.any():
        radius = np.exp(-1 / (RATE * 0.55 / (0.4 + 0.6 * ratio)))
        w = 2 * np.pi * f / RATE
        a = [1.0, -2 * radius * np.cos(w), radius**2]
        out += _recursive([gain * np.sin(w)], a, strike)
  return out


# --- Animals.


def bark(rng, onsets, length):
  """Short voiced bursts, pitch up and down, through a throat."""
  out = np.zeros(length)
  pitch = rng.uniform(240, 420)
  for start, end in _spans(onsets, length):
    n = min(int(rng.uniform(0.13, 0.2) * RATE), end - start)
    u = np.arange(n) / n
    hertz = pitch * (0.7 + 0.8 * np.sin(np.pi * u**0.7))
    burst = _harmonics(hertz, [0.85**k for k in range(14)])
    burst += 1.1 * rng.standard_normal(n)
    out[start : start + n] = burst * np.sin(np.pi * u**0.5) ** 0.6
  return _resonances(out, (750.0, 1500.0, 2600.0), 350.0)


def howl(rng, onsets, length):
  """Long glides, almost pure, with a slow vibrato."""
  out = np.zeros(length)
  pitch = rng.uniform(330, 560)
  for start, end in _spans(onsets, length):
    u = np.arange(end - start) / (end - start)
    glide = 0.62 + 0.42 * np.minimum(u / 0.3, 1) - 0.25 * np.maximum(u - 0.7, 0)
    wobble = 1 + 0.012 * np.sin(2 * np.pi * 6 * u * (end - start) / RATE)
    tone = _harmonics(pitch * glide * wobble, (1.0, 0.35, 0.1, 0.04))
    out[start:end] = tone * np.sin(np.pi * u) ** 0.5
  return out


def chirp(rng, onsets, length):
  """Volleys of short, fast upward sweeps at 3-5 kHz."""
  out = np.zeros(length)
  centre = rng.uniform(3000, 4800)
  pulses = int(rng.integers(3, 6))
  n = int(0.032 * RATE)
  u = np.arange(n) / n
  pulse = _harmonics(centre * (0.85 + 0.3 * u), (1.0, 0.15))
  pulse *= np.sin(np.pi * u) ** 2
  for start, end in _spans(onsets, length):
    for k in range(pulses):
      begin = start + k * int(0.048 * RATE)
      if begin + n <= end:
        out[begin : begin + n] += pulse
  return out


# --- Vehicles and machines.


def engine(rng, onsets, length):
  """Firing pulses with jitter; the revs jump at each onset and fall back."""
  since = _since(onsets, length)
  idle = rng.uniform(38, 60)
  revs = idle * (1 + 0.9 * _attack_decay(since, 0.12, 0.35))
  jitter = np.repeat(rng.standard_normal(-(-length // 160)), 160)[:length]
  tone = _harmonics(revs * (1 + 0.03 * jitter), [0.9**k for k in range(26)])
  tone *= 1 + 0.5 * _harmonics(revs / 4, (1.0,))
  tone += 0.25 * rng.standard_normal(length)
  return _band(np.tanh(tone), 0.0, 900.0) * (0.6 + 0.4 * revs / idle)


def siren(rng, onsets, length):
  """A two-octave wail that peaks at each onset."""
  wave = 0.5 + 0.5 * np.cos(2 * np.pi * _cycle(onsets, length))
  hertz = rng.uniform(480, 640) * 2.0 ** (1.25 * wave)
  return np.tanh(1.8 * _harmonics(hertz, (1.0, 0.1, 0.3, 0.05, 0.1)))


def horn(rng, onsets, length):
  """Blasts of a chord of reeds."""
  since = _since(onsets, length)
  root = rng.uniform(155, 260)
  rich = [1.0, 0.9, 0.8, 0.7, 0.55, 0.4, 0.3, 0.2, 0.12, 0.08]
  total = np.zeros(length)
  for ratio in (1.0, 1.26, 1.5):
    detune = 1 + 0.004 * rng.standard_normal()
    total += _harmonics(np.full(length, root * ratio * detune), rich)
  step = float(np.min(np.diff(onsets))) if len(onsets) > 1 else 0.9
  blast = np.clip(since / 0.05, 0, 1) * np.clip(
    (0.72 * step - since) / 0.06, 0, 1
  )
  return total * blast


def tick(rng, onsets, length):
  """A dry click, high and low by turns."""
  strikes = np.zeros((2, length))
  for k, (start, _) in enumerate(_spans(onsets, length)):
    strikes[k % 2, start] = 1.0
  pitch = rng.uniform(1500, 2100)
  out = np.zeros(length)
  for strike, f in zip(strikes, (pitch, 1.35 * pitch), strict=True):
    out += _resonances(strike, (f, 2.3 * f), 220.0)
  return out


def alarm(rng, onsets, length):
  """Three electronic beeps an onset: odd harmonics of one pitch."""
  since = _since(onsets, length)
  beep = (since % 0.085 < 0.05) & (since < 3 * 0.085)
  beep &= _seconds(length) >= onsets[0]
  gate = _recursive([0.02], [1, -0.98], beep.astype(float))
  hertz = np.full(length, rng.uniform(880, 1500))
  return gate * _harmonics(hertz, (1.0, 0.0, 0.5, 0.0, 0.3))


def motor(rng, onsets, length):
  """A whining universal motor that slows under load after each onset."""
  since = _since(onsets, length)
  hertz = rng.uniform(170, 300) * (1 - 0.25 * _attack_decay(since, 0.08, 0.2))
  whine = _harmonics(hertz, [1.0 if k % 6 == 5 else 0.25 for k in range(24)])
  brush = _band(rng.standard_normal(length), 2500.0, 6500.0)
  buzz = 1 + 0.6 * _harmonics(hertz / 2, (1.0,))
  return whine + 0.5 * brush * buzz


# --- Toys and nature.


def thud(rng, onsets, length):
  """An inflated ball on a floor: a slap and two damped modes."""
  strikes = np.zeros(length)
  strikes[[start for start, _ in _spans(onsets, length)]] = 1.0
  low = rng.uniform(210, 330)
  body = _resonances(strikes, (low, 2.1 * low), 14.0)
  slap = _resonances(strikes, (700.0, 1100.0), 250.0)
  return body + 0.25 * slap


def squeak(rng, onsets, length):
  """A rubber toy: a reedy note bent up and down."""
  out = np.zeros(length)
  pitch = rng.uniform(900, 1400)
  for start, end in _spans(onsets, length):
    n = min(int(0.22 * RATE), end - start)
    u = np.arange(n) / n
    bend = pitch * (1 + 0.5 * np.sin(2 * np.pi * np.minimum(u * 1.1, 1)))
    note = _harmonics(bend, (1.0, 0.6, 0.45, 0.25, 0.15))
    out[start : start + n] = note * np.sin(np.pi * u) ** 0.5
  return out


def gust(rng, onsets, length):
  """Broad noise that swells to each onset and sweeps in pitch."""
  swell = 0.5 + 0.5 * np.cos(2 * np.pi * _cycle(onsets, length))
  noise = rng.standard_normal(length)
  low, high = _band(noise, 150.0, 700.0), _band(noise, 900.0, 3800.0)
  return 0.08 * low + swell**1.5 * (0.7 * low + high)


VOICES: dict[str, Voice] = {
  voice.__name__: voice
  for voice in (
    plucked, bowed, pipe, kick, snare, chime, bark, howl, chirp, engine,
    siren, horn, tick, alarm, motor, thud, squeak, gust,
  )
}  # fmt: skip

# Seconds from onset to onset, least and most. Two voices whose objects look
# alike have the same range, so that the rhythm of the motion tells nothing.
TEMPO: dict[str, tuple[float, float]] = {
  "plucked": (0.32, 0.6),
  "bowed": (0.32, 0.6),
  "pipe": (0.3, 0.6),
  "kick": (0.25, 0.55),
  "snare": (0.25, 0.55),
  "chime": (0.35, 0.7),
  "bark": (0.45, 0.8),
  "howl": (0.45, 0.8),
  "chirp": (0.3, 0.55),
  "engine": (0.6, 1.0),
  "siren": (0.6, 1.0),
  "horn": (0.7, 1.1),
  "tick": (0.3, 0.55),
  "alarm": (0.3, 0.55),
  "motor": (0.5, 0.9),
  "thud": (0.4, 0.7),
  "squeak": (0.4, 0.7),
  "gust": (0.7, 1.1),
}


# --- Noise and the mix.


def white(rng, length):
  """Equal power a hertz."""
  return rng.standard_normal(length)


def pink(rng, length):
  """Equal power an octave."""
  spectrum = np.fft.rfft(rng.standard_normal(length))
  spectrum /= np.sqrt(np.arange(1, len(spectrum) + 1))
  return np.fft.irfft(spectrum, length)


def rumble(rng, length):
  """Traffic far away: noise below 250 Hz."""
  return _band(rng.standard_normal(length), 0.0, 250.0)


def hum(rng, length):
  """Mains hum: 50 Hz and its odd harmonics, and a little noise."""
  tone = _harmonics(np.full(length, 50.0), (1.0, 0.1, 0.7, 0.1, 0.5, 0.0, 0.3))
  return tone + 0.2 * rng.standard_normal(length)


NOISES = {f.__name__: f for f in (white, pink, rumble, hum)}


@dataclasses.dataclass(frozen=True)
class Sound:
  """One sound of a clip.

  Attributes:
    voice: a key of VOICES.
    onsets: seconds from the start of the clip.
    start, end: of the event, seconds; silent outside.
    gain: decibels relative to LEVEL.
  """

  voice: str
  onsets: tuple[float, ...]
  start: float
  end: float
  gain: float


def render_sound(
  rng: np.random.Generator, sound: Sound, seconds: float
) -> Float[np.ndarray, "s"]:
  """One sound at its level and place in a clip of `seconds`.

  The level is that of the loudest 40 ms, so ticks and organs come out about
  equally loud. 0 outside start..end.
  """
  first, last = round(sound.start * RATE), round(sound.end * RATE)
  length = last - first
  onsets = np.asarray(sound.onsets) - sound.start
  wave = VOICES[sound.voice](rng, onsets, length)
  wave = wave - wave.mean()
  blocks = wave[: length // 640 * 640].reshape(-1, 640)
  loud = np.sqrt(np.mean(blocks**2, axis=1).max())
  wave *= LEVEL * 10 ** (sound.gain / 20) / max(loud, 1e-6)
  ramp = np.clip(_seconds(length)[::-1] / FADE, 0, 1)
  out = np.zeros(round(seconds * RATE))
  out[first:last] = wave * ramp
  return out


def mix(
  rng: np.random.Generator,
  sounds: Sequence[Sound],
  seconds: float,
  noise: str,
  snr: float,
) -> Int16[np.ndarray, "s"]:
  """All sounds of a clip and its noise, clipped softly to 16 bits.

  Args:
    rng: the clip's own generator.
    sounds: the main sound first.
    seconds: length of the clip.
    noise: a key of NOISES, or '' for none.
    snr: decibels by which LEVEL and the main sound's gain exceed the noise.
  """
  total = np.zeros(round(seconds * RATE))
  for sound in sounds:
    total += render_sound(rng, sound, seconds)
  if noise:
    floor = NOISES[noise](rng, len(total))
    level = LEVEL * 10 ** ((sounds[0].gain - snr) / 20)
    total += floor * (level / np.sqrt(np.mean(floor**2)))
  return (32767 * np.tanh(total)).astype(np.int16)
