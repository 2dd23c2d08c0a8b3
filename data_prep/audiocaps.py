"""AudioCaps 1.0 and 2.0: ten seconds of a video, one or five captions.

Kim et al., NAACL 2019. The tables hold one row a caption.
"""

import dataclasses
import pathlib
from collections import Counter
from collections.abc import Iterable

import tensorflow_datasets as tfds

from data_prep import builder, media_files, tables, youtube

FILES = {
  "train": ("train.csv", "audiocaps_train.csv"),
  "validation": ("val.csv", "audiocaps_val.csv", "validation.csv"),
  "test": ("test.csv", "audiocaps_test.csv"),
}
COLUMNS = ("audiocap_id", "youtube_id", "start_time", "caption")
SECONDS = 10.0  # of every clip


class AudioCaps(builder.ClipBuilder):
  """Clips of AudioSet with captions of what is heard."""

  name = "audiocaps"
  VERSION = tfds.core.Version("1.0.0")

  def rows(self) -> dict[str, Iterable[builder.Row]]:
    """Clips of train.csv, val.csv and test.csv, whichever are there.

    Files: `media_files.locate`, [Y]<id>_30.000_40.000 and <audiocap_id>.

    Raises:
      InputError: no table is there, or a row is malformed.
    """
    media = self.options.media
    found = tables.sources(self.options.annotations or media, FILES)
    return {split: _rows(path, media) for split, path in found.items()}


def _rows(path: pathlib.Path, media: pathlib.Path) -> list[builder.Row]:
  """Rows of one clip lie anywhere in the file; their order is kept.

  For each row whose audiocap_id its clip has already, the clip comes once more,
  to be counted as a duplicate.
  """
  # (id, start) -> audiocap_id -> caption
  clips: dict[tuple[str, float], dict[str, str]] = {}
  again: Counter[tuple[str, float]] = Counter()
  for line in tables.read_csv(path, COLUMNS):
    key = (youtube.video_id(line, "youtube_id"), line.real("start_time"))
    captions = clips.setdefault(key, {})
    number, caption = line.text("audiocap_id"), line.text("caption")
    again[key] += number in captions
    captions.setdefault(number, caption)
  excerpts = [
    media_files.Excerpt(video, start, start + SECONDS) for video, start in clips
  ]
  names = [
    [*_names(excerpt), *captions]
    for excerpt, captions in zip(excerpts, clips.values(), strict=True)
  ]
  parts = youtube.locate(media, excerpts, names)
  starts = Counter(excerpt.video for excerpt in excerpts)
  rows = []
  for part, ((video, start), captions) in zip(
    parts, clips.items(), strict=True
  ):
    text = youtube.seconds_text(start)
    row = builder.Row(
      video if starts[video] == 1 else f"{video}_{text}",
      **dataclasses.asdict(part),
      captions=tuple(captions.values()),
    )
    rows += [row] * (1 + again[video, start])
  return rows


def _names(excerpt: media_files.Excerpt) -> list[str]:
  times = f"{excerpt.video}_{excerpt.start:.3f}_{excerpt.end:.3f}"
  return [times, f"Y{times}"]
