"""Networks that make features of clips: ConvNeXt on pictures and on sound.

UAVM, arXiv:2208.00061, §II-A; what the paper leaves out is from the public
code. Pictures: three a second, short side 224, aspect kept, no crop; the mean
over the places of each one's last map. Sound: the extractor's own log-mel, of
990 frames where it was trained with 1,000; the mean over the rows of mel bins,
a token per 32 frames. 10 s give 30 tokens of both.
"""

import collections
import functools
import math
import pathlib
from collections.abc import Sequence
from typing import Any

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import simplejpeg
from jaxtyping import Array, Float, Float32, Int16, UInt8

from avjax import config as config_lib
from avjax import embed_parts, initialise
from avjax.data import augment, records
from avjax.errors import InputError
from avjax.nn import convnext
from data_prep import object_clips

RATE = 3.0  # pictures a second
SHORT_SIDE = 224
# ImageNet's, of values in 0..1: torchvision's models.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
FBANK_FRAMES = 990  # at most: what the public features are made of


class Clips(object_clips.Stored):
  """Splits of a built data set, read at three pictures a second.

  Args:
    name, splits, data_dir, variant, limit: see `object_clips.Stored`.
    tokens: pictures of a clip at most.

  Attributes:
    rates: samples a second of the sound, which splits may differ in.
  """

  def __init__(
    self, name: str, splits: Sequence[str], *, tokens: int, **place: Any
  ):
    super().__init__(name, splits, **place)
    self._tokens = tokens
    self.rates = {rate for _, _, rate in self._places.values()}

  def pictures(self, record: records.Record) -> list[np.ndarray]:
    """Frames at RATE, see `spaced`; one may come several times.

    Raises:
      ValueError: one is not a JPEG file.
    """
    frames = record.blobs("frames")
    rate = float(record.floats("frame_rate")[0])
    numbers = spaced(len(frames), rate, self._tokens)
    decoded = {
      number: simplejpeg.decode_jpeg(frames[number], "RGB")
      for number in set(numbers)
    }
    return [decoded[number] for number in numbers]


def spaced(count: int, rate: float, most: int) -> list[int]:
  """Numbers of the last frames before (k + 1/2) / RATE seconds.

  So does FFmpeg's filter fps=3, with which the public features were made: a
  frame's time is rounded to the nearest k / RATE, and the last one counts.

  Args:
    count: frames of the clip.
    rate: frames a second.
    most: numbers at most.
  """
  if not count:
    return []
  wanted = min(max(round(count / rate * RATE), 1), most)
  ends = [(k + 0.5) / RATE * rate for k in range(wanted)]
  return [min(max(math.ceil(end - 1e-6) - 1, 0), count - 1) for end in ends]


def resized(
  picture: UInt8[np.ndarray, "h w 3"], side: int = SHORT_SIDE
) -> UInt8[np.ndarray, "h w 3"]:
  """The picture with a short side of so many pixels."""
  height, width = picture.shape[:2]
  scale = side / min(height, width)
  size = (round(width * scale), round(height * scale))
  if size == (width, height):
    return picture
  method = cv2.INTER_AREA if scale < 0.5 else cv2.INTER_CUBIC
  return cv2.resize(picture, size, interpolation=method)


class Pictures:
  """ConvNeXt on pictures.

  Args:
    weights: torchvision's file, such as convnext_base-6075fbad.pth; or a run of
      configs/uavm_extractor_*.py with modality=v, whose pictures had another
      size.
    batch_size: pictures at a time.

  Attributes:
    width: d.
    source: what the features are made by, for the file.

  Raises:
    InputError: there are no such weights, or they are of another network.
  """

  def __init__(self, weights: str, batch_size: int):
    params, plain = _read(weights, channels=3)
    video = plain.get("data", {}).get("video", {})
    self._side = video.get("resize", SHORT_SIDE)
    look = tuple(video.get("mean", MEAN)), tuple(video.get("std", STD))
    self._params, self._batch = jax.device_put(params), batch_size
    self.width = convnext.size_of(params).channels
    self.source = {
      **_named(weights, params),
      "rate": RATE,
      "short_side": self._side,
    }
    self._run = jax.jit(functools.partial(_of_pictures, look))

  def check(self, clips: Clips) -> None:
    """Any pictures will do."""

  def prepare(self, clip: object_clips.Clip) -> list[np.ndarray] | None:
    """Resizes; a picture that is repeated stays one object."""
    if not len(clip.frames):
      return None
    made = {id(frame): resized(frame, self._side) for frame in clip.frames}
    return [made[id(frame)] for frame in clip.frames]

  def features(
    self, clips: Sequence[list[np.ndarray]]
  ) -> list[Float32[np.ndarray, "n d"]]:
    """Of each prepared clip, a token per picture."""
    different = {id(x): x for clip in clips for x in clip}
    sizes = collections.defaultdict(list)
    for key, picture in different.items():
      sizes[picture.shape].append(key)
    found = {}
    for keys in sizes.values():  # one compilation a size
      pictures = np.stack([different[key] for key in keys])
      rows = _in_batches(self._run, self._params, pictures, self._batch)
      found.update(zip(keys, rows, strict=True))
    return [np.stack([found[id(x)] for x in clip]) for clip in clips]


class Sound:
  """ConvNeXt on log-mel.

  Args:
    weights: a run of configs/uavm_extractor_*.py, or a public file.
    batch_size: clips at a time.

  Attributes:
    width: d.
    rate: samples a second that it hears.
    source: what the features are made by, for the file.

  Raises:
    InputError: there are no such weights, or they are of another network.
  """

  def __init__(self, weights: str, batch_size: int):
    params, plain = _read(weights, channels=1)
    config = config_lib.from_plain(plain)
    with config.unlocked():
      fbank = config.data.fbank
      fbank.frames = min(fbank.frames or FBANK_FRAMES, FBANK_FRAMES)
    self._params, self._batch = jax.device_put(params), batch_size
    self.width = convnext.size_of(params).channels
    self.rate = config.data.audio.rate
    self._length = round(config.data.audio.seconds * self.rate)
    front = {key: fbank[key] for key in ("frames", "mean", "std")}
    self.source = {**_named(weights, params), **front}
    self._run = jax.jit(functools.partial(_of_sound, config.data))

  def check(self, clips: Clips) -> None:
    """Refuses sound of another rate.

    Raises:
      InputError: names both.
    """
    other = clips.rates - {self.rate}
    if other:
      raise InputError(
        f"the stored sound has {other.pop()} samples/s; the extractor hears "
        f"{self.rate}"
      )

  def prepare(
    self, clip: object_clips.Clip
  ) -> tuple[Int16[np.ndarray, "s"], int] | None:
    """The first samples, zeros after them, and how many they are."""
    if not len(clip.sound):
      return None
    sound = clip.sound[: self._length]
    padded = np.zeros(self._length, np.int16)
    padded[: len(sound)] = sound
    return padded, len(sound)

  def features(
    self, clips: Sequence[tuple[np.ndarray, int]]
  ) -> list[Float32[np.ndarray, "n d"]]:
    """Of each prepared clip, a token per 32 frames of log-mel."""
    waves = np.stack([wave for wave, _ in clips])
    lengths = np.array([length for _, length in clips], np.int32)
    both = {"waveform": waves, "samples": lengths}
    return list(_in_batches(self._run, self._params, both, self._batch))


def _of_pictures(
  look: tuple[Any, Any], params: Any, pictures: UInt8[Array, "b h w 3"]
) -> Float[Array, "b d"]:
  values = pictures.astype(jnp.float32) / 255
  mean, std = (jnp.asarray(x, jnp.float32) for x in look)
  return convnext.features(params, (values - mean) / std)


def _of_sound(data: Any, params: Any, batch: Any) -> Float[Array, "b n d"]:
  inputs = augment.prepare(batch, data, jax.random.key(0), False)
  return convnext.features(params, inputs["fbank"])


def _read(weights: str, channels: int) -> tuple[Any, Any]:
  """Parameters and config of a ConvNeXt with a stem of so many channels."""
  found = initialise.read(weights, complete=channels == 1)
  params = found.params
  if "embed" not in params or "stage_3" not in params:
    raise InputError(f"{weights} is no ConvNeXt")
  inputs = len(params["embed"]["kernel"]) // convnext.PATCH**2
  if inputs != channels:
    kinds = {1: "hears sound", 3: "sees pictures"}
    raise InputError(
      f"the ConvNeXt of {weights} {kinds.get(inputs, 'does something else')}; "
      f"one that {kinds[channels]} is needed"
    )
  return params, found.config


def _named(weights: str, params: Any) -> dict[str, Any]:
  path = pathlib.Path(weights).expanduser()
  checksum = embed_parts.fingerprint(params)
  return {"model": "ConvNeXt", "weights": path.name, "checksum": checksum}


def _in_batches(run: Any, params: Any, values: Any, size: int) -> np.ndarray:
  """Rows of `run`, `size` at a time; the rest is padded to a power of two."""
  count = len(jax.tree.leaves(values)[0])
  rows = []
  for k in range(0, count, size):
    own = min(size, count - k)
    room = min(1 << (own - 1).bit_length(), size)

    def cut(x: np.ndarray, k: int = k, own: int = own, room: int = room):
      return np.concatenate(
        [x[k : k + own], x[k : k + 1].repeat(room - own, 0)]
      )

    rows.append(np.asarray(run(params, jax.tree.map(cut, values)))[:own])
  return np.concatenate(rows)
