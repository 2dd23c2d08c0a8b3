"""Clips of noise in the place of a data set that is not there, for timing.

Media files of 340x256 pixels, 25 frames/s and, as in most data sets, 10 s with
sound, which go through the builder that all data sets go through. What it
stores: JPEG files of 256x340 pixels and about 24 KB (quality 85), int16 sound
at 16 kHz (320 KB). Frames of real videos take 10 to 30 KB at that size, so that
decoding these costs what decoding real ones does.

The pictures are noise whose amplitude falls with frequency as 1/f^1.4, bright-
ness three times as strong as colour. Natural pictures fall as 1/f, but have
flat areas and went through a video codec; noise of 1/f takes twice the bytes.
"""

import itertools
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import Int16, UInt8

from avjax.data import (
  datasets,
  demo_clip,
  demo_scene,
  demo_sound,
  object_scores,
  text,
)
from avjax.data import features as stored_features
from avjax.errors import lookup
from data_prep import builder

HEIGHT, WIDTH = 256, 340
FILES = 16  # different ones; clips repeat them
# Clips of a variant, which make 0.9 and 0.6 GB. Grain takes long to shuffle a
# few: 3 ms a clip if they are 16, 0.1 ms if they are 1024.
CLIPS = {"video": 256, "frames10": 1024}
OBJECTS = 601
MARGIN = 64  # pixels that the camera moves
FALL = 1.4  # of the amplitude with frequency
COLOUR = 0.3  # of the brightness


def build(section: Any, folder: pathlib.Path, clips: int = 64) -> pathlib.Path:
  """Builds `clips` clips under the name of a config's data set.

  Args:
    section: `config.data`; name, variant, split, heads and text are used.
    folder: where the files and the built data set go.
    clips: in the split.

  Returns:
    The folder to read as `config.data.dir`.

  Raises:
    InputError: the data set's name is unknown.
  """
  known = lookup(datasets.DATASETS, section["name"], "data set")
  media = folder / "files"
  media.mkdir(parents=True, exist_ok=True)
  seconds = known.seconds or 10.0
  heads = {*section["heads"]}
  if section["text"]["vocabulary"] and section["text"]["source"] == "labels":
    heads.add("label")
  for number in range(FILES):
    rng = np.random.default_rng(number)
    content = demo_clip.encode(picture(rng, seconds), sound(rng, seconds))
    (media / f"{number}.mp4").write_bytes(content)
  kind = type(
    "Synthetic",
    (_Synthetic,),
    {
      "name": section["name"],
      "split": section["split"],
      "clips": clips,
      "heads": {k: v for k, v in known.heads.items() if k in heads},
      "seconds": seconds,
    },
    skip_registration=True,
  )
  builder.build(
    kind,
    builder.Options(media=media, settings={"synthetic": True}),
    data_dir=folder,
    variant=section["variant"],
  )
  return folder


class _Synthetic(builder.ClipBuilder, skip_registration=True):
  """Clips of noise."""

  VERSION = tfds.core.Version("1.0.0")
  split: str
  clips: int
  heads: dict[str, int]
  seconds: float

  def classes(self) -> dict[str, tuple[str, ...]]:
    """`class 0`, `class 1`, … of each head."""
    return {
      head: tuple(f"class {i}" for i in range(count))
      for head, count in self.heads.items()
    }

  def rows(self) -> dict[str, Iterable[builder.Row]]:
    """The files, again and again; the classes in turn."""
    return {self.split: [self._row(i) for i in range(self.clips)]}

  def _results(self, tasks: Sequence[Any]) -> Iterator[Any]:
    """Every file is decoded once."""
    made = list(super()._results(tasks[:FILES]))
    yield from itertools.islice(itertools.cycle(made), len(tasks))

  def _row(self, number: int) -> builder.Row:
    names = {head: f"class {number % n}" for head, n in self.heads.items()}
    label, segment = names.get("label"), names.get("segment")
    return builder.Row(
      id=clip_id(number),
      file=f"{number % FILES}.mp4",
      labels=(label,) if label else (),
      verb=names.get("verb", ""),
      noun=names.get("noun", ""),
      segments=(segment,) * int(self.seconds) if segment else (),
      captions=(f"a camera moves over noise, clip {number}",),
    )


def scores(folder: pathlib.Path, clips: int = 64) -> pathlib.Path:
  """Object scores of these clips, for as many labels as Open Images has.

  Args:
    folder: that `build` was given.
    clips: in the split.

  Returns:
    The folder to read as `config.data.object_scores`.
  """
  rng, out = np.random.default_rng(0), folder / "object_scores"
  ids = [clip_id(number) for number in range(clips)]
  labels = [f"object {number}" for number in range(OBJECTS)]
  for modality in object_scores.MODALITIES:
    with object_scores.Writer(
      out, modality, labels=labels, source={"model": "noise"}, clips=ids
    ) as writer:
      writer.write(ids, rng.random((clips, OBJECTS), np.float32))
      writer.save()
  return out


def features(
  folder: pathlib.Path,
  section: Any,
  clips: int = 64,
  ids: Sequence[str] = (),
) -> pathlib.Path:
  """Stored features of these clips, of the size that a config asks for.

  Args:
    folder: that `build` was given.
    section: `config.data`; modality, feature_frames and feature_width are used.
    clips: in the split.
    ids: of other clips than those of `build`.

  Returns:
    The folder to read as `config.data.features`.
  """
  rng, out = np.random.default_rng(0), folder / "features"
  ids = list(ids) or [clip_id(number) for number in range(clips)]
  shape = (section["feature_frames"], section["feature_width"])
  for modality in stored_features.MODALITIES:
    if modality[0] in section["modality"]:
      with stored_features.Writer(
        out, modality, tokens=shape[0], width=shape[1],
        source={"model": "noise"}, clips=ids,
      ) as writer:  # fmt: skip
        writer.write(ids, rng.standard_normal((len(ids), *shape), np.float32))
  return out


def vocabulary(folder: pathlib.Path, size: int) -> pathlib.Path:
  """A WordPiece vocabulary of as many tokens as a model has, [DEC] included.

  Args:
    folder: where the file goes.
    size: at least that of av_demo.

  Returns:
    The file to read as `config.data.text.vocabulary`.
  """
  pieces = text.find("av_demo").read_text().splitlines()
  pieces += [f"piece{k}" for k in range(len(pieces), size - 1)]
  path = folder / "vocab.txt"
  path.write_text("\n".join(pieces))
  return path


def clip_id(number: int) -> str:
  """The id of a clip."""
  return f"synthetic_{number:04d}"


def picture(
  rng: np.random.Generator, seconds: float
) -> UInt8[np.ndarray, "t h w 3"]:
  """A camera that moves over smooth noise."""
  height, width = HEIGHT + MARGIN, WIDTH + MARGIN
  frequency = np.hypot(
    *np.meshgrid(np.fft.fftfreq(height), np.fft.rfftfreq(width), indexing="ij")
  )
  waves = np.fft.rfft2(rng.standard_normal((3, height, width)))
  noise = np.fft.irfft2(
    waves / np.maximum(frequency, 1 / width) ** FALL, (height, width)
  )
  noise = np.moveaxis(noise / noise.std((1, 2), keepdims=True), 0, -1)
  noise = COLOUR * noise + noise[..., :1]
  scene = np.clip(128 + 50 * noise, 0, 255).astype(np.uint8)
  count = round(seconds * demo_scene.FPS)
  turn = 2 * np.pi * np.arange(count) / count
  tops = np.round(MARGIN / 2 * (1 + np.cos(turn))).astype(int)
  lefts = np.round(MARGIN / 2 * (1 + np.sin(turn))).astype(int)
  return np.stack([
    scene[top : top + HEIGHT, left : left + WIDTH]
    for top, left in zip(tops, lefts, strict=True)
  ])  # fmt: skip


def sound(rng: np.random.Generator, seconds: float) -> Int16[np.ndarray, "s"]:
  """White noise, a tenth of full scale."""
  samples = rng.standard_normal(round(seconds * demo_sound.RATE))
  return (3_000 * samples).clip(-32_768, 32_767).astype(np.int16)
