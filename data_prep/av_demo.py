"""`av_demo`, the built-in data set, made and built on first use."""

import contextlib
import fcntl
import json
import pathlib
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import tensorflow_datasets as tfds

from avjax.data import datasets, demo, demo_clip, demo_scene
from avjax.errors import InputError
from data_prep import builder, stored

BACKGROUND = "background"
SPLITS = demo_clip.SPLITS


class AvDemo(builder.ClipBuilder):
  """Short clips of drawn objects that move and sound."""

  name = "av_demo"
  VERSION = tfds.core.Version(f"{demo_clip.VERSION}.0.0")

  def classes(self) -> dict[str, tuple[str, ...]]:
    """24 classes; verbs; nouns; the classes and background by the second."""
    return {
      "label": demo.CLASSES,
      "verb": demo.VERBS,
      "noun": demo.NOUNS,
      "segment": (*demo.CLASSES, BACKGROUND),
    }

  def rows(self) -> dict[str, Iterable[builder.Row]]:
    """The lines of annotations.jsonl."""
    path = self.options.annotations or self.options.media / "annotations.jsonl"
    if not path.is_file():
      raise InputError(f"{path} is missing")
    splits: dict[str, list[builder.Row]] = {name: [] for name in SPLITS}
    for line in path.read_text().splitlines():
      record = json.loads(line)
      splits[record["split"]].append(row(record))
    return splits


def row(record: dict[str, Any]) -> builder.Row:
  """One line of annotations.jsonl; see `avjax.data.demo_clip.record`."""
  start, end = record["event"]
  # AVE's rule: a second belongs to the event that it mostly overlaps.
  segments = [
    record["label"] if min(end, k + 1) - max(start, k) >= 0.5 else BACKGROUND
    for k in range(round(record["seconds"]))
  ]
  return builder.Row(
    id=record["id"],
    file=record["file"],
    labels=record["labels"],
    verb=record["verb"],
    noun=record["noun"],
    segments=segments,
    captions=record["captions"],
    event=(start, end),
    things=[
      stored.Thing(
        thing["frame"] / demo_scene.FPS,
        thing["name"],
        tuple(thing["box"]),
        thing["sounding"],
      )
      for thing in record["objects"]
    ],
  )


def ensure_demo(config_data: Any) -> pathlib.Path:
  """Makes and builds av_demo, unless it is there.

  Every size and seed (`config_data.demo`) has a folder of its own, in which
  `media/` keeps the files. Several processes may ask at once.

  Args:
    config_data: `config.data`; `dir` may be a folder returned here.

  Returns:
    The folder to read as `config.data.dir`.

  Raises:
    InputError: a size or the variant is out of range.
  """
  wanted = config_data["demo"]
  sizes = [wanted[k] for k in ("clips_per_class", "test_per_class", "seed")]
  name = "_".join(str(value) for value in ("av_demo", *sizes))
  folder = datasets.data_dir(config_data)
  if folder.name != name:
    folder = folder / name
  variant = config_data["variant"]
  built = folder / AvDemo.name / variant / str(AvDemo.VERSION)
  if not (built / "dataset_info.json").exists():
    folder.mkdir(parents=True, exist_ok=True)
    with lock(folder / ".lock"):
      if not (built / "dataset_info.json").exists():
        _make(folder, variant, *sizes)
  return folder


def _make(folder, variant, clips, test, seed) -> None:
  print(f"making av_demo in {folder}", file=sys.stderr)
  media = _media(folder)
  demo.write_media(media, clips_per_class=clips, test_per_class=test, seed=seed)
  settings = {"clips_per_class": clips, "test_per_class": test, "seed": seed}
  # Such small pictures would suffer from a second strong compression.
  options = builder.Options(media=media, quality=95, settings=settings)
  builder.build(AvDemo, options, data_dir=folder, variant=variant)


def _media(folder: pathlib.Path) -> pathlib.Path:
  return folder / f"files_{demo_clip.VERSION}"


@contextlib.contextmanager
def lock(path: pathlib.Path) -> Iterator[None]:
  """Waits for other processes; the system frees it when a process ends."""
  with path.open("w") as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      print(f"another process makes {path.parent}; waiting", file=sys.stderr)
      fcntl.flock(file, fcntl.LOCK_EX)
    yield


def example_media(data: Any) -> pathlib.Path:
  """An MP4 file of av_demo's test split (of `train`, if there is no test).

  Args:
    data: `config.data`, or a folder that `ensure_demo` returned.
  """
  if isinstance(data, (str, pathlib.Path)):
    folder = pathlib.Path(data)
  else:
    folder = ensure_demo(data)
  for split in reversed(SPLITS):
    files = sorted((_media(folder) / "media").glob(f"{split}_*.mp4"))
    if files:
      return files[0]
  raise InputError(f"{folder} holds no clip of av_demo")
