"""From a batch of bytes to the inputs of a method, on the device.

`prepare` runs inside the jitted step. Everything it draws for an example comes
from `fold_in(rng, batch["index"])`, so an example's augmentation does not
depend on its place in the batch or on the number of devices; mixup draws one
weight per step, or one per example.

Order in training: flip, colour, grey (on values 0..1), normalise; log-mel,
normalise, circular time shift, SpecAugment, noise, roll; then mixup of both.
With `mixup_waveform` (CAV-MAE) the sound is mixed before the log-mel instead.
Stored features (UAVM): length 1 per token, mixup, roll of both modalities.

Each augmentation is a pure function of its own draws, one per example.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt8

from avjax import losses
from avjax.batch import MODALITIES, arrays
from avjax.data import audio
from avjax.data.mixing import mixup, partner
from avjax.errors import InputError, lookup

# Ranges of AV-MAE's and MBT's colour jitter.
BRIGHTNESS = 32 / 255  # added, at most
CONTRAST = (0.6, 1.4)  # factor
SATURATION = (0.6, 1.4)  # factor
HUE = 0.2  # of a turn, at most

LUMA = (0.2989, 0.5870, 0.1140)

# What mixup mixes, by modality; a waveform as such or as its log-mel.
MIXED = {
  "audio": ("fbank", "waveform", "features/audio"),
  "video": ("frames", "features/video"),
}

MASK_VALUES = ("normalised", "raw")

# Augmentations of frames and sound, which stored features have not.
OF_MEDIA = ("flip", "colour", "grey", "freq_masks", "time_masks", "time_shift",
            "noise", "mixup_waveform")  # fmt: skip

Flag = Bool[Array, "b"]
PerExample = Float[Array, "b"]
Frames = Float[Array, "b t h w 3"]
Fbank = Float[Array, "b t f"]


def prepare(
  batch: Mapping[str, Any], data: Any, rng: Array, train: bool
) -> dict[str, Any]:
  """Inputs (`avjax.batch.INPUTS`) from a batch (`avjax.batch.BATCH`).

  Args:
    batch: device arrays; `frames` [b t h w 3] uint8 and `waveform` [b s] int16
      without views (evaluators fold them into b before). A precomputed `fbank`
      is taken as is: it is already normalised.
    data: `config.data`.
    rng: key of this step.
    train: draw augmentations; without it nothing is random.

  Returns:
    The batch without `waveform` and `samples` (without which a waveform counts
    as whole); `frames` float32 normalised, `fbank` float32 normalised,
    `features/*` of length 1 per token, where zero tokens stay zero; with mixup
    `mix/audio` and `mix/video` [b]. Labels are not mixed: see
    `avjax.losses.mix_labels`. `has_audio`, `has_video` and all else pass
    through.

  Raises:
    InputError: a wrong rank or dtype, training without `index`, mixup of an
      odd batch or of waveforms that are not there, or options that exclude each
      other.
  """
  check_options(data)
  batch = {key: jnp.asarray(value) for key, value in arrays(batch).items()}
  inputs = {k: v for k, v in batch.items() if k not in ("waveform", "samples")}
  keys = _keys(batch, rng) if train else None
  weights = {}
  if train and data.augment.mixup > 0:
    if data.augment.mixup_waveform and "fbank" in batch:
      raise InputError(
        "data.augment.mixup_waveform needs waveforms; the batch holds a "
        "precomputed fbank"
      )
    weights = _weights(batch, data.augment, rng, keys)
  if "frames" in batch:
    _check(batch, "frames", 5, np.uint8)
    inputs["frames"] = _frames(batch["frames"], data, keys)
  if "waveform" in batch and "fbank" not in batch:
    _check(batch, "waveform", 2, np.int16)
    inputs["fbank"] = _log_mel(batch, data, weights.get("audio"))
  if train and "fbank" in inputs:
    inputs["fbank"] = _augment_fbank(inputs["fbank"], data, keys)
  features = [f"features/{m}" for m in MODALITIES if f"features/{m}" in batch]
  for key in features:
    _check(batch, key, 3, np.float32)
    inputs[key] = losses.unit(batch[key])
  inputs = _mixup(inputs, data.augment, weights)
  if train and features and data.augment.roll:
    shift = _roll(keys, data.augment.roll)
    inputs |= {key: time_shift(inputs[key], shift) for key in features}
  return inputs


def check_options(data: Any) -> None:
  """Refuses values of `config.data` that contradict each other.

  Raises:
    InputError: names both keys.
  """
  fbank, options = data.fbank, data.augment
  lookup(dict.fromkeys(MASK_VALUES), options.mask_value, "augment.mask_value")
  probability = options.mixup_probability
  apart = "with data.augment.mixup_per_modality: CAV-MAE has one weight for all"
  of_media = [k for k in OF_MEDIA if data.features and options[k]][:1]
  for wrong, words in (
    (
      fbank.frames and fbank.edges != "snip",
      f"data.fbank.frames={fbank.frames} goes with edges='snip', not "
      f"{fbank.edges!r}",
    ),
    (fbank.frames < 0, f"data.fbank.frames={fbank.frames} is negative"),
    (
      options.noise < 0 or options.roll < 0,
      f"data.augment.noise={options.noise} and roll={options.roll} must be 0 "
      "or more",
    ),
    (
      options.roll and options.time_shift,
      f"data.augment.roll={options.roll} and time_shift both turn the sound; "
      "set one",
    ),
    (
      not 0 < probability <= 1,
      f"data.augment.mixup_probability={probability} is not above 0 and "
      "at most 1; data.augment.mixup=0.0 turns mixup off",
    ),
    (
      _per_example(options) and options.mixup_per_modality,
      f"data.augment.mixup_probability={probability}, mixup_waveform="
      f"{options.mixup_waveform} {apart}",
    ),
    (
      of_media,
      f"data.augment.{''.join(of_media)} acts on frames or sound; stored "
      f"features (data.features={data.features!r}) have mixup and roll",
    ),
    (
      options.mixup_waveform and not fbank.remove_mean,
      "data.augment.mixup_waveform mixes waveforms without their means; set "
      "data.fbank.remove_mean",
    ),
  ):
    if wrong:
      raise InputError(words)


def _check(batch: Mapping[str, Any], key: str, rank: int, dtype: Any) -> None:
  value = batch[key]
  if value.ndim != rank or value.dtype != dtype:
    raise InputError(
      f"batch[{key!r}] is {value.dtype} {tuple(value.shape)}; expected "
      f"{np.dtype(dtype)} of {rank} dimensions (fold views into the batch)"
    )


# ---------------------------------------------------------------- draws


def _keys(batch: Mapping[str, Any], rng: jax.Array) -> jax.Array:
  if "index" not in batch:
    raise InputError("batch['index'] is missing; training draws depend on it")
  return jax.vmap(jax.random.fold_in, (None, 0))(rng, batch["index"])


# Each kind of draw has its own stream, so that switching one augmentation on
# does not change another's draws.
_STREAMS = (
  "flip",
  "colour",
  "brightness",
  "contrast",
  "saturation",
  "hue",
  "grey",
  "time_shift",
  "freq_masks",
  "time_masks",
  "mixup",
  "mixup_happens",
  "noise",
  "noise_size",
  "roll",
)


def _stream(key: jax.Array, name: str) -> jax.Array:
  return jax.random.fold_in(key, _STREAMS.index(name))


def _uniform(
  keys: jax.Array, name: str, low: float, high: float, shape: tuple = ()
) -> jax.Array:
  """One draw [b, *shape] per example."""

  def draw(key: jax.Array) -> jax.Array:
    key = _stream(key, name)
    return jax.random.uniform(key, shape, minval=low, maxval=high)

  return jax.vmap(draw)(keys)


def _happens(keys: jax.Array, name: str, probability: float) -> jax.Array:
  return _uniform(keys, name, 0.0, 1.0) < probability


# ---------------------------------------------------------------- frames


def _frames(frames: jax.Array, data: Any, keys: jax.Array | None) -> jax.Array:
  options = data.augment
  if keys is not None and options.flip > 0:
    frames = flip(frames, _happens(keys, "flip", options.flip))
  values = frames.astype(jnp.float32) / 255
  if keys is not None and options.colour > 0:
    jittered = colour_jitter(
      values,
      brightness=_uniform(keys, "brightness", -BRIGHTNESS, BRIGHTNESS),
      saturation=_uniform(keys, "saturation", *SATURATION),
      contrast=_uniform(keys, "contrast", *CONTRAST),
      hue=_uniform(keys, "hue", -HUE, HUE),
    )
    chosen = _happens(keys, "colour", options.colour)
    values = jnp.where(_per_frame(chosen), jittered, values)
  if keys is not None and options.grey > 0:
    values = grey(values, _happens(keys, "grey", options.grey))
  mean = jnp.asarray(data.video.mean, jnp.float32)
  std = jnp.asarray(data.video.std, jnp.float32)
  return (values - mean) / std


def _per_frame(values: Array) -> Array:
  return values[:, None, None, None, None]


def flip(
  frames: UInt8[Array, "b t h w 3"], chosen: Flag
) -> UInt8[Array, "b t h w 3"]:
  """Mirrors left and right of the chosen clips, all frames alike."""
  return jnp.where(_per_frame(chosen), frames[:, :, :, ::-1], frames)


def colour_jitter(
  frames: Frames,
  *,
  brightness: PerExample,
  saturation: PerExample,
  contrast: PerExample,
  hue: PerExample,
) -> Frames:
  """Brightness, saturation, contrast, hue, in this order, then clip to 0..1.

  Args:
    frames: values in 0..1; one draw per clip holds for all of its frames.
    brightness: added to every value.
    saturation: factor of HSV saturation, which is cut at 1.
    contrast: factor of the distance to the mean of each frame and channel.
    hue: turn of HSV hue, in whole turns.
  """
  frames = frames + _per_frame(brightness)
  frames = adjust_saturation(frames, saturation)
  mean = frames.mean(axis=(2, 3), keepdims=True)
  frames = mean + (frames - mean) * _per_frame(contrast)
  return jnp.clip(adjust_hue(frames, hue), 0.0, 1.0)


def adjust_saturation(frames: Frames, factor: PerExample) -> Frames:
  """Scales HSV saturation, cut at 1, with hue and value kept."""
  value = frames.max(axis=-1, keepdims=True)
  chroma = value - frames.min(axis=-1, keepdims=True)
  # Saturation is chroma / value, so the factor is at most value / chroma.
  most = jnp.maximum(value, 0.0) / jnp.maximum(chroma, 1e-12)
  factor = jnp.minimum(_per_frame(factor), most)
  return value - (value - frames) * factor


def adjust_hue(frames: Frames, turn: PerExample) -> Frames:
  """Turns HSV hue with saturation and value kept."""
  red, green, blue = jnp.split(frames, 3, axis=-1)
  value = frames.max(axis=-1, keepdims=True)
  chroma = value - frames.min(axis=-1, keepdims=True)
  safe = jnp.maximum(chroma, 1e-12)
  # Hue in sixths of a turn from red.
  hue = jnp.where(
    value == red,
    (green - blue) / safe,
    jnp.where(
      value == green, 2 + (blue - red) / safe, 4 + (red - green) / safe
    ),
  )
  hue = hue + 6 * _per_frame(turn)
  sector = (jnp.asarray([5.0, 3.0, 1.0]) + hue) % 6
  fall = jnp.clip(jnp.minimum(sector, 4 - sector), 0.0, 1.0)
  return value - chroma * fall


def grey(frames: Frames, chosen: Flag) -> Frames:
  """Replaces the chosen clips' three channels by their luma."""
  luma = (frames * jnp.asarray(LUMA, frames.dtype)).sum(axis=-1)
  return jnp.where(_per_frame(chosen), luma[..., None], frames)


# ---------------------------------------------------------------- sound


def _log_mel(
  batch: Mapping[str, Any], data: Any, weight: jax.Array | None
) -> jax.Array:
  """Normalised log-mel of the waveforms, which are mixed before if asked."""
  section, waveform = data.fbank, batch["waveform"]
  whole = jnp.full(waveform.shape[:1], waveform.shape[1], jnp.int32)
  samples = batch.get("samples", whole)
  if section.remove_mean:
    waveform = audio.remove_mean(waveform, samples)
    if weight is not None and data.augment.mixup_waveform:
      # What lies beyond an example's own length falls away here.
      waveform = audio.remove_mean(mixup(waveform, weight), samples)
  values = audio.fbank(waveform, section, data.audio.rate)
  if section.frames:
    values = audio.fit_frames(values, samples, section, data.audio.rate)
  return audio.normalise(values, section)


def _augment_fbank(fbank: jax.Array, data: Any, keys: jax.Array) -> jax.Array:
  options, section = data.augment, data.fbank
  _, frames, bins = fbank.shape
  raw = options.mask_value == "raw"
  fill = -section.mean / section.std if raw else 0.0
  if options.time_shift:
    draw = _uniform(keys, "time_shift", 0.0, 1.0)
    shift = jnp.floor(draw * frames).astype(jnp.int32)
    fbank = time_shift(fbank, shift)
  if options.freq_masks:
    draws = _uniform(keys, "freq_masks", 0.0, 1.0, (2, options.freq_masks))
    removed = spans(draws[:, 0], draws[:, 1], bins, options.freq_size, raw)
    fbank = jnp.where(removed[:, None, :], fill, fbank)
  if options.time_masks:
    draws = _uniform(keys, "time_masks", 0.0, 1.0, (2, options.time_masks))
    removed = spans(draws[:, 0], draws[:, 1], frames, options.time_size, raw)
    fbank = jnp.where(removed[:, :, None], fill, fbank)
  if options.noise > 0:
    size = options.noise * _uniform(keys, "noise_size", 0.0, 1.0)
    noise = _uniform(keys, "noise", 0.0, 1.0, (frames, bins))
    fbank = fbank + size[:, None, None] * noise
  if options.roll:
    fbank = time_shift(fbank, _roll(keys, options.roll))
  return fbank


def _roll(keys: jax.Array, size: int) -> jax.Array:
  """One shift in -size .. size - 1 per example."""
  draw = _uniform(keys, "roll", 0.0, 1.0)
  return jnp.floor(draw * 2 * size).astype(jnp.int32) - size


def time_shift(fbank: Fbank, shift: Int[Array, "b"]) -> Fbank:
  """Rolls each spectrogram, or tokens, by `shift` towards later times."""
  frames = fbank.shape[1]
  source = (jnp.arange(frames) - shift[:, None]) % frames
  return jnp.take_along_axis(fbank, source[..., None], axis=1)


def spans(
  width_draw: Float[Array, "b m"],
  start_draw: Float[Array, "b m"],
  length: int,
  size: int,
  torchaudio: bool = False,
) -> Bool[Array, "b length"]:
  """SpecAugment's masks along one axis: true = removed, m spans an example.

  Args:
    width_draw: U[0, 1); a span is floor(U * size) wide: 0..size-1, the public
      implementations' rule.
    start_draw: U[0, 1); the start is uniform over the places where the span
      fits.
    length: of the axis.
    size: spans are narrower than this, and never longer than the axis.
    torchaudio: start at floor(U * (length - width)) with the width before it
      is rounded down, so the last place is never removed.
  """
  exact = width_draw * min(size, length + 1)
  width = jnp.floor(exact).astype(jnp.int32)
  room = (length - width + 1).astype(jnp.float32)
  if torchaudio:
    room = jnp.maximum(length - exact, 0.0)
  start = jnp.floor(start_draw * room).astype(jnp.int32)
  place = jnp.arange(length)
  inside = (place >= start[..., None]) & (place < (start + width)[..., None])
  return inside.any(axis=1)


# ---------------------------------------------------------------- mixup


def _per_example(options: Any) -> bool:
  """Whether each example draws its own weight."""
  return options.mixup_waveform or options.mixup_probability < 1


def _weights(
  batch: Mapping[str, Any], options: Any, rng: jax.Array, keys: jax.Array
) -> dict[str, jax.Array]:
  """Mixup's weight [b] by modality; 1 where either clip lacks the modality.

  One Beta(alpha, alpha) draw per step, one per modality and step, or one per
  example, which is then mixed in all modalities or in none.
  """
  alpha, apart = options.mixup, _per_example(options)
  if apart:
    draws = [_example_weights(keys, options)] * len(MIXED)
  else:
    draws = jax.random.beta(_stream(rng, "mixup"), alpha, alpha, (len(MIXED),))
  weights = {}
  for position, (modality, names) in enumerate(MIXED.items()):
    present = [name for name in names if name in batch]
    if not present:
      continue
    draw = draws[position if options.mixup_per_modality else 0]
    weight = jnp.broadcast_to(draw, batch[present[0]].shape[:1])
    has = batch.get(f"has_{modality}")
    if has is not None:
      weight = jnp.where(has & partner(has), weight, 1.0)
    weights[modality] = weight
  if apart and len(weights) == 2:
    both = (weights["audio"] < 1) & (weights["video"] < 1)
    weights = {m: jnp.where(both, w, 1.0) for m, w in weights.items()}
  return weights


def _example_weights(keys: jax.Array, options: Any) -> jax.Array:
  alpha = options.mixup
  drawn = jax.vmap(
    lambda key: jax.random.beta(_stream(key, "mixup"), alpha, alpha)
  )(keys)
  chosen = _happens(keys, "mixup_happens", options.mixup_probability)
  return jnp.where(chosen, drawn, 1.0)


def _mixup(
  inputs: dict[str, Any], options: Any, weights: Mapping[str, jax.Array]
) -> dict[str, Any]:
  """Mixes what each modality has, but a sound that is mixed already."""
  inputs = dict(inputs)
  for modality, weight in weights.items():
    for name in MIXED[modality]:
      if name in inputs and not (name == "fbank" and options.mixup_waveform):
        inputs[name] = mixup(inputs[name], weight)
    inputs[f"mix/{modality}"] = weight
  return inputs
