"""AVE (audiovisual event localisation) from local media and its lists."""

import pathlib
from collections import Counter
from collections.abc import Iterator

import tensorflow_datasets as tfds

from data_prep import builder, media_files, tables

SECONDS = 10
BACKGROUND = "background"
SPLITS = {
  "train": ["trainSet.txt"],
  "validation": ["valSet.txt"],
  "test": ["testSet.txt"],
}
COLUMNS = ("Category", "VideoID", "Quality", "StartTime", "EndTime")


class Ave(builder.ClipBuilder):
  """AVE (Tian et al., ECCV 2018): which of 28 events each second holds.

  The annotations are the folder of trainSet.txt, valSet.txt and testSet.txt,
  or one of them. Files are the distributed ones, VIDEO.mp4 of 10 s. A second
  from StartTime up to, not including, EndTime is labelled with the event, any
  other is background; an event of no length (0&0) leaves background alone.

  The id of a clip is the video's. A video with several events is a clip for
  each, as the authors count them: the later ones are VIDEO:2 and so on.
  """

  name = "ave"
  VERSION = tfds.core.Version("1.0.0")

  def classes(self) -> dict[str, tuple[str, ...]]:
    """28 events and, last, background."""
    return {"segment": (*tables.class_list("ave")["names"], BACKGROUND)}

  def rows(self) -> dict[str, list[builder.Row]]:
    """Rows by split, in the order of the lists.

    Raises:
      InputError: a list is missing or a row is malformed.
    """
    place = self.options.annotations or self.options.media
    files = media_files.index(self.options.media)
    counts: Counter[str] = Counter()
    seen: dict[tuple[str, ...], str] = {}
    splits = {}
    for split, path in tables.sources(place, SPLITS).items():
      splits[split] = []
      for line in _lines(path):
        entry = tuple(line.fields.values())
        video = line["VideoID"]
        if entry not in seen:
          counts[video] += 1
          number = counts[video]
          seen[entry] = video if number == 1 else f"{video}:{number}"
        # A line that is there twice keeps its id: it counts as a duplicate.
        file = media_files.find(
          files, [f"{video}.mp4", "&".join(entry) + ".mp4"]
        )
        splits[split].append(_row(line, seen[entry], file))
    return splits


def _lines(path: pathlib.Path) -> Iterator[tables.Line]:
  return tables.read_csv(
    path, COLUMNS, header=None, delimiter="&", quotes=False
  )


def _row(line: tables.Line, name: str, file: str) -> builder.Row:
  category = line.known("Category", tables.class_list("ave")["names"])
  line.text("VideoID")
  start, end = line.integer("StartTime"), line.integer("EndTime")
  if not start <= end <= SECONDS:
    words = f"StartTime <= EndTime <= {SECONDS}"
    raise line.error(words, f"{start} and {end}")
  return builder.Row(
    id=name,
    file=file,
    end=float(SECONDS),
    segments=[
      category if start <= k < end else BACKGROUND for k in range(SECONDS)
    ],
    event=(float(start), float(end)) if start < end else None,
  )
